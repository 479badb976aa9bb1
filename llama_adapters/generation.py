"""Llama reads on: transformers' own attention and cache, one left-padded batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llama_adapters import attention


class Reading:
    """`bone_ds.arch.Reading` of a cache. What is padded stays in it, masked."""

    def __init__(self, model: nn.Module, documents: int):
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.empty(documents, 0, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def read(self, tokens: list[list[int]]) -> Tensor:
        padded, mask = left_padded(tokens, self._model.device)
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -padded.shape[1]:]
        with _attention_with_cache(self._model):
            output = self._model(input_ids=padded, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
                                 use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def keep(self, documents: list[int]) -> None:
        kept = torch.tensor(documents, device=self._model.device)
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]


def left_padded(rows: list[list[int]], device: torch.device, filling: int = 0) -> tuple[Tensor, Tensor]:
    """(D, T) tokens and mask: each row is continued at its right end."""
    width = max(map(len, rows))
    tokens = torch.tensor([[filling] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


@contextmanager
def _attention_with_cache(model: nn.Module) -> Iterator[None]:
    """Training's attention knows documents in a row and no cache; it stands again afterwards.

    For every token anew: the layers share the config, and transformers' own setter, like eval(), would go through all modules.
    """
    training = model.training
    if training:
        model.eval()
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = attention.NAME
        if training:
            model.train()
