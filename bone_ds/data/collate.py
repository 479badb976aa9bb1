"""Samples to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from bone_ds.arch import Batch
from bone_ds.data.samples import Samples


def collate(samples: Samples, units: Sequence[Sequence[int]], device: torch.device | str) -> Batch:
    """Documents end to end, without padding; a sample is a document.

    No units: one EOS token and no label, so that an idle rank still runs forward and backward with the others.
    """
    indices = [index for unit in units for index in unit]
    documents = [samples[index] for index in indices] or [np.array([samples.eos_token_id])]
    tokens = np.concatenate(documents).astype(np.int64)
    lengths = tuple(len(document) for document in documents)
    learnt = np.flatnonzero(np.concatenate([samples.learnt_of(index) for index in indices])) if indices else np.empty(0, np.int64)
    return Batch(
        tokens=torch.from_numpy(tokens).unsqueeze(0).to(device),
        document_lengths=lengths,
        label_positions=torch.from_numpy(learnt - 1).to(device),
        labels=torch.from_numpy(tokens[learnt]).to(device))


def collate_chunks(samples: Samples, units: Sequence[Sequence[int]], device: torch.device | str, chunk_length: int | None,
                   all_units: Sequence[Sequence[Sequence[int]]]) -> list[Batch]:
    """The row of `collate` in batches of at most chunk_length tokens; None: in one.

    A document is cut at multiples of chunk_length from its own start, so that where its gradient ends depends on itself
    alone; batches are filled with whole pieces. all_units: what every rank runs at the same time. Ranks with fewer batches
    get some without labels, so that all have the same number.
    """
    row = collate(samples, units, "cpu")
    if chunk_length is None:
        return [_moved(row, device)]
    most = max(len(_chunks(samples, other, chunk_length)) for other in all_units)
    bounds = list(accumulate((sum(pieces) for pieces in _chunks(samples, units, chunk_length)), initial=0))
    chunks = [_between(row, start, end) for start, end in pairwise(bounds)]
    chunks += [collate(samples, [], "cpu")] * (most - len(chunks))
    return [_moved(chunk, device) for chunk in chunks]


def _chunks(samples: Samples, units: Sequence[Sequence[int]], chunk_length: int) -> list[list[int]]:
    """Lengths of the pieces in each chunk."""
    lengths = [int(samples.lengths[index]) for unit in units for index in unit]
    pieces = [min(chunk_length, length - start) for length in lengths for start in range(0, length, chunk_length)]
    chunks: list[list[int]] = []
    for piece in pieces:
        if not chunks or sum(chunks[-1]) + piece > chunk_length:
            chunks.append([])
        chunks[-1].append(piece)
    return chunks


def _between(row: Batch, start: int, end: int) -> Batch:
    """Tokens [start, end) with the parts of documents that lie there, and the labels that they predict."""
    bounds = list(accumulate(row.document_lengths, initial=0))
    inner = [bound for bound in bounds if start < bound < end]
    here = (row.label_positions >= start) & (row.label_positions < end)
    return Batch(
        tokens=row.tokens[:, start:end],
        document_lengths=tuple(after - before for before, after in pairwise([start, *inner, end])),
        label_positions=row.label_positions[here] - start,
        labels=row.labels[here],
        continues=start not in bounds)


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    tensors = {name: getattr(batch, name).to(device) for name in ("tokens", "label_positions", "labels")}
    return replace(batch, **tensors)
