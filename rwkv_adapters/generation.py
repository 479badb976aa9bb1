"""RWKV6 continues prompts from states: memory does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from bone_ds.arch import State

_SLICE_TOKENS = 2048
"""Of all prompts together that are run at once."""


@torch.inference_mode()
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, stop: int,
             choose: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """Continues every prompt until `stop`, which is left out, or max_new_tokens. choose: logits (D, V) -> tokens (D,).

    The unfinished prompts are the documents of one row, each one token long; each document goes on from its state.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    # Longest first: the prompts that reach into a slice are always the first ones, as are those that have a state.
    documents = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    hidden, state = _read(model, [prompts[index] for index in documents])
    for step in range(1, max_new_tokens + 1):
        chosen = choose(hidden @ model.head.weight.T)
        going_on = (chosen != stop).nonzero()[:, 0]
        documents = [documents[index] for index in going_on.tolist()]
        for document, token in zip(documents, chosen[going_on].tolist(), strict=True):
            continuations[document].append(token)
        if not documents or step == max_new_tokens:
            break
        if len(documents) < len(chosen):
            state = tuple(part[going_on] for part in state)
        hidden, state = model.hidden(chosen[going_on][None], (1,) * len(documents), state, slice(None))
    return continuations


def _read(model: nn.Module, prompts: list[list[int]]) -> tuple[Tensor, State]:
    """The hidden state (D, C) of each prompt's last token and the state after it; no prompt is longer than the one before."""
    slice_length = max(1, _SLICE_TOKENS // len(prompts))
    last_hidden, state = None, None
    for start in range(0, len(prompts[0]), slice_length):
        pieces = [prompt[start:start + slice_length] for prompt in prompts if len(prompt) > start]
        lengths = tuple(map(len, pieces))
        tokens = torch.tensor([token for piece in pieces for token in piece], device=model.head.weight.device)[None]
        carried = None if state is None else tuple(part[:len(pieces)] for part in state)
        hidden, kept = model.hidden(tokens, lengths, carried, slice(None))
        ends = torch.tensor(list(accumulate(lengths)), device=hidden.device) - 1
        last_hidden, state = _with_first(last_hidden, hidden[ends]), kept if state is None else tuple(map(_with_first, state, kept))
    return last_hidden, state


def _with_first(rows: Tensor | None, first: Tensor) -> Tensor:
    return first if rows is None else torch.cat([first, rows[len(first):]])
