"""Llama continues prompts: transformers' own attention and cache, one left-padded batch, finished rows leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from llama_adapters import attention


@torch.inference_mode()
def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, stop: int,
             choose: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """Continues every prompt until `stop`, which is left out, or max_new_tokens. choose: logits (D, V) -> tokens (D,)."""
    continuations: list[list[int]] = [[] for _ in prompts]
    tokens, mask = left_padded(prompts, model.device)
    cache = DynamicCache(config=model.config)
    rows = list(range(len(prompts)))
    with _attention_with_cache(model):
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
            output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                           logits_to_keep=1)
            chosen = choose(output.logits[:, -1])
            going_on = (chosen != stop).nonzero()[:, 0]
            rows = [rows[index] for index in going_on.tolist()]
            for row, token in zip(rows, chosen[going_on].tolist(), strict=True):
                continuations[row].append(token)
            if not rows:
                break
            if len(rows) < len(chosen):
                cache.batch_select_indices(going_on)
            tokens = chosen[going_on][:, None]
            mask = F.pad(mask[going_on], (0, 1), value=1)
    return continuations


def left_padded(rows: list[list[int]], device: torch.device, filling: int = 0) -> tuple[Tensor, Tensor]:
    """(D, T) tokens and mask: generation continues each row at its right end."""
    width = max(map(len, rows))
    tokens = torch.tensor([[filling] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


@contextmanager
def _attention_with_cache(model: nn.Module) -> Iterator[None]:
    """Training's attention knows documents in a row and no cache; it stands again afterwards."""
    training = model.training
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)
        model.train(training)
