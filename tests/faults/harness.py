"""What a part of the harness is given: where faults are tried, how many, from which seed, until when, and where their rows go."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rows import Results

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")
"""Whose versions are written down."""


class SkippedError(Exception):
    """Raised by a part that can't be tried on this machine; its text says why."""


@dataclass(frozen=True)
class Harness:
    results: Results
    work: Path
    """An empty directory, removed afterwards unless an attempt failed."""
    seed: int
    count: int | None
    """How many faults to try; None is the part's own number."""
    quick: bool
    """The short form."""
    deadline: float
    """By `time.monotonic()`: no attempt is begun after it."""

    def draw(self, name: str) -> random.Random:
        """Random choices of an attempt: alike in every start of this seed, whichever attempts went before."""
        return random.Random(f"{self.seed} {name}")

    def attempt(self, name: str, fault: Callable[[], dict]) -> dict | None:
        """Tries one fault and writes its row, unless that is there from an earlier start; returns the row, None where the time is up.

        fault: returns what it found as JSON, with `ok`. What it raises, an AssertionError above all, makes a row that is not ok.
        """
        if name not in self.results.measured and time.monotonic() > self.deadline:
            return None
        return self.results.once(name, lambda: _tried(fault))

    @property
    def failed(self) -> list[str]:
        """Names of attempts."""
        return [name for name, row in self.results.measured.items() if not row["ok"]]


def short_form(work: Path) -> Harness:
    """For the test suite: a few faults of each kind, whose rows go nowhere."""
    return Harness(Results(None, {}, PACKAGES, fresh=False, quick=True), work, seed=0, count=None, quick=True, deadline=math.inf)


def _tried(fault: Callable[[], dict]) -> dict:
    started = time.monotonic()
    try:
        row = fault()
    except Exception as error:
        traceback.print_exc()
        row = {"ok": False, "why": "".join(traceback.format_exception_only(error)).strip()}
    return row | {"seconds": round(time.monotonic() - started, 1)}
