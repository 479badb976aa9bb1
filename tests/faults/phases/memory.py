"""Memory that runs out: under a limit of the process, and of a control group, where the system kills."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rows import Row

from faults.harness import Harness
from faults.tiny_runs import LONGEST_S, Start, TinyRuns, leaving_nothing

MIB = 2**20
LENGTH = 2000
TRAIN = {"steps": 20, "global_batch_size": 64, "micro_batch_size": 32, "eval_every": 0}
"""A step of 32 rows of so many tokens takes some hundred MiB."""
HEADROOM_BYTES = 100 * MIB
"""What a rank may take beyond what it holds when it has been loaded."""
GROUP_BYTES = 1300 * MIB
"""Of two ranks. They hold about 1.0 GiB before the first step."""
_GROUPS = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))
"""Of version 1 and 2."""
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


def run(harness: Harness) -> list[Row]:
    runs = TinyRuns(harness.work / "memory", train=TRAIN, deepspeed={"config": "zero2"}, data={"max_length": 2 * LENGTH})
    row = {"q": "abcdefgh" * (LENGTH // 8), "a": "abc"}
    runs.rows.write_text("".join(json.dumps(row | {"a": "abc" * number}) + "\n" for number in range(1, 65)))
    for ranks in ((1,),) if harness.quick else ((0, 1), (1,)):
        name = f"memory runs out on rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))}"
        harness.attempt(name, leaving_nothing(partial(_limited, runs, name, ranks)))
    if harness.quick:
        return []
    try:
        with _group("bone-tried"):
            pass
    except OSError as error:
        print(f"memory of a control group: skipped: {error}", flush=True)
    else:
        harness.attempt("memory of a control group is planned with", leaving_nothing(partial(_planned, runs)))
        harness.attempt("memory of a control group runs out", leaving_nothing(partial(_killed, runs)))
    tried = [row for name, row in harness.results.measured.items() if name.startswith("memory")]
    return [Row("memory that ran out and was explained", sum(row["ok"] for row in tried), f"of {len(tried)}", at_least=len(tried))]


def _limited(runs: TinyRuns, name: str, ranks: tuple[int, ...]) -> dict:
    """As by `ulimit -v`, given when the rank has been loaded: the libraries alone map more than any limit of interest."""
    start = Start(runs.place(name.replace(" ", "-")), runs.command)
    while not start.recorded("start"):
        assert start.lives(), start.errors.read_text()
        time.sleep(0.002)
    processes = start.ranks()
    for rank in ranks:
        mapped_bytes = int(Path(f"/proc/{processes[rank]}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(processes[rank], resource.RLIMIT_AS, (mapped_bytes + HEADROOM_BYTES, resource.RLIM_INFINITY))
    code, lines = start.process.wait(LONGEST_S), start.errors.read_text().splitlines()
    ok = (code == 2 and len(lines) == 2 and lines[0].startswith(f"bone-ds: rank {ranks[0]}: memory ran out: ")
          and lines[1].startswith("Planned were ") and " a rank (" in lines[1] and "; with " in lines[1] and " it would take " in lines[1])
    return {"code": code, "said": lines, "ok": ok and not start.processes()}


def _planned(runs: TinyRuns) -> dict:
    """A run that the group has no memory for is refused before it reads the weights, with what would fit."""
    with _group(f"bone-planned-{os.getpid()}") as group:
        start = Start(runs.place("planned"), runs.command, ("sh", "-c", _ENTER, str(group)))
        code, lines = start.process.wait(LONGEST_S), start.errors.read_text().splitlines()
        ok = code == 2 and bool(lines) and "--force" in " ".join(lines) and not start.recorded("start")
        return {"code": code, "said": lines, "ok": ok and not start.processes()}


def _killed(runs: TinyRuns) -> dict:
    with _group(f"bone-killed-{os.getpid()}") as group:
        start = Start(runs.place("killed"), [*runs.command, "--force"], ("sh", "-c", _ENTER, str(group)))
        code, lines = start.process.wait(LONGEST_S), start.errors.read_text().splitlines()
        killed = [line for line in lines if "was killed by signal 9 (SIGKILL), the others were ended" in line]
        ok = code == 137 and len(killed) == 1 and "SIGKILL is what the system sends when memory runs out" in lines[-1]
        return {"code": code, "said": lines, "ok": ok and not start.processes()}


@contextmanager
def _group(name: str) -> Iterator[Path]:
    """A control group of GROUP_BYTES. Raises OSError where this user may make none."""
    parent, limit = next((found for found in _GROUPS if (found[0] / "cgroup.procs").exists()), _GROUPS[-1])
    group = parent / name
    group.mkdir()
    try:
        (group / limit).write_text(str(GROUP_BYTES))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """The system takes a moment to empty it after its processes have ended."""
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
