"""RWKV6 reads on from states: memory does not grow with the text."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from bone_ds.arch import State

_SLICE_TOKENS = 2048
"""Of all documents together that are run at once."""


class Reading:
    """`bone_ds.arch.Reading` of states: the documents stand in one row, each goes on from its own."""

    def __init__(self, model: nn.Module, documents: int):
        self._model = model
        self._state: State | None = None

    @torch.inference_mode()
    def read(self, tokens: list[list[int]]) -> Tensor:
        if len(set(map(len, tokens))) == 1:
            hidden, self._state = _read(self._model, tokens, self._state)
            return hidden @ self._model.head.weight.T
        # Longest first: the documents that reach into a slice are always the first ones.
        order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        places = torch.tensor(order, device=self._model.head.weight.device).argsort()
        state = None if self._state is None else tuple(part[order] for part in self._state)
        hidden, state = _read(self._model, [tokens[index] for index in order], state)
        self._state = tuple(part[places] for part in state)
        return (hidden @ self._model.head.weight.T)[places]

    def keep(self, documents: list[int]) -> None:
        self._state = tuple(part[documents] for part in self._state)


def _read(model: nn.Module, documents: list[list[int]], state: State | None) -> tuple[Tensor, State]:
    """The hidden state (D, C) of each document's last token and the state after it; no document is longer than the one before."""
    slice_length = max(1, _SLICE_TOKENS // len(documents))
    last_hidden = None
    for start in range(0, len(documents[0]), slice_length):
        pieces = [document[start:start + slice_length] for document in documents if len(document) > start]
        lengths = tuple(map(len, pieces))
        tokens = torch.tensor([token for piece in pieces for token in piece], device=model.head.weight.device)[None]
        carried = None if state is None else tuple(part[:len(pieces)] for part in state)
        hidden, kept = model.hidden(tokens, lengths, carried, slice(None))
        ends = torch.tensor(list(accumulate(lengths)), device=hidden.device) - 1
        last_hidden, state = _with_first(last_hidden, hidden[ends]), kept if state is None else tuple(map(_with_first, state, kept))
    return last_hidden, state


def _with_first(rows: Tensor | None, first: Tensor) -> Tensor:
    return first if rows is None or len(first) == len(rows) else torch.cat([first, rows[len(first):]])
