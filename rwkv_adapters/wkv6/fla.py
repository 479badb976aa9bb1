"""WKV6 on a GPU through flash-linear-attention's Triton kernels (the package fla-core), in fp32."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rwkv_adapters.wkv6 import chunked
from rwkv_adapters.wkv6.arguments import check


def wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor,
         document_lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keeps its inputs and, for backward, 64 values a step and head."""
    check(r, k, v, log_decay, bonus, state, document_lengths)
    if isinstance(r, FakeTensor):  # Triton has no notion of them; for heads of 64 chunked keeps as many bytes
        return chunked.wkv6(r, k, v, log_decay, bonus, state, document_lengths)
    from fla.ops.rwkv6 import chunk_rwkv6

    starts = _starts(tuple(document_lengths), r.device) if len(document_lengths) > 1 else None
    y, final_state = chunk_rwkv6(r[None], k[None], v[None], log_decay[None], bonus, scale=1.0, initial_state=state,
                                 output_final_state=True, cu_seqlens=starts)
    return y[0], final_state


@lru_cache(maxsize=64)
def _starts(document_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The same tensor for the same documents: fla keeps what it derives from one, and all layers of a step share it."""
    return torch.tensor([0, *accumulate(document_lengths)], device=device)
