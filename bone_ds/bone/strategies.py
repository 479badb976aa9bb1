"""Ways to compute y = x W'^T + bias, equal in result, different in what they build and what they keep for backward.

Each is called as `(x, W, B, bias=None) -> y`, with x (..., in) of any leading dims, W (out, in) frozen, B (G, r, r),
bias (out,); y is (..., out). `resolve` finds one by name.

Suffixes: N rows of x, I in, O out, R the block size r, G matrices of B; _GMR is a weight seen as one (M, r) matrix for
each matrix of B, M = out * in / (G r).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bone_ds.bone.grouping import GROUPINGS, named
from bone_ds.bone.reference import bone_linear
from bone_ds.errors import InjectionError

Product = Callable[..., Tensor]


def resolve(strategy: str, grouping: str) -> Product:
    """Raises InjectionError where either name is unknown or the strategy does not exist for the grouping."""
    named(grouping)
    if strategy not in STRATEGIES:
        raise InjectionError(f"Bone strategy {strategy!r} is unknown, choose one of {', '.join(STRATEGIES)}")
    if grouping not in STRATEGIES[strategy]:
        able = ", ".join(name for name, products in STRATEGIES.items() if grouping in products)
        raise InjectionError(f"Bone strategy {strategy!r} can't compute grouping {grouping!r}, choose one of {able}")
    return STRATEGIES[strategy][grouping]


def _product_dtype(x: Tensor, W: Tensor) -> torch.dtype:
    """The dtype F.linear(x, W) computes in and returns, under autocast or not."""
    assert not W.requires_grad, "Bone's base weight is frozen: no strategy computes its gradient"
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and W.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    assert x.dtype == W.dtype, f"x is {x.dtype}, the base weight {W.dtype}"
    return W.dtype


def _materialized(grouping: str, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The paper's "Bone": autograd builds and keeps W' and a copy of W's blocks."""
    dtype = _product_dtype(x, W)
    return bone_linear(x, W.to(dtype), B.to(dtype), grouping, bias)


