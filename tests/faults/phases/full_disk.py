"""A full disk, at the start of a run or in the middle: one line, exit code 2, what was saved is whole, and the run goes on later."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rows import Row
from started import ROOT

from faults.equality import differences
from faults.harness import Harness
from faults.tiny_runs import LONGEST_S, Start, TinyRuns, leaving_nothing, published

EVERY = 20
TRAIN = {"steps": 2 * EVERY, "global_batch_size": 8, "save_every": EVERY, "eval_every": EVERY, "keep_checkpoints": 1}
PAGE_BYTES = 4096
DISK_BYTES = 2**22
ZERO2 = ROOT / "ds_configs" / "zero2.json"
FULL = "No space left on device"


@dataclass(frozen=True)
class _Case:
    name: str
    told: tuple[str, ...]
    """One of them is in the line that says what could not be written."""
    left_bytes: Callable[[Path], int] = lambda run: 0
    """By the run directory: what is left of the disk once it is filled."""
    from_the_start: bool = False
    """Else after the first checkpoint."""
    run_is_there: bool = True
    """The run directory lies on this disk."""
    within: Sequence[str] = ()
    train: dict = field(default_factory=dict)
    monitors: dict = field(default_factory=dict)
    saved: tuple[int, ...] = (EVERY,)


CASES = (
    _Case("at the start", ("run/",), from_the_start=True, saved=()),
    _Case("while a checkpoint is written", ("checkpoints/step-00000040.partial",), left_bytes=lambda run: 10 * PAGE_BYTES),
    _Case("while a checkpoint is written beside the steps", ("checkpoints/step-00000040.partial",), left_bytes=lambda run: 10 * PAGE_BYTES,
          train={"async_save": True}),
    _Case("while events are written", ("run/events.jsonl", "run/log.txt")),
    _Case("of the monitors", ("disk",), from_the_start=True, run_is_there=False, saved=(),
          monitors={"csv_monitor": {"enabled": True, "output_path": "disk"}}),
    _Case("of the output", ("output of this command",), run_is_there=False, within=("sh", "-c", 'exec "$@" > disk/printed.txt', "sh")),
)


def run(harness: Harness) -> list[Row]:
    if reason := _no_disk(harness.work / "tried"):
        print(f"full disk: skipped: {reason}", flush=True)
        return []
    runs = TinyRuns(harness.work / "full-disk", train=TRAIN, deepspeed={"config": "zero2"})
    for case in CASES[1:2] if harness.quick else CASES:
        harness.attempt(f"disk full {case.name}", leaving_nothing(partial(_fails_and_goes_on, runs, case)))
    if not harness.quick:
        harness.attempt("disk full but for one checkpoint more than are kept", leaving_nothing(partial(_has_just_enough, runs)))
        without_a_cache = partial(_goes_on_without_a_cache, harness.work / "cache")
        harness.attempt("disk full where tokenised data is kept", leaving_nothing(without_a_cache))
    tried = [row for name, row in harness.results.measured.items() if name.startswith("disk full")]
    return [Row("full disks after which all was as it must be", sum(row["ok"] for row in tried), f"of {len(tried)}", at_least=len(tried))]


def _fails_and_goes_on(runs: TinyRuns, case: _Case) -> dict:
    runs.whole()
    place = runs.place(case.name.replace(" ", "-"), train=case.train, deepspeed={"config": "zero2.json"})
    (place / "zero2.json").write_text(json.dumps(json.loads(ZERO2.read_text()) | case.monitors))
    with _disk(place / "disk") as disk:
        if case.run_is_there:
            (disk / "run").mkdir()
            (place / "run").symlink_to("disk/run")
        start = _fails(runs, place, disk, case)
        found = {"said": start.said(), "saved": published(place), "problems": _problems(start, case)}
        (disk / "filler").unlink()
        differ = runs.goes_on(place, within=case.within)
        return found | {"differences": differ, "ok": not differ and not found["problems"]}


def _has_just_enough(runs: TinyRuns) -> dict:
    """What is no longer kept makes room for the adapter's copy."""
    whole, place = runs.whole(), runs.place("just-enough")
    with _disk(place / "disk") as disk:
        (disk / "run").mkdir()
        (place / "run").symlink_to("disk/run")
        start = Start(place, runs.command)
        while start.lives() and not start.recorded("checkpoint"):
            time.sleep(0.005)
        _fill(disk, _taken_bytes(start.run / f"checkpoints/step-{EVERY:08d}") + 4 * PAGE_BYTES)
        code = start.process.wait(LONGEST_S)
        differ = differences(place / "run", whole / "run") if code == 0 else []
        return {"code": code, "said": start.said(), "differences": differ, "ok": code == 0 and not differ}


def _fails(runs: TinyRuns, place: Path, disk: Path, case: _Case) -> Start:
    if case.from_the_start:
        _fill(disk, case.left_bytes(place / "run"))
    start = Start(place, runs.command, case.within)
    if not case.from_the_start:
        while start.lives() and not start.recorded("checkpoint"):
            time.sleep(0.005)
        _fill(disk, case.left_bytes(place / "run"))
    start.process.wait(LONGEST_S)
    return start


def _problems(start: Start, case: _Case) -> list[str]:
    """What of its end is not as the documentation has it."""
    code, lines, saved = start.process.returncode, start.errors.read_text().splitlines(), published(start.place)
    problems = [] if code == 2 else [f"exit code {code}"]
    if len(lines) != 1 or FULL not in lines[0] or not any(name in lines[0] for name in case.told):
        problems.append(f"said {lines}")
    if tuple(saved[-1:]) != case.saved[-1:]:
        problems.append(f"checkpoints {saved}")
    if left := start.processes():
        problems.append(f"processes are left: {sorted(left)}")
    return problems + [f"{path.name} is left" for path in start.run.rglob("*.partial")]


def _goes_on_without_a_cache(directory: Path) -> dict:
    """What is tokenised can be tokenised again: a warning is enough."""
    runs = TinyRuns(directory, rows=40_000, train=TRAIN | {"steps": 2}, deepspeed={"config": "zero2"})
    place = runs.place("run-without", model={"cache_dir": "disk"})
    with _disk(place / "disk") as disk:
        _fill(disk, 10 * PAGE_BYTES)
        start = Start(place, runs.command)
        code = start.process.wait(LONGEST_S)
        said = [line for line in start.printed.read_text().splitlines() if "can't be kept" in line]
        return {"said": said, "code": code, "ok": code == 0 and bool(said) and not any(path.is_dir() for path in disk.glob("tokens/*"))}


def _no_disk(directory: Path) -> str | None:
    """Why this user has no disk of its own here."""
    try:
        with _disk(directory):
            return None
    except OSError as error:
        return str(error)


@contextmanager
def _disk(directory: Path) -> Iterator[Path]:
    """A small tmpfs. Raises OSError where this user may mount none."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", directory], capture_output=True, text=True)
    if mounted.returncode:
        raise OSError(mounted.stderr.strip())
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def _fill(disk: Path, left_bytes: int) -> None:
    """Leaves so much of the disk free, in whole pages; less where the run takes it meanwhile."""
    free = os.statvfs(disk)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        file.write(bytes(free.f_bavail * free.f_frsize - left_bytes // PAGE_BYTES * PAGE_BYTES))


def _taken_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())
