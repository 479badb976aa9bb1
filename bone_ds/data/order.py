"""Which samples an optimizer step sees: a pure function of the samples, the config and the seed.

The plan is global. Ranks only differ in which part of a window they are dealt, so the world size changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from bone_ds.data.packing import pack
from bone_ds.data.samples import Part, Samples
from bone_ds.errors import ConfigError

Unit = list[int]
"""Indices of the samples in one pack; a single one without packing."""


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees, over all ranks."""

    units: list[Unit]
    """global_batch_size of them; fewer in the last step of an epoch."""
    unit_tokens: list[int]
    label_tokens: int
    """Loss-bearing tokens of the whole window: what the step's summed loss is divided by."""
    epoch: int
    """From 0."""


@dataclass(frozen=True)
class Hand:
    """What one rank runs in one forward pass."""

    units: list[Unit]
    """micro_batch_size of them; fewer, or none, in a partial window."""
    all_units: list[list[Unit]]
    """By rank: what each runs at the same time."""


@dataclass(frozen=True)
class _Epoch:
    number: int
    units: list[Unit]


class GlobalOrder:
    """The windows of every epoch. Each epoch has every sample once, in an order of its own; of a mixture see `_drawn`."""

    def __init__(self, samples: Samples, packing: bool, max_length: int, global_batch_size: int, seed: int):
        """Raises ConfigError where a source's weight is too small for a single sample."""
        self._parts = samples.parts
        self.epoch_counts = shares(samples.parts)
        self._lengths, self._label_counts = samples.lengths, samples.label_counts
        self._packing, self._max_length = packing, max_length
        self._global_batch_size, self._seed = global_batch_size, seed
        self._ends = [0]  # optimizer steps before epoch i; an epoch is planned to know how many packs it has
        self._current = self._plan(0)
        self._ends.append(self._steps(self._current))

    def window(self, step: int) -> Window:
        """step: optimizer step from 0."""
        assert step >= 0
        epoch = self._epoch_of(step)
        first = (step - self._ends[epoch.number]) * self._global_batch_size
        units = epoch.units[first:first + self._global_batch_size]
        tokens = [int(self._lengths[unit].sum()) for unit in units]
        labels = int(sum(self._label_counts[unit].sum() for unit in units))
        return Window(units, tokens, labels, epoch.number)

    def steps_in_epochs(self, epochs: int) -> int:
        """Optimizer steps in the first so many epochs. Packs are drawn anew, so epochs may differ by a step."""
        while len(self._ends) <= epochs:
            self._plan_next()
        return self._ends[epochs]

    def _epoch_of(self, step: int) -> _Epoch:
        while step >= self._ends[-1]:
            self._plan_next()
        number = int(np.searchsorted(self._ends, step, side="right")) - 1
        if self._current.number != number:
            self._current = self._plan(number)
        return self._current

    def _plan_next(self) -> None:
        self._current = self._plan(len(self._ends) - 1)
        self._ends.append(self._ends[-1] + self._steps(self._current))

    def _plan(self, epoch: int) -> _Epoch:
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        samples = generator.permutation(self._drawn(epoch))
        if not self._packing:
            return _Epoch(epoch, [[index] for index in samples.tolist()])
        packs = pack(self._lengths[samples], self._max_length)
        # shuffled once more: best fit leaves the packs that found no filling at the end
        return _Epoch(epoch, [samples[packs[number]].tolist() for number in generator.permutation(len(packs))])

    def _drawn(self, epoch: int) -> np.ndarray:
        """The samples of an epoch. Of a mixture, each source goes through its samples again and again, every time in a new order, and an
        epoch goes on where the one before stopped: after any epoch, how often two samples of a source were seen differs by one at most.
        """
        if not self.epoch_counts:
            return np.arange(len(self._lengths))
        drawn, first = [], 0
        for number, (part, count) in enumerate(zip(self._parts, self.epoch_counts, strict=True)):
            for round_ in range(epoch * count // part.count, -(-(epoch + 1) * count // part.count)):
                # the last number keeps these apart from an epoch's own
                shuffled = np.random.Generator(np.random.PCG64([self._seed, number, round_, 1])).permutation(part.count)
                start, end = (bound - round_ * part.count for bound in (epoch * count, (epoch + 1) * count))
                drawn.append(first + shuffled[max(0, start):max(0, end)])
            first += part.count
        return np.concatenate(drawn)

    def _steps(self, epoch: _Epoch) -> int:
        return -(-len(epoch.units) // self._global_batch_size)


def shares(parts: Sequence[Part]) -> list[int]:
    """How many samples of each source an epoch of a mixture has; none where the sources have no weights.

    An epoch has as many as there are in all sources together, shared out by weight: whole numbers first, then one each to the largest
    remainders. Raises ConfigError for a source that gets none.
    """
    if any(part.weight is None for part in parts):
        return []
    total, weights = sum(part.count for part in parts), [Fraction(part.weight) for part in parts]
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[:total - sum(counts)]:
        counts[number] += 1
    for part, count in zip(parts, counts, strict=True):
        if not count:
            raise ConfigError(f"data.mixture: {part.name}: weight {part.weight} is less than one of the {total} samples of an epoch; "
                              "raise it, or remove the source")
    return counts


def deal(window: Window, rank: int, world_size: int, micro_batch_size: int, global_batch_size: int) -> list[Hand]:
    """The micro-batches of one rank, the same number on every rank; in a partial window some are short or empty.

    The longest units come first and each round of micro-batches has units of about one length, so ranks wait little for
    each other and a device that is too small shows it in the first step. Raises ConfigError where the batch doesn't divide.
    """
    units_per_round = micro_batch_size * world_size
    if global_batch_size % units_per_round:
        raise ConfigError(f"train.global_batch_size: {global_batch_size} is no multiple of train.micro_batch_size "
                          f"{micro_batch_size} x {world_size} ranks; take a multiple of {units_per_round}")
    ranked = sorted(range(len(window.units)), key=window.unit_tokens.__getitem__, reverse=True)
    rounds = [ranked[start:start + units_per_round] for start in range(0, len(ranked), units_per_round)]
    return [_hand(window, round_, rank, world_size) for round_ in rounds]


def _hand(window: Window, round_: list[int], rank: int, world_size: int) -> Hand:
    """Every other turn goes backwards over the ranks, as teams are picked: that evens out the lengths."""
    hands: list[list[Unit]] = [[] for _ in range(world_size)]
    for turn, number in enumerate(round_):
        lap, seat = divmod(turn, world_size)
        hands[seat if lap % 2 == 0 else world_size - 1 - seat].append(window.units[number])
    return Hand(hands[rank], hands)


def evaluation_units(samples: Samples, packing: bool, max_length: int) -> list[Unit]:
    """Every sample once, in the order of the file as far as packing allows."""
    if packing:
        return pack(samples.lengths, max_length)
    return [[index] for index in range(len(samples))]
