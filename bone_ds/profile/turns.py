"""The variants take turns, each in fresh processes, so that a machine that slows down slows all of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bone_ds import launch
from bone_ds.config import dump_yaml
from bone_ds.errors import USER_ERROR
from bone_ds.profile import measurement
from bone_ds.profile.measurement import Failure, Measurement
from bone_ds.profile.variants import Variant

_TOLD_TO_END = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))


@dataclass(frozen=True)
class Result:
    variant: Variant
    turns: list[Measurement]
    """The first has been measured with instruments too; empty where it failed."""
    failure: Failure | None = None


class Stopped(Exception):
    """A worker ended as `code` says; it has told why."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def measure(variants: list[Variant], world_size: int, steps: int, turns: int, directory: Path, say: Callable[[str], None]) -> list[Result]:
    """Writes configs/ and turns/ into the directory. A variant that fails is left out of later turns.

    Raises Stopped where a worker refuses its config, or where this process was told to end.
    """
    for name in ("configs", "turns"):
        (directory / name).mkdir(parents=True)
    for variant in variants:
        (directory / "configs" / f"{variant.file_name}.yaml").write_text(dump_yaml(variant.config), encoding="utf-8")
    results = {variant.name: Result(variant, []) for variant in variants}
    for turn in range(turns):
        # Back and forth: what drifts over the turns falls on the first and the last alike.
        for variant in variants if turn % 2 == 0 else reversed(variants):
            result = results[variant.name]
            if result.failure:
                continue
            started = time.monotonic()
            found = _turn(variant, turn, world_size, steps, directory)
            if isinstance(found, Failure):
                results[variant.name] = Result(variant, [], found)
            else:
                result.turns.append(found)
            say(f"turn {turn + 1}/{turns}  {variant.name}: {_outcome(found, turn)}  ({time.monotonic() - started:.0f} s)")
    return list(results.values())


def _outcome(found: Measurement | Failure, turn: int) -> str:
    if isinstance(found, Failure):
        return found.reason
    step = f"{min(step.total_s for step in found.steps):.3g} s a step"
    return f"{step}, timed alone: it ended in the steps with instruments" if turn == 0 and found.memory is None else step


def _turn(variant: Variant, turn: int, world_size: int, steps: int, directory: Path) -> Measurement | Failure:
    out = (directory / "turns" / f"{variant.file_name}-{turn + 1}.json").absolute()
    config = directory / "configs" / f"{variant.file_name}.yaml"
    arguments = ["profile", str(config), "--worker", str(out), "--steps", str(steps), *(["--timing-only"] if turn else [])]
    code = launch.start(arguments, world_size)
    if code == USER_ERROR or code in _TOLD_TO_END:
        raise Stopped(code)
    if out.exists():
        return measurement.read(out)
    if code == 0:
        raise Stopped(1)
    if code == launch.KILLED:
        return Failure("does not fit: the system killed it, as it does when memory runs out")
    return Failure(f"ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}")