def _checkpointed(grouping: str, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The paper's "Bone(checkpoint)": as materialized, but dropped after forward and recomputed in backward."""
    # There is no randomness to replay.
    return checkpoint(_materialized, grouping, x, W, B, bias, use_reentrant=False, preserve_rng_state=False)


class _FactoredRow:
    """Bone-row through the input; nothing of the weight's size is ever built.

    z_b = B_b x_b, then y_a = sum_b W_ab (x_b + z_b) + sum_b z_b: right multiplication of W's blocks acts on x's blocks.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> Tensor:
        r = B_GRR.shape[-1]
        x_NGR = x_NI.unflatten(1, (-1, r))
        z_GNR = torch.bmm(x_NGR.transpose(0, 1), B_GRR.transpose(1, 2))
        # The big product is added to the small terms, not they to it: y is rounded once.
        y_NO = z_GNR.sum(0).repeat(1, W_OI.shape[0] // r)
        if bias_O is not None:
            y_NO += bias_O
        return torch.addmm(y_NO, (x_NGR + z_GNR.transpose(0, 1)).flatten(1), W_OI.t(), out=y_NO)

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """With h = W^T g and t_b = h_b + sum_a g_a: dB_b = t_b x_b^T and dx_b = h_b + B_b^T t_b."""
        r = B_GRR.shape[-1]
        h_GNR = (g_NO @ W_OI).unflatten(1, (-1, r)).transpose(0, 1)
        # Contiguous: the bf16 product for dB is three times slower on CPU otherwise.
        t_GNR = (h_GNR + g_NO.unflatten(1, (-1, r)).sum(1)).contiguous()
        dB_GRR = torch.bmm(t_GNR.transpose(1, 2), x_NI.unflatten(1, (-1, r)).transpose(0, 1)) if need_dB else None
        dx_GNR = torch.baddbmm(h_GNR, t_GNR, B_GRR, out=h_GNR) if need_dx else None
        return dx_GNR.transpose(0, 1).flatten(1) if need_dx else None, dB_GRR


class _Fused:
    """Builds W' for the product and drops it; builds it again in backward, and then the weight's gradient."""

    def __init__(self, grouping: str):
        self.grouping = grouping

    def grid(self, W_OI: Tensor, r: int) -> Tensor:
        """(out, in) -> a view (G, s, r, t, r), see `Grouping.by_matrix`."""
        return named(self.grouping).by_matrix(W_OI.unflatten(1, (-1, r)).unflatten(0, (-1, r)))

    def adapted(self, W_OI: Tensor, B_GRR: Tensor) -> Tensor:
        """W'_ab = W_ab + W_ab B_g + B_g, paper eq. 7 and 10."""
        r = B_GRR.shape[-1]
        adapted_OI = torch.empty_like(W_OI, memory_format=torch.contiguous_format)
        grid = self.grid(adapted_OI, r)
        torch.bmm(self.grid(W_OI, r).flatten(1, 3), B_GRR, out=grid.flatten(1, 3))
        grid += B_GRR[:, None, :, None]
        adapted_OI += W_OI
        return adapted_OI

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> Tensor:
        return F.linear(x_NI, self.adapted(W_OI, B_GRR), bias_O)

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx = g W'. With D = g^T x the gradient of W': dB_g = sum of W_ab^T D_ab + D_ab over the blocks of g."""
        dx_NI = g_NO @ self.adapted(W_OI, B_GRR) if need_dx else None
        return dx_NI, self.bone_gradient(g_NO.t() @ x_NI, W_OI, B_GRR.shape[-1]) if need_dB else None

    def bone_gradient(self, D_OI: Tensor, W_OI: Tensor, r: int) -> Tensor:
        # Contiguous, for the reason given in _FactoredRow; for col it is so already.
        W_GMR, D_GMR = self.grid(W_OI, r).flatten(1, 3).contiguous(), self.grid(D_OI, r).flatten(1, 3)
        return torch.bmm(W_GMR.transpose(1, 2), D_GMR).add_(self.grid(D_OI, r).sum((1, 3)))


class _FrozenProduct(torch.autograd.Function):
    """Dtypes and autograd around a form: an object with `forward` and `backward` on matrices of one dtype.

    It keeps x, W and B as they were given, the parameters themselves: ZeRO-3 frees a parameter's data after forward
    and gathers it, into other storage, before backward; anything derived from it would keep the whole weight alive.
    """

    @staticmethod
    def forward(ctx, x_NI, W_OI, B_GRR, bias_O, form, dtype):
        ctx.save_for_backward(x_NI, W_OI, B_GRR)
        ctx.form, ctx.dtype = form, dtype
        bias_O = None if bias_O is None else bias_O.to(dtype)
        with _autocast_off(x_NI):
            return form.forward(x_NI.to(dtype), W_OI.to(dtype), B_GRR.to(dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):
        need_dx, _, need_dB, need_dbias, _, _ = ctx.needs_input_grad
        dx_NI = dB_GRR = dbias_O = None
        with _autocast_off(g_NO):
            if need_dx or need_dB:
                x_NI, W_OI, B_GRR = (saved.to(ctx.dtype) for saved in ctx.saved_tensors)
                dx_NI, dB_GRR = ctx.form.backward(g_NO, x_NI, W_OI, B_GRR, need_dx, need_dB)
            if need_dbias:
                dbias_O = g_NO.sum(0)
        return dx_NI, None, dB_GRR, dbias_O, None, None


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside, all operands have the dtype of the product already; backward keeps to it wherever it is called."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _by_form(form: _FactoredRow | _Fused, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(x, W)
    # Not -1: it is ambiguous where there are no rows.
    x_NI = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    y_NO = _FrozenProduct.apply(x_NI, W, B, bias, form, dtype)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


STRATEGIES: dict[str, dict[str, Product]] = {
    "materialized": {grouping: partial(_materialized, grouping) for grouping in GROUPINGS},
    "checkpointed": {grouping: partial(_checkpointed, grouping) for grouping in GROUPINGS},
    "fused": {grouping: partial(_by_form, _Fused(grouping)) for grouping in GROUPINGS},
    "factored": {"row": partial(_by_form, _FactoredRow())},
}
STRATEGIES["auto"] = {"row": STRATEGIES["factored"]["row"], "col": STRATEGIES["fused"]["col"]}
"""By strategy, then by grouping."""
