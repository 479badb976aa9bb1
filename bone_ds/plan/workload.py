"""Which batches a run goes over: how many steps, and the micro-batch that needs most memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np

from bone_ds.config import DataConfig, RunConfig
from bone_ds.data import GlobalOrder, Part, Samples, collate_chunks, deal
from bone_ds.data.order import Unit, Window
from bone_ds.errors import DataError
from bone_ds.plan.report import Workload
from bone_ds.plan.trace import Shape

_MOST_UNITS = 20_000
"""Packs (samples without packing) that are looked through for the heaviest micro-batch."""
_STATE_TOKENS = 16
"""So many tokens weigh what the state of one more document does, in RWKV6 of all published sizes."""


@dataclass(frozen=True)
class Heaviest:
    shape: Shape
    """A first micro-batch of a step, which is dealt the longest units, or one as heavy."""
    later_tokens: int
    """The most tokens of one that follows in a step, when gradients of those before it are there."""
    later_label_tokens: int

    @property
    def later(self) -> tuple[float, float]:
        """Shares of the shape's tokens and of its label tokens, which may be fewer."""
        return self.later_tokens / self.shape.tokens, self.later_label_tokens / max(1, self.shape.label_tokens)


def order_of(config: RunConfig, samples: Samples) -> GlobalOrder:
    data, train = config.data, config.train
    return GlobalOrder(samples, data.packing, data.max_length, train.global_batch_size, train.seed)


def of_samples(config: RunConfig, world_size: int, samples: Samples, order: GlobalOrder, carries_state: bool) -> tuple[Workload, Heaviest]:
    """The workload, and the heaviest micro-batch of all ranks: evaluation keeps nothing for backward and needs less.

    carries_state: the model holds a state for every document.
    """
    train = config.train
    document_tokens = _STATE_TOKENS if carries_state else 0
    steps = train.steps or order.steps_in_epochs(train.epochs or 1)
    windows = [order.window(step) for step in range(min(steps, -(-_MOST_UNITS // train.global_batch_size)))]
    firsts, laters = [], []
    for is_first, shape in _shapes(config, world_size, samples, windows):
        (firsts if is_first else laters).append(shape)
    later = max((shape.tokens for shape in laters), default=0), max((shape.label_tokens for shape in laters), default=0)
    heaviest = Heaviest(_heaviest(firsts, document_tokens), *later)
    if heaviest.later_tokens > heaviest.shape.tokens:
        heaviest = replace(heaviest, shape=_heaviest(firsts + laters, document_tokens))
    tokens = sum(sum(window.unit_tokens) for window in windows) / len(windows)
    labels = sum(window.label_tokens for window in windows) / len(windows)
    return Workload(steps, round(tokens, 1), round(labels, 1), asdict(samples.report), described(heaviest.shape)), heaviest


def assumed(config: RunConfig) -> tuple[Workload, Heaviest]:
    """Without data: full packs of one document each, every token but the first of each learnt."""
    train, data = config.train, config.data
    lengths = (train.chunk_length,) if train.chunk_length else (data.max_length,) * train.micro_batch_size
    shape = Shape(lengths, sum(lengths) - len(lengths), continues=bool(train.chunk_length))
    tokens = train.global_batch_size * data.max_length
    work = Workload(train.steps, float(tokens), float(tokens - train.global_batch_size), None, described(shape))
    return work, Heaviest(shape, shape.tokens, shape.label_tokens)


def cut(samples: Samples, data: DataConfig) -> Samples:
    """The samples as a smaller data.max_length leaves them.

    Pieces of a split document count as its first alone. Raises DataError where none is left.
    """
    places = np.arange(len(samples.tokens)) - np.repeat(samples.offsets[:-1], samples.lengths)
    remains = places < data.max_length
    learnt = samples.learnt & remains
    kept = samples.lengths <= data.max_length if data.overlong_rule == "drop" else replace(samples, learnt=learnt).label_counts > 0
    if not kept.any():
        raise DataError(f"data.max_length: {data.max_length} leaves no sample")
    chosen = remains & np.repeat(kept, samples.lengths)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(samples.lengths, data.max_length)[kept])])
    return replace(samples, tokens=samples.tokens[chosen], learnt=samples.learnt[chosen], offsets=offsets, parts=_parts_of(samples, kept),
                   rows=None)


def _parts_of(samples: Samples, kept: np.ndarray) -> tuple[Part, ...]:
    """With as many samples as are kept of each; a source of which none is kept is left out."""
    ends = np.cumsum([0, *(part.count for part in samples.parts)])
    counts = [int(kept[start:end].sum()) for start, end in pairwise(ends)]
    return tuple(replace(part, count=count) for part, count in zip(samples.parts, counts, strict=True) if count)


def described(shape: Shape) -> dict[str, int]:
    return {"tokens": shape.tokens, "documents": len(shape.document_lengths), "label_tokens": shape.label_tokens}


def _shapes(config: RunConfig, world_size: int, samples: Samples, windows: list[Window]) -> Iterator[tuple[bool, Shape]]:
    """Of every rank's micro-batches in each window, and whether it is the step's first."""
    train = config.train
    lengths, label_counts = samples.lengths, samples.label_counts
    for window in windows:
        for rank in range(world_size):
            hands = deal(window, rank, world_size, train.micro_batch_size, train.global_batch_size)
            for number, hand in enumerate(hands):
                if train.chunk_length:
                    for place, shape in enumerate(_chunks(samples, hand.units, train.chunk_length)):
                        yield number + place == 0, shape
                elif hand.units:
                    indices = np.concatenate(hand.units)
                    yield number == 0, Shape(tuple(lengths[indices].tolist()), int(label_counts[indices].sum()))


def _chunks(samples: Samples, units: list[Unit], chunk_length: int) -> Iterator[Shape]:
    for batch in collate_chunks(samples, units, "cpu", chunk_length, [units]):
        yield Shape(batch.document_lengths, len(batch.labels), continues=True)


def _heaviest(shapes: list[Shape], document_tokens: int) -> Shape:
    """The longest, with the most labels that any of nearly its length has: both need memory, and one forward is to show it."""
    longest = max(shapes, key=lambda shape: (shape.tokens + document_tokens * len(shape.document_lengths), shape.label_tokens))
    labels = max(shape.label_tokens for shape in shapes if shape.tokens >= 0.95 * longest.tokens)
    return replace(longest, label_tokens=labels)
