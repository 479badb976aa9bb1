"""An engine whose forward, backward and update are clocked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from bone_ds.arch import Batch
from bone_ds.engine import Engine

PREFIX = "bone_ds: "
"""Of the ranges that a profiler sees."""


@dataclass(frozen=True)
class Span:
    part: str
    start_s: float
    """time.monotonic()"""
    end_s: float


class ClockedEngine:
    """Stands in for an Engine in `optimizer_step`. A GPU's work is awaited at the end of every part."""

    def __init__(self, engine: Engine, device: torch.device):
        self._engine, self._device = engine, device
        self.world_size = engine.world_size
        self.spans: list[Span] = []

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        losses = self._engine.losses(batches)
        for _ in batches:
            with self._clocked("forward"):
                loss = next(losses)
            yield loss
        losses.close()

    def backward(self, loss: Tensor, boundary: bool) -> None:
        with self._clocked("backward"):
            self._engine.backward(loss, boundary)

    def update(self, learning_rate: float) -> float:
        with self._clocked("optimizer"):
            return self._engine.update(learning_rate)

    def seconds(self, part: str) -> float:
        return sum(span.end_s - span.start_s for span in self.spans if span.part == part)

    @contextmanager
    def _clocked(self, part: str) -> Iterator[None]:
        start_s = time.monotonic()
        with record_function(PREFIX + part):
            yield
            wait(self._device)
        self.spans.append(Span(part, start_s, time.monotonic()))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
