"""Floating-point operations of matrix products, attention and WKV, counted as they are dispatched.

A product of (m, k) and (k, n) counts 2 m k n; elementwise work is left out, as is usual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class FlopCounter(TorchDispatchMode):
    """Active as a context manager; adds up into `by_part[part]`, and what is recomputed for backward into `recomputed`."""

    def __init__(self):
        super().__init__()
        self.part = "forward"
        self.by_part: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = _COUNTS.get(packet) or _OURS.get(packet._qualified_op_name)
        if count is not None:
            part = "recomputed" if self.part == "backward" and _is_recomputing() else self.part
            self.by_part[part] += count(*args, **(kwargs or {}), out_val=out)
        return out


def _documents(query: Tensor, key: Tensor, value: Tensor, document_lengths: Sequence[int], *_, **__) -> int:
    """query (1, H, T, D); each document attends to itself."""
    return sum(4 * query.shape[1] * length**2 * query.shape[3] for length in document_lengths)


def _documents_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, document_lengths: Sequence[int], *_, **__) -> int:
    return _documents(query, key, value, document_lengths) * 5 // 2


def _is_recomputing() -> bool:
    """In backward only a checkpoint, running its forward again, takes what is saved for itself."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _product(a: Tensor, b: Tensor, **_) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


def _added_product(c: Tensor, a: Tensor, b: Tensor, **_) -> int:
    return _product(a, b)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> int:
    """Two products of every query with every key, causal or not: kernels differ in what they skip of a half."""
    batch, heads, length, width = query.shape
    return 4 * batch * heads * length * key.shape[2] * width


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> int:
    return _attention(query, key, value) * 5 // 2


def _wkv6(r: Tensor, *_, **__) -> int:
    """Per step and head, with N channels: the state decays, takes k v^T, and r reads it."""
    return 5 * prod(r.shape) * r.shape[-1]


def _wkv6_backward(r: Tensor, *_, **__) -> int:
    """The states again, and the gradients of r, k, v, the decay and the state."""
    return 13 * prod(r.shape) * r.shape[-1]


_COUNTS = dict(flop_registry) | {
    aten.mm: _product, aten.bmm: _product, aten.addmm: _added_product, aten.baddbmm: _added_product,
    aten.addmm_: _added_product, aten.baddbmm_: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_OURS = {
    "bone_ds::wkv6": _wkv6, "bone_ds::wkv6_backward": _wkv6_backward,
    "bone_ds::attention_as_on_cuda": _documents, "bone_ds::attention_as_on_cuda_backward": _documents_backward,
}
"""Custom operators, by name: they are registered where they are used."""
