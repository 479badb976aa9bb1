"""Ways to compute y = x W'^T + bias, equal in result, different in what they build and what they keep for backward.

Each is called as `(x, W, B, bias=None) -> y`, with x (..., in) of any leading dims, W (out, in) frozen, B as `bone_shape` has it,
bias (out,); y is (..., out). `resolve` finds one by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bone_ds.bone import factored, fused
from bone_ds.bone import form as forms
from bone_ds.bone.form import FORMS
from bone_ds.bone.grouping import free_periods, named
from bone_ds.bone.reference import bone_linear
from bone_ds.errors import InjectionError

Product = Callable[..., Tensor]


def resolve(strategy: str, grouping: str, form: str = "affine") -> Product:
    """Raises InjectionError where a name is unknown or the strategy does not exist for the grouping and form."""
    named(grouping)
    forms.named(form, grouping)
    if strategy not in STRATEGIES:
        raise InjectionError(f"Bone strategy {strategy!r} is unknown, choose one of {', '.join(STRATEGIES)}")
    if (grouping, form) not in STRATEGIES[strategy]:
        able = ", ".join(name for name, products in STRATEGIES.items() if (grouping, form) in products)
        raise InjectionError(f"Bone strategy {strategy!r} can't compute grouping {grouping!r}, form {form!r}, choose one of {able}")
    return STRATEGIES[strategy][grouping, form]


def _product_dtype(x: Tensor, W: Tensor) -> torch.dtype:
    """The dtype F.linear(x, W) computes in and returns, under autocast or not."""
    assert not W.requires_grad, "Bone's base weight is frozen: no strategy computes its gradient"
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and W.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    assert x.dtype == W.dtype, f"x is {x.dtype}, the base weight {W.dtype}"
    return W.dtype


def _materialized(grouping: str, form: str, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The paper's "Bone": autograd builds and keeps W' and a copy of W's blocks."""
    dtype = _product_dtype(x, W)
    return bone_linear(x, W.to(dtype), B.to(dtype), grouping, bias, form)


def _checkpointed(grouping: str, form: str, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The paper's "Bone(checkpoint)": as materialized, but dropped after forward and recomputed in backward."""
    # There is no randomness to replay.
    return checkpoint(_materialized, grouping, form, x, W, B, bias, use_reentrant=False, preserve_rng_state=False)


class FrozenProduct(torch.autograd.Function):
    """Dtypes and autograd around an algorithm: an object with `forward` and `backward` on matrices of one dtype.

    `forward` gives y and what `backward` gets in place of x, or None where that is x, kept as it was given since others may keep it
    too. W and B are kept as they were given, the parameters themselves: ZeRO-3 frees a parameter's data after forward and
    gathers it, into other storage, before backward; anything derived from it would keep the whole weight alive.
    """

    @staticmethod
    def forward(ctx, x_NI, W_OI, B, bias_O, algorithm, dtype):
        ctx.algorithm, ctx.dtype = algorithm, dtype
        bias_O = None if bias_O is None else bias_O.to(dtype)
        with _autocast_off(x_NI):
            y_NO, kept = algorithm.forward(x_NI.to(dtype), W_OI.to(dtype), B.to(dtype), bias_O)
        ctx.save_for_backward(x_NI if kept is None else kept, W_OI, B)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):
        need_dx, _, need_dB, need_dbias, _, _ = ctx.needs_input_grad
        dx_NI = dB = dbias_O = None
        with _autocast_off(g_NO):
            if need_dx or need_dB:
                kept, W_OI, B = (saved.to(ctx.dtype) for saved in ctx.saved_tensors)
                dx_NI, dB = ctx.algorithm.backward(g_NO, kept, W_OI, B, need_dx, need_dB)
            if need_dbias:
                dbias_O = g_NO.sum(0)
        return dx_NI, None, dB, dbias_O, None, None


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside, all operands have the dtype of the product already; backward keeps to it wherever it is called."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _by(algorithm, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(x, W)
    # Not -1: it is ambiguous where there are no rows.
    x_NI = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    y_NO = FrozenProduct.apply(x_NI, W, B, bias, algorithm, dtype)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


def _cheapest_free(form: str, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Through the input where that takes fewer multiply-adds a row of x than a third large product does."""
    (out_features, in_features), r, thin_products = W.shape, B.shape[-1], 3 * FORMS[form].trainables
    periods = free_periods(in_features // r, B.shape[-3])
    strategy = "factored" if periods == 1 or thin_products * periods * r < out_features else "fused"
    return STRATEGIES[strategy]["free", form](x, W, B, bias)


def _each(algorithms: dict) -> dict[tuple[str, str], Product]:
    return {pair: partial(_by, algorithm) for pair, algorithm in algorithms.items()}


_PAIRS = [(grouping, form) for form, its in FORMS.items() for grouping in its.groupings]
STRATEGIES: dict[str, dict[tuple[str, str], Product]] = {
    "materialized": {pair: partial(_materialized, *pair) for pair in _PAIRS},
    "checkpointed": {pair: partial(_checkpointed, *pair) for pair in _PAIRS},
    "fused": _each({
        ("row", "affine"): fused.Row(), ("row", "unconstrained"): fused.Row(),
        ("col", "affine"): fused.Col(), ("col", "unconstrained"): fused.Col(),
        **{(grouping, "hadamard"): fused.Slabs(grouping, "hadamard") for grouping in FORMS["hadamard"].groupings},
        **{("free", form): fused.Slabs("free", form) for form in FORMS}}),
    "factored": _each({
        ("row", "affine"): factored.Row(), ("row", "unconstrained"): factored.UnconstrainedRow(),
        ("left", "affine"): factored.Left(), ("miss", "affine"): factored.Miss(),
        ("free", "affine"): factored.Free(factored.Row()), ("free", "unconstrained"): factored.Free(factored.UnconstrainedRow())}),
}
STRATEGIES["auto"] = STRATEGIES["fused"] | STRATEGIES["factored"] | {
    ("free", form): partial(_cheapest_free, form) for form in ("affine", "unconstrained")}
"""By strategy, then by grouping and form."""
