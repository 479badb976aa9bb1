"""SIGTERM and SIGUSR1 in each phase of a run: to the command, to one rank, to all processes as Slurm does; and twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rows import Row

from faults.harness import Harness
from faults.tiny_runs import LONGEST_S, Start, TinyRuns, leaving_nothing, published, resuming

COMMAND, ONE_RANK, ALL = "the command", "one rank", "all processes"
LOADING, FIRST_EVALUATION, FIRST_STEP, STEP, SAVING, EVALUATING = (
    "loading", "first held-out loss", "first step", "a step", "saving", "evaluating")
SAVES = (FIRST_STEP, STEP, SAVING, EVALUATING)
"""Phases in which there is something to save."""
STOPPED = 75
ENDS_S = 30
"""What torchrun and DeepSpeed's launcher give a rank that they have asked to stop."""
EVERY = 4
TRAIN = {"steps": 16, "global_batch_size": 32, "micro_batch_size": 1, "save_every": EVERY, "eval_every": EVERY, "keep_checkpoints": 1}
"""Steps and held-out losses long enough to be met."""
HELD_OUT_ROWS = 150
AGAIN_S = 1.3
"""Between two signals that are two requests."""


def run(harness: Harness) -> list[Row]:
    runs = TinyRuns(harness.work / "signals", held_out_rows=HELD_OUT_ROWS, train=TRAIN, deepspeed={"config": "zero2"})
    chains = [(number, to) for number in (signal.SIGTERM, signal.SIGUSR1) for to in (COMMAND, ONE_RANK, ALL)]
    phases = (LOADING, FIRST_EVALUATION, *SAVES)
    if harness.quick:
        chains, phases = [(signal.SIGUSR1, ALL)], (FIRST_EVALUATION, SAVING)
    for number, to in chains:
        name = f"{number.name} to {to}"
        harness.attempt(name, leaving_nothing(partial(_chain, runs, name, phases, number, to, harness.draw(name))))
    for to in () if harness.quick else (COMMAND, ONE_RANK, ALL):
        harness.attempt(f"twice to {to}", leaving_nothing(partial(_twice, runs, f"twice to {to}", to)))
    stops = [stop for row in harness.results.measured.values() for stop in row.get("stops", ())]
    ends_s = [stop["ends_s"] for stop in stops]
    return [Row("requests to stop after which all was as it must be", sum(stop["ok"] for stop in stops), f"of {len(stops)}",
                at_least=len(stops)),
            Row("from the request until no process was left, at most", max(ends_s, default=0.0), "s", at_most=ENDS_S)]


def _chain(runs: TinyRuns, name: str, phases: tuple[str, ...], number: signal.Signals, to: str, draw: random.Random) -> dict:
    """One run that is asked to stop once in each phase, and gone on with each time."""
    runs.whole()
    place, stops = runs.place(name.replace(" ", "-")), []
    for phase in phases:
        start = Start(place, [*runs.command, *resuming(place)])
        process = _comes_to(phase, start, draw)
        at = time.monotonic()
        _send(number, _receivers(start, to, draw))
        if process:
            os.kill(process, signal.SIGCONT)
        stops.append({"phase": phase} | _has_stopped(start, phase, at))
    differ = runs.goes_on(place)
    return {"stops": stops, "differences": differ, "ok": not differ and all(stop["ok"] for stop in stops)}


def _comes_to(phase: str, start: Start, draw: random.Random) -> int | None:
    """Returns when the phase goes on; in saving with the process that is held in it."""
    if phase == LOADING:
        _until(lambda: len(start.ranks()) == 2, start)
        time.sleep(draw.uniform(1, 3))
        assert not start.recorded("start"), "it had begun before it was to be stopped"
    elif phase == FIRST_EVALUATION:
        _until(lambda: start.recorded("start"), start)
    elif phase == FIRST_STEP:
        _until(lambda: start.recorded("eval"), start)
        time.sleep(0.05)  # the next held-out loss comes after the step
    elif phase == STEP:
        _until(lambda: start.last("step") > 0 and start.last("step") % EVERY, start)
        time.sleep(draw.uniform(0, 0.1))
    elif phase == EVALUATING:
        _until(lambda: start.last("step") % EVERY == 0 and start.last("eval") < start.last("step"), start)
    else:
        return _held_while_saving(start)
    return None


def _held_while_saving(start: Start) -> int:
    """Stops rank 0 within the writing of a checkpoint."""
    _until(lambda: start.recorded("start"), start)
    writer = start.ranks()[0]
    while True:
        _until(lambda: _is_saving(start.run), start, pause_s=0.0005)
        os.kill(writer, signal.SIGSTOP)
        time.sleep(0.01)
        if _is_saving(start.run):
            return writer
        os.kill(writer, signal.SIGCONT)


def _is_saving(run: Path) -> bool:
    try:
        return any(name.endswith(".partial") for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def _until(condition: Callable[[], object], start: Start, pause_s: float = 0.005) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert start.lives() and time.monotonic() < deadline, f"never came to it: {start.errors.read_text()}"
        time.sleep(pause_s)


def _receivers(start: Start, to: str, draw: random.Random) -> list[int]:
    ranks = start.ranks()
    return {COMMAND: [start.process.pid], ONE_RANK: [ranks[draw.choice(sorted(ranks))]],
            ALL: [start.process.pid, *ranks.values()]}[to]


def _send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        os.kill(process, number)


def _has_stopped(start: Start, phase: str, asked_at: float) -> dict:
    """The row of one request: what it led to, and what of that is not as the documentation has it."""
    code = start.process.wait(LONGEST_S)
    ends_s = time.monotonic() - asked_at
    stop, last = start.recorded("stop"), start.last("step")
    problems = [] if code == STOPPED else [f"exit code {code}"]
    if left := start.processes():
        problems.append(f"processes are left: {sorted(left)}")
    if said := start.said():
        problems.append(f"said {said}")
    if ends_s > ENDS_S:
        problems.append(f"ended after {ends_s:.0f} s")
    if phase in SAVES and [event["step"] for event in stop] + published(start.place) != [last, last]:
        problems.append(f"after step {last} it stopped as {stop}, with checkpoints {published(start.place)}")
    if phase not in SAVES and (stop or last >= 0 or start.recorded("checkpoint")):
        problems.append(f"there was nothing to save, but {stop}, step {last}")
    return {"ends_s": round(ends_s, 2), "code": code, "step": last, "problems": problems, "ok": not problems}


def _twice(runs: TinyRuns, name: str, to: str) -> dict:
    """Within a step that can't be finished, as its other rank is held."""
    runs.whole()
    place = runs.place(name.replace(" ", "-"))
    start = Start(place, runs.command)
    _until(lambda: start.last("step") >= EVERY, start)
    ranks = start.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    receivers = {COMMAND: [start.process.pid], ONE_RANK: [ranks[0]], ALL: [start.process.pid, *ranks.values()]}[to]
    _send(signal.SIGTERM, receivers)
    time.sleep(AGAIN_S)
    lived = start.lives()
    _send(signal.SIGUSR1, receivers)
    again_at = time.monotonic()
    code = start.process.wait(LONGEST_S)
    ends_s = time.monotonic() - again_at
    ok = lived and code == 128 + signal.SIGUSR1 and not start.processes() and ends_s < ENDS_S and not start.recorded("stop")
    found = {"ends_s": round(ends_s, 2), "code": code, "said": start.said()}
    differ = runs.goes_on(place)
    return found | {"differences": differ, "ok": ok and not differ}
