"""The ranks: who this process is, as the launcher's variables say, and how ranks of this machine are started and watched.

The one place that reads the environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

from bone_ds import child_process
from bone_ds.errors import ConfigError
from bone_ds.stopping import ONE_REQUEST_S, STOP_SIGNALS, STOPPED

KILLED = 128 + signal.SIGKILL
"""What `start` returns where a rank was killed, as the system does when memory runs out."""
GRACE_S = 5.0
"""What the other ranks have to end once one has failed and they have been sent SIGTERM: one may be writing a file."""
_POLL_S = 0.05
_SLURM_PORTS = range(61_440, 65_536)
"""Linux hands out none of these by itself."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Ranks on this host."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def adopt_slurm_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets torchrun's variables in a task of an `srun` of several tasks: torch and DeepSpeed know no others.

    A launcher that `srun` has started wins, and so does a MASTER_ADDR or MASTER_PORT of the user's. A job script, an `srun` of one
    task, and a shell of `srun --pty`, the one task with a terminal, is no rank.
    """
    if "RANK" not in environ and "SLURM_PTY_PORT" not in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        meeting = {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ}
        environ.update(_of_slurm_step(environ) | meeting)


def _of_slurm_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The ranks meet on the step's first host, at a port that follows from the job, alike on every host."""
    meeting = 16 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
    tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    return {"RANK": environ["SLURM_PROCID"], "LOCAL_RANK": environ["SLURM_LOCALID"], "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": str(tasks), "MASTER_ADDR": _first_host(environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(_SLURM_PORTS[meeting % len(_SLURM_PORTS)])}


def _first_host(nodes: str) -> str:
    """`rack[1-2]-node[007-010,12],login` -> `rack1-node007`"""
    first = re.match(r"(\[[^]]*\]|[^,[])+", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]"""
    return [int(tasks) for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(nodes or 1))]


def current(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process's place under `bone-ds train`, `deepspeed`, `torchrun` or `srun`, or None where no launcher started it."""
    if not all(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return None
    # torchrun and DeepSpeed's launcher name it differently.
    local_world_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ["WORLD_SIZE"]
    return Ranks(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]), int(local_world_size))


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start(arguments: list[str], ranks: int) -> int:
    """Runs `python -m bone_ds ARGUMENTS` on so many local ranks and returns when all have ended; a rank that was killed is named.

    Returns 0, the exit code of the rank that failed first, 128 + the signal that killed it, or 128 + the one that this process was
    sent, unless the ranks have saved then and say STOPPED. SIGTERM and SIGUSR1 are passed on to every rank once; at a second one, and at
    SIGINT and SIGHUP, all ranks end at once. When a rank has failed, the others have GRACE_S to end. No rank outlives this process,
    however that ends.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks: {ranks} is no number of ranks, give 1 or more")
    environ = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": ",".join(_devices(ranks))}
    command = [sys.executable, "-u", "-m", "bone_ds", *arguments]
    return _run_to_their_end(command, [environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)])


def _devices(ranks: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPU of each rank as CUDA_VISIBLE_DEVICES numbers them; every rank sees them all and takes the one of its local rank."""
    if "CUDA_VISIBLE_DEVICES" not in environ:
        gpus = count_gpus()
        if 0 < gpus < ranks:
            raise ConfigError(f"--ranks: {ranks} is more than the {gpus} GPUs of this machine")
        return [str(index) for index in range(ranks)]
    visible = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if not visible or "-1" in visible:
        return ["-1"] * ranks  # the GPUs are hidden on purpose
    if ranks > len(visible):
        raise ConfigError(f"--ranks: {ranks} is more than the {len(visible)} of CUDA_VISIBLE_DEVICES: {','.join(visible)}")
    return visible[:ranks]


def _run_to_their_end(command: list[str], environments: list[dict[str, str]]) -> int:
    """The same command once for each environment, which is a rank's."""
    processes: list[subprocess.Popen] = []
    ends_with_this = partial(child_process.end_with, os.getpid())
    with _received() as received:
        try:
            for environ in environments:
                # A session of its own: a terminal's Ctrl-C reaches this process alone, and a rank's children end with it.
                processes.append(subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=ends_with_this))
            code = _watch(processes, received)
            answered = len(received)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    late = received[answered:] if code not in (0, STOPPED) else []
    return 128 + late[0] if late else code


@contextlib.contextmanager
def _received() -> Iterator[list[int]]:
    """The signals that this process is sent meanwhile, but for those it ignores; requests to stop that come close together are one."""
    received: list[int] = []
    asked_at = 0.0

    def receive(number: int, _) -> None:
        nonlocal asked_at
        if not received:
            asked_at = time.monotonic()
        elif number in STOP_SIGNALS and time.monotonic() - asked_at < ONE_REQUEST_S:
            return
        received.append(number)

    before = {number: signal.signal(number, receive)
              for number in (signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS) if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[subprocess.Popen], received: list[int]) -> int:
    """Until all have ended, or have to be ended; the exit code of them all."""
    failed, deadline, passed_on = None, float("inf"), False
    while any([process.poll() is None for process in processes]) and time.monotonic() < deadline:
        if len(received) > 1 or received and received[0] not in STOP_SIGNALS:
            return 128 + received[-1]
        if received and not passed_on:
            passed_on = True
            for process in processes:
                process.send_signal(received[0])
        if failed is None and (failed := _failed(processes)) is not None:
            deadline = time.monotonic() + GRACE_S
            if processes[failed].returncode != STOPPED:  # then they end by themselves
                for process in processes:
                    process.terminate()
        time.sleep(_POLL_S)
    failed = _failed(processes) if failed is None else failed
    if failed is None:
        return 0
    code = processes[failed].returncode
    if code < 0 and -code not in received:
        others = ", the others were ended" if len(processes) > 1 else ""
        print(f"bone-ds: rank {failed} was killed by signal {-code} ({_name(-code)}){others}", file=sys.stderr, flush=True)
    if received and code == -received[0]:
        return STOPPED  # the rank did not listen yet: there was nothing to save
    if received and code != STOPPED:
        return 128 + received[0]
    return code if code > 0 else 128 - code


def _failed(processes: list[subprocess.Popen]) -> int | None:
    """The rank that has not ended well; of several, one that has saved, else one that was killed, which the others have noticed."""
    codes = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
    return min(codes, key=lambda rank: (codes[rank] != STOPPED, codes[rank])) if codes else None


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "a real-time signal"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
