"""What rank 0 shows while it trains: one line a step, rewritten in place on a terminal; all of it kept in the log.

What the packages log under the name `bone_ds` is shown and kept with it.
"""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import time
from logging.handlers import MemoryHandler
from pathlib import Path

import torch

from bone_ds import publishing

GIB = 1024**3


def peak_memory_gib() -> float:
    """High-water memory of this process: allocated on the GPU, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def hold_log_lines() -> None:
    """Keeps what the packages log from now on for the Progress that is to show it."""
    logging.getLogger("bone_ds").handlers = [MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)]


class Progress:
    """Silent on every rank but the first."""

    def __init__(self, log: Path | None, steps: int, first_step: int = 0):
        """log: the file that keeps every line, or None for a rank that shows nothing."""
        self.log, self.steps, self.first_step = log, steps, first_step
        self.started = time.monotonic()
        self.in_place = log is not None and sys.stdout.isatty()
        self.open_line = False
        logger, lines = logging.getLogger("bone_ds"), _Lines(self)
        for record in [record for handler in logger.handlers if isinstance(handler, MemoryHandler) for record in handler.buffer]:
            lines.handle(record)
        logger.handlers = [lines]

    def step(self, step: int, loss: float, learning_rate: float, grad_norm: float, rates: tuple[float, float, float]) -> None:
        """rates: positions, tokens and loss-bearing tokens per second."""
        positions, tokens, label_tokens = rates
        done = step - self.first_step
        left = (time.monotonic() - self.started) / done * (self.steps - step)
        self._show(
            f"step {step}/{self.steps}  loss {loss:.4f}  lr {learning_rate:.2e}  grad {grad_norm:.3f}  {_clock(left)} left  "
            f"{peak_memory_gib():.2f} GiB  tok/s {positions:.0f} all  {tokens:.0f} real  {label_tokens:.0f} loss",
            in_place=self.in_place)

    def say(self, line: str) -> None:
        self._show(line, in_place=False)

    def _show(self, line: str, in_place: bool) -> None:
        if self.log is None:
            return
        if in_place:
            print(f"\r\x1b[K{_within(line, shutil.get_terminal_size().columns - 1)}", end="", flush=True)
        else:
            print(("\n" if self.open_line else "") + line, flush=True)
        self.open_line = in_place
        with publishing.writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class _Lines(logging.Handler):
    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say(record.getMessage())


def _within(line: str, columns: int) -> str:
    """The first of the line's fields, which two spaces part, that fit: a line that wraps could not be rewritten."""
    while len(line) > columns and "  " in line:
        line = line.rpartition("  ")[0]
    return line[:columns]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
