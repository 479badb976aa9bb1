"""Two hosts, each a network namespace of this machine with a name and a disk of its own, joined by a cable that can be cut.

A run goes over both as it does over two machines: by DeepSpeed's launcher without ssh and with pdsh, by torchrun, and by what srun sets.
It ends as the run of as many ranks on one host, to the bit. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rows import Row

from faults.equality import differences
from faults.harness import Harness, SkippedError
from faults.tiny_runs import LONGEST_S, Start, TinyRuns, leaving_nothing, published, resuming

TIMEOUT_S = 5
"""train.collective_timeout_s"""
ENDS_S = TIMEOUT_S + 30
"""What each host has to end once it can't reach the other."""
TRAIN = {"steps": 120, "save_every": 20, "eval_every": 60, "keep_checkpoints": 1, "collective_timeout_s": TIMEOUT_S}
CUT_AFTER = 30
STOPPED = 75
ADDRESSES = ("10.213.7.1", "10.213.7.2")
NAMES = ("host-a", "host-b")
INTERFACE = "eth0"
PDSH = """#!{python}
# Stands in for pdsh, whose -S gives the highest exit code: pdsh -S -f N -w HOST,HOST COMMAND ..., in which %n is the number of the host.
import subprocess, sys
assert sys.argv[1:4] == ["-S", "-f", "1024"] and sys.argv[4:6] == ["-w", "{names}"] and "pkill" not in sys.argv[6], sys.argv
command = " ".join(sys.argv[6:])
within = {within}
hosts = [subprocess.Popen([*prefix, "sh", "-c", command.replace("%n", str(number))]) for number, prefix in enumerate(within)]
sys.exit(max(host.wait() % 256 for host in hosts))
"""


@dataclass(frozen=True)
class _Host:
    number: int
    namespace: str

    @property
    def name(self) -> str:
        return NAMES[self.number]

    @property
    def within(self) -> list[str]:
        """A command that runs another on this host, in its own process."""
        named = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh"]


Launcher = Callable[[_Host, int, int], list[tuple[list[str], dict[str, str]]]]
"""Of a host, the ranks of each and a port: the commands of `python -m` that are started there, each with variables of its own."""


@dataclass(frozen=True)
class _Case:
    name: str
    launcher: Launcher
    stage: int
    ranks: int
    """Of each host."""


