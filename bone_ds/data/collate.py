"""Samples to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bone_ds.arch import Batch
from bone_ds.data.samples import Samples


def collate(samples: Samples, units: Sequence[Sequence[int]], device: torch.device | str) -> Batch:
    """Documents end to end, without padding; a sample is a document.

    No units: one EOS token and no label, so that an idle rank still runs forward and backward with the others.
    """
    documents = [samples[index] for unit in units for index in unit]
    prompt_lengths = [int(samples.prompt_lengths[index]) for unit in units for index in unit]
    if not documents:
        documents, prompt_lengths = [np.array([samples.eos_token_id])], [1]
    tokens = np.concatenate(documents).astype(np.int64)
    lengths = tuple(len(document) for document in documents)
    learnt = _learnt(lengths, prompt_lengths)
    return Batch(
        tokens=torch.from_numpy(tokens).unsqueeze(0).to(device),
        document_lengths=lengths,
        label_positions=torch.from_numpy(learnt - 1).to(device),
        labels=torch.from_numpy(tokens[learnt]).to(device))


def _learnt(lengths: Sequence[int], prompt_lengths: Sequence[int]) -> np.ndarray:
    """(M,) int64: where the loss-bearing tokens stand in the row."""
    starts = np.cumsum([0, *lengths[:-1]])
    spans = [np.arange(start + max(1, prompt_length), start + length)
             for start, length, prompt_length in zip(starts, lengths, prompt_lengths, strict=True)]
    return np.concatenate(spans).astype(np.int64)
