"""The ranks: who this process is, as the launcher's variables say, and how the launcher is started.

The one place that reads the environment.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from bone_ds.errors import ConfigError

KILLED = 128 + 9
"""What `start` returns where a rank was killed, as the system does when memory runs out."""

# DeepSpeed's launcher, without its warning at import that this machine has no GPU.
_QUIET_LAUNCHER = """
import logging, runpy
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
"""


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


def current(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process's place under `deepspeed` or `torchrun`, or None where no launcher started it."""
    if not all(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return None
    # torchrun and DeepSpeed's launcher name it differently.
    local_world_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ["WORLD_SIZE"]
    return Ranks(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]), int(local_world_size))


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start(arguments: list[str], ranks: int) -> int:
    """Runs `python -m bone_ds ARGUMENTS` on so many local ranks under DeepSpeed's launcher; returns its exit code.

    The ranks end with this process: SIGINT, SIGTERM and SIGHUP are passed on, and nothing is left behind at return.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks: {ranks} is no number of ranks, give 1 or more")
    return _run_to_its_end(_command(arguments, _devices(ranks)))


def _command(arguments: list[str], devices: list[str]) -> list[str]:
    """DeepSpeed's launcher of one host: what `deepspeed` itself starts here after it has looked for other hosts."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    return [
        sys.executable, "-c", _QUIET_LAUNCHER, f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={_free_port()}",
        "--no_local_rank", "--log_level=critical", "--module", "bone_ds", *arguments]


def _devices(ranks: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPU of each rank as CUDA_VISIBLE_DEVICES numbers them; the launcher makes it the ranks' own."""
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


def _run_to_its_end(command: list[str]) -> int:
    """The command's exit code, or 128 + the signal that ended this process, the command or one of its ranks."""
    received: list[int] = []
    # A session of its own: a terminal's Ctrl-C reaches this process alone, which ends the others in order.
    process = subprocess.Popen(command, start_new_session=True)

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    # DeepSpeed's launcher exits with a killed rank's -9, which the system makes 247.
    killed_by = -code if code < 0 else 256 - code if code > 192 else 0
    return 128 + killed_by if killed_by else code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