def _deepspeed(host: _Host, ranks: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
    return [(["deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--node_rank", str(host.number), "--master_addr",
              ADDRESSES[0], "--master_port", str(port), "--module"], {})]


def _torchrun(host: _Host, ranks: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
    return [(["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(ranks), "--node_rank", str(host.number), "--master_addr",
              ADDRESSES[0], "--master_port", str(port), "-m"], {})]


def _srun(host: _Host, ranks: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
    """The tasks of a step; the port follows from the job."""
    step = {"SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(2 * ranks), "SLURM_NODEID": str(host.number),
            "SLURM_STEP_TASKS_PER_NODE": f"{ranks}(x2)", "SLURM_STEP_NODELIST": "10.213.7.[1-2]"}
    return [([], step | {"SLURM_PROCID": str(host.number * ranks + local), "SLURM_LOCALID": str(local)}) for local in range(ranks)]


CASES = (_Case("deepspeed, stage 2", _deepspeed, 2, 1), _Case("torchrun, stage 3", _torchrun, 3, 1), _Case("srun, stage 2", _srun, 2, 2))


def run(harness: Harness) -> list[Row]:
    for program in ("ip", "unshare", "hostname"):
        if os.geteuid() or not shutil.which(program):
            raise SkippedError("network namespaces take root, and the programs ip, unshare and hostname")
    with _two_hosts() as hosts:
        for case in CASES[:1] if harness.quick else CASES:
            tried = _Tried(harness.work / case.name.replace(", ", "-").replace(" ", "-"), hosts, case)
            harness.attempt(f"{case.name}: trains", leaving_nothing(tried.trains))
            harness.attempt(f"{case.name}: the cable is cut", leaving_nothing(tried.loses_the_other_host))
        if not harness.quick:
            harness.attempt("srun, stage 2: asked to stop", leaving_nothing(tried.is_asked_to_stop))
            harness.attempt("deepspeed with pdsh, one disk", leaving_nothing(partial(_with_pdsh, harness.work / "pdsh", hosts)))
            harness.attempt("the other host never comes", leaving_nothing(partial(_alone, harness.work / "alone", hosts)))
    rows = harness.results.measured
    ends_s = [second for row in rows.values() for second in row.get("ends_s", ())]
    return [Row("runs over two hosts that were as they must be", sum(row["ok"] for row in rows.values()), f"of {len(rows)}",
                at_least=len(rows)),
            Row("from the cut until no process was left on either, at most", max(ends_s, default=0.0), "s", at_most=ENDS_S)]


class _Tried:
    """Of one launcher: each host has model, data and run.yaml on its own disk."""

    def __init__(self, directory: Path, hosts: tuple[_Host, _Host], case: _Case):
        self.hosts, self.case = hosts, case
        self._directory = directory
        self._disks: list[TinyRuns] = []

    @property
    def disks(self) -> list[TinyRuns]:
        if not self._disks:
            self._directory.mkdir()
            sections = {"train": TRAIN, "deepspeed": {"config": f"zero{self.case.stage}"}}
            self._disks = [TinyRuns(self._directory / name, 2 * self.case.ranks, **sections) for name in NAMES]
        return self._disks

    def trains(self) -> dict:
        whole, places = self.disks[0].whole(), self._places("trains")
        codes = [[start.process.wait(LONGEST_S) for start in host] for host in self._start(places)]
        problems = _of_one_host_alone(places) + differences(places[0] / "run", whole / "run")
        ok = not problems and codes == [[0] * len(host) for host in codes]
        return {"codes": codes, "problems": problems, "ok": ok}

    def loses_the_other_host(self) -> dict:
        whole, places = self.disks[0].whole(), self._places("cut")
        starts = self._start(places)
        first = starts[0][0]
        while first.last("step") < CUT_AFTER:
            assert first.lives(), first.errors.read_text()
            time.sleep(0.02)
        with _cut(self.hosts[1]):
            at, cut_at, ends_s = time.monotonic(), time.time(), []
            for host in starts:
                while any(start.lives() or start.processes() for start in host) and time.monotonic() < at + 4 * ENDS_S:
                    time.sleep(0.05)
                ends_s.append(round(time.monotonic() - at, 1))
            codes = [[start.process.poll() for start in host] for host in starts]
            said = [[line for start in host for line in start.said()] for host in starts]
            said_after_s = [round(max(start.errors.stat().st_mtime for start in host) - cut_at, 1) for host in starts]
            for start in (start for host in starts for start in host):
                start.ends_now()
        problems = [] if max(ends_s) < ENDS_S else [f"ended after {ends_s} s"]
        problems += [f"exit codes {codes}"] * any(code in (None, 0) for host in codes for code in host)
        problems += [f"said {said}"] * (not all(len(lines) == 1 and _names(lines[0], other) for lines, other in zip(
            said, (self._ranks(1), self._ranks(0, store_only=True)))))
        saved = published(places[0])
        codes_after = [[start.process.wait(LONGEST_S) for start in host] for host in self._start(places)]
        problems += [f"started again it ended with {codes_after}"] * any(code for host in codes_after for code in host)
        problems += _of_one_host_alone(places) + differences(places[0] / "run", whole / "run")
        return {"ends_s": ends_s, "said_after_s": said_after_s, "codes": codes, "said": said, "saved": saved, "problems": problems,
                "ok": not problems}

    def is_asked_to_stop(self) -> dict:
        """As Slurm does before it takes the nodes away."""
        whole, places = self.disks[0].whole(), self._places("stopped")
        starts = [start for host in self._start(places) for start in host]
        while starts[0].last("step") < CUT_AFTER:
            assert starts[0].lives(), starts[0].errors.read_text()
            time.sleep(0.02)
        for start in starts:
            start.process.send_signal(signal.SIGUSR1)
        codes = [start.process.wait(LONGEST_S) for start in starts]
        stopped = [event["step"] for event in starts[0].recorded("stop")]
        problems = [f"exit codes {codes}"] * any(code != STOPPED for code in codes)
        problems += [f"stopped after {stopped}, saved {published(places[0])}"] * (stopped != published(places[0]))
        codes = [start.process.wait(LONGEST_S) for host in self._start(places) for start in host]
        problems += [f"started again it ended with {codes}"] * any(codes)
        problems += _of_one_host_alone(places) + differences(places[0] / "run", whole / "run")
        return {"stopped_after": stopped, "problems": problems, "ok": not problems}

    def _places(self, name: str) -> list[Path]:
        places = [disk.place(name) for disk in self.disks]
        for place in places:
            (place / "hosts").write_text("".join(f"{name} slots={self.case.ranks}\n" for name in NAMES))
        return places

    def _start(self, places: list[Path]) -> list[list[Start]]:
        """By host."""
        port, resume = _free_port(), resuming(places[0])
        starts = []
        for host, place in zip(self.hosts, places):
            commands = self.case.launcher(host, self.case.ranks, port)
            starts.append([_started(place, number, [*command, "bone_ds", "train", "run.yaml", *resume], host, more)
                           for number, (command, more) in enumerate(commands)])
        return starts

    def _ranks(self, number: int, store_only: bool = False) -> str:
        """Of a host, as messages have them; the other host knows of the one that holds the store alone."""
        ranks = range(number * self.case.ranks, (number + 1) * self.case.ranks)
        one = len(ranks) == 1 or store_only
        return f"rank {ranks[0]} on {NAMES[number]} does" if one else f"ranks {', '.join(map(str, ranks))} on {NAMES[number]} do"


def _started(place: Path, number: int, command: list[str], host: _Host, variables: dict[str, str]) -> Start:
    """One of several commands on a host, each with files of its own for what it prints."""
    own = place / f"command-{number}"
    own.mkdir(exist_ok=True)
    return Start(place, command, host.within, {"GLOO_SOCKET_IFNAME": INTERFACE} | variables, prints_to=own)


def _names(line: str, who: str) -> bool:
    return line.startswith(f"{who} not answer: ") and line.endswith("host is gone")


def _of_one_host_alone(places: list[Path]) -> list[str]:
    return [f"{places[1]}: {NAMES[1]} has a run directory too"] * (places[1] / "run").exists()


def _with_pdsh(directory: Path, hosts: tuple[_Host, _Host]) -> dict:
    """DeepSpeed's launcher as it is by default, from the first host, on a disk that both share."""
    disk = TinyRuns(directory, 2, train=TRAIN, deepspeed={"config": "zero2"})
    place, whole = disk.place("trains"), disk.whole()
    (place / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    pdsh = place / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable, names=",".join(NAMES), within=[host.within for host in hosts]))
    pdsh.chmod(0o755)
    variables = {"PATH": f"{place}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": INTERFACE}
    command = ["deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh_check", "--master_addr", ADDRESSES[0], "--master_port",
               str(_free_port()), "--module", "bone_ds", "train", "run.yaml"]
    start = Start(place, command, hosts[0].within, variables)
    code = start.process.wait(LONGEST_S)
    problems = differences(place / "run", whole / "run") if code == 0 else [f"exit code {code}: {start.errors.read_text()}"]
    return {"code": code, "problems": problems, "ok": not problems}


def _alone(directory: Path, hosts: tuple[_Host, _Host]) -> dict:
    """DeepSpeed waits for so many minutes at the start, 30 by default."""
    disk = TinyRuns(directory, 2, train=TRAIN, deepspeed={"config": "zero2"})
    place = disk.place("alone")
    (place / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    [(command, _)] = _deepspeed(hosts[0], 1, _free_port())
    start = _started(place, 0, [*command, "bone_ds", "train", "run.yaml"], hosts[0], {"DEEPSPEED_TIMEOUT": "1"})
    code, said = start.process.wait(LONGEST_S), start.said()
    ok = code == 1 and len(said) == 1 and said[0].startswith("rank 0 has not met the others at the start: ") and "1/2" in said[0]
    return {"code": code, "said": said, "ok": ok and not start.processes() and not start.run.exists()}


@contextmanager
def _two_hosts() -> Iterator[tuple[_Host, _Host]]:
    """Removed in the end, whatever happens."""
    hosts = tuple(_Host(number, f"bone-{os.getpid()}-{number}") for number in range(2))
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", INTERFACE, "netns", hosts[0].namespace, "type", "veth",
            "peer", "name", INTERFACE, "netns", hosts[1].namespace)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{ADDRESSES[host.number]}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _cut(host: _Host) -> Iterator[None]:
    _ip("-n", host.namespace, "link", "set", INTERFACE, "down")
    try:
        yield
    finally:
        _ip("-n", host.namespace, "link", "set", INTERFACE, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
