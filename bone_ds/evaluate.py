"""Held-out loss over all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bone_ds import engine as engines
from bone_ds.data import Samples, collate_chunks, evaluation_units
from bone_ds.engine import Engine
from bone_ds.launch import Ranks


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross entropy over the held-out loss-bearing tokens, in nats."""
    label_tokens: int
    eval_s: float


class HeldOut:
    """The held-out samples, packed and dealt to the ranks once."""

    def __init__(self, samples: Samples, packing: bool, max_length: int, ranks: Ranks, device: torch.device,
                 chunk_length: int | None = None):
        units = evaluation_units(samples, packing, max_length)
        rounds = [units[first:first + ranks.world_size] for first in range(0, len(units), ranks.world_size)]
        # Under ZeRO-3 every rank takes part in every forward: a rank with nothing left runs on empty batches.
        self.batches = []
        for round_ in rounds:
            hands = [[unit] for unit in round_]
            self.batches += collate_chunks(samples, round_[ranks.rank:ranks.rank + 1], device, chunk_length, hands)
        self.device = device

    def evaluate(self, engine: Engine) -> Evaluation:
        started = time.monotonic()
        loss_sum = label_tokens = 0.0
        with engine.evaluating():
            for batch, loss in zip(self.batches, engine.losses(self.batches), strict=True):
                loss_sum += float(loss)
                label_tokens += len(batch.labels)
        loss_sum, label_tokens = engines.total([loss_sum, label_tokens], self.device)
        return Evaluation(loss_sum / label_tokens, int(label_tokens), time.monotonic() - started)
