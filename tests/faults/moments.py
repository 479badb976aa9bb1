"""A start of a run as it goes, and the moments at which it can be killed."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

from started import Started

LONGEST_S = 900
"""That anything may take before it counts as hung."""
_ASIDE = re.compile(r"step-(\d+)\.partial")


class Watch:
    """What one start has recorded so far."""

    def __init__(self, started: Started):
        """As soon as it has been started."""
        self.started = started
        self.events, self.checkpoints = started.run / "events.jsonl", started.run / "checkpoints"
        self._offset = self.events.stat().st_size if self.events.exists() else 0
        self.start: dict | None = None
        """Its `start` event: with it all ranks are there, and what an earlier start left unfinished is gone."""
        self._ranks: dict[int, int] = {}
        self.step = self.saved = 0
        """The last step and the last checkpoint that it has recorded."""
        self.step_s, self.write_s = 0.02, 0.05
        """What the last ones took."""
        self.begun = 0
        """The step of the last checkpoint of which something was seen on the disk."""

    def look(self) -> None:
        if self.events.exists():
            with self.events.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + newline)
            for line in whole.splitlines():
                self._take(line)
        if self.start:
            self.begun = max(self.begun, _aside(self.checkpoints))

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:  # the end of a line that the start before it left torn
            return
        if event["event"] == "start":
            self.start, self._ranks = event, self.started.ranks()
        elif event["event"] == "step":
            self.step, self.step_s = event["step"], event["step_s"]
        elif event["event"] == "checkpoint":
            self.saved, self.write_s = event["step"], event["write_s"]

    def is_saving(self) -> bool:
        """From when a checkpoint's files are begun to when all is done, the adapter copied and older ones removed."""
        return self.begun > self.saved

    def ranks(self) -> dict[int, int]:
        """Rank -> process id."""
        return self._ranks or self.started.ranks()

    def lives(self) -> bool:
        return self.started.process.poll() is None

    def until(self, condition: Callable[[], bool], pause_s: float) -> bool:
        """Whether it comes to that before the run ends."""
        deadline = time.monotonic() + LONGEST_S
        while self.lives():
            self.look()
            if condition():
                return True
            assert time.monotonic() < deadline, f"{self.started.run}: hangs after step {self.step}"
            time.sleep(pause_s)
        return False


def _aside(checkpoints: Path) -> int:
    """The step of the checkpoint that is being written; 0 where none is."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _ASIDE.fullmatch(name))), default=0)


def starting(watch: Watch, draw: random.Random, takes_s: float) -> bool:
    """Somewhere before the first step. takes_s: how long that is."""
    until = time.monotonic() + draw.uniform(0, takes_s)
    return watch.until(lambda: time.monotonic() > until, pause_s=0.01)


def stepping(watch: Watch, draw: random.Random, after: int) -> bool:
    """Somewhere in the steps that follow the given one."""
    return watch.until(lambda: watch.step >= after, pause_s=0.004) and _pass(watch, draw.uniform(0, 2 * watch.step_s))


def saving(watch: Watch, draw: random.Random, after: int) -> bool:
    """Within the writing of a checkpoint after the given step."""
    while watch.until(lambda: watch.step >= after and watch.is_saving(), pause_s=0.001):
        if not _pass(watch, draw.uniform(0, watch.write_s)):
            return False
        watch.look()
        if watch.is_saving():
            return True
    return False


def _pass(watch: Watch, seconds: float) -> bool:
    time.sleep(seconds)
    return watch.lives()
