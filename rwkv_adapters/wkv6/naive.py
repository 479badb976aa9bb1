"""WKV6 as it is defined, one step of time after the other: what the other operators are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_adapters.wkv6.arguments import check


def wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor,
         document_lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keeps several states a step for backward: T H N^2 values each."""
    check(r, k, v, log_decay, bonus, state, document_lengths)
    decay = log_decay.exp()
    outputs, final_states = [], []
    first = 0
    for S, length in zip(state, document_lengths):
        for t in range(first, first + length):
            kv = k[t, :, :, None] * v[t, :, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", r[t], S + bonus[:, :, None] * kv))
            S = decay[t, :, :, None] * S + kv
        final_states.append(S)
        first += length
    return torch.stack(outputs), torch.stack(final_states)
