"""Ways to compute y = x W'^T + bias, equal in result, different in what they build and what they keep for backward.

Each is called as `(x, W, B, bias=None) -> y`, with x (..., in) of any leading dims, W (out, in) frozen, B (G, r, r),
bias (out,); y is (..., out). `resolve` finds one by name.

Suffixes: N rows of x, I in, O out, S a part of in or out, R the block size r, G matrices of B; _GNR has one (N, r) block of x or y for
each matrix of B, _GMR the (M, r) of a weight that each matrix acts on.
"""

from __future__ import annotations

import math
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


def _blocks(x_NI: Tensor, r: int) -> Tensor:
    """(N, in) -> a view (in/r, N, r)."""
    return x_NI.unflatten(1, (-1, r)).transpose(0, 1)


def _in_blocks(W_OI: Tensor, r: int) -> Tensor:
    """(out, in) -> a view (out/r, r, in/r, r)."""
    return W_OI.unflatten(1, (-1, r)).unflatten(0, (-1, r))


def _block_sum(x_NI: Tensor, r: int) -> Tensor:
    """(N, in) -> (N, r), the sum of x's blocks."""
    return x_NI.unflatten(1, (-1, r)).sum(1)


def _operand(x_GNR: Tensor) -> Tensor:
    """For a product by block: in bf16 on a CPU it takes three to eight times as long with strides, and a copy a third of it."""
    return x_GNR.contiguous() if x_GNR.is_cpu else x_GNR


def _operand_plus(h_GNR: Tensor, s_NR: Tensor) -> Tensor:
    """h + s in memory of its own, to be an operand; on a CPU a copy and a sum in place are the faster way to a contiguous one."""
    return h_GNR.clone(memory_format=torch.contiguous_format).add_(s_NR) if h_GNR.is_cpu else h_GNR + s_NR


class _FactoredRow:
    """Bone-row through the input; nothing of the weight's size is ever built.

    z_b = B_b x_b, then y_a = sum_b W_ab (x_b + z_b) + sum_b z_b: right multiplication of W's blocks acts on x's blocks.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        r = B_GRR.shape[-1]
        x_GNR = _operand(_blocks(x_NI, r))
        z_GNR = torch.bmm(x_GNR, B_GRR.transpose(1, 2))
        # The big product is added to the small terms, not they to it: y is rounded once.
        y_NO = z_GNR.sum(0).repeat(1, W_OI.shape[0] // r)
        if bias_O is not None:
            y_NO += bias_O
        z_GNR += x_GNR
        return torch.addmm(y_NO, z_GNR.transpose(0, 1).flatten(1), W_OI.t(), out=y_NO), None

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """With h = W^T g and t_b = h_b + sum_a g_a: dB_b = t_b x_b^T and dx_b = h_b + B_b^T t_b."""
        r = B_GRR.shape[-1]
        h_NI = g_NO @ W_OI
        h_GNR = _blocks(h_NI, r)
        t_GNR = _operand_plus(h_GNR, _block_sum(g_NO, r))
        dB_GRR = torch.bmm(t_GNR.transpose(1, 2), _operand(_blocks(x_NI, r))) if need_dB else None
        if not need_dx:
            return None, dB_GRR
        torch.baddbmm(h_GNR, t_GNR, B_GRR, out=h_GNR)
        return h_NI, dB_GRR


class _FactoredLeft:
    """Bone-left through the output, which it keeps in place of the input; nothing of the weight's size is ever built.

    With h = W x and t_a = h_a + sum_b x_b: y_a = h_a + B_a t_a, left multiplication of W's blocks acts on the product's blocks.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
        r = B_GRR.shape[-1]
        h_NO = x_NI @ W_OI.t()
        h_GNR = _blocks(h_NO, r)
        t_GNR = _operand_plus(h_GNR, _block_sum(x_NI, r))
        if bias_O is not None:
            h_NO += bias_O
        torch.baddbmm(h_GNR, t_GNR, B_GRR.transpose(1, 2), out=h_GNR)
        return h_NO, t_GNR

    def backward(
        self, g_NO: Tensor, t_GNR: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """With u_a = B_a^T g_a: dB_a = g_a t_a^T and dx = W^T (g + u) + sum_a u_a in every block."""
        r = B_GRR.shape[-1]
        g_GNR = _operand(_blocks(g_NO, r))
        dB_GRR = torch.bmm(g_GNR.transpose(1, 2), t_GNR) if need_dB else None
        if not need_dx:
            return None, dB_GRR
        u_GNR = torch.bmm(g_GNR, B_GRR)
        dx_NI = u_GNR.sum(0).repeat(1, W_OI.shape[1] // r)
        u_GNR += g_GNR
        return torch.addmm(dx_NI, u_GNR.transpose(0, 1).flatten(1), W_OI, out=dx_NI), dB_GRR


class _FusedRow:
    """Builds W' for the product and drops it; builds it again in backward, and then the weight's gradient."""

    def adapted(self, W_OI: Tensor, B_GRR: Tensor) -> Tensor:
        """W'_ab = W_ab + W_ab B_b + B_b, paper eq. 10."""
        r = B_GRR.shape[-1]
        adapted_OI = torch.empty_like(W_OI, memory_format=torch.contiguous_format)
        torch.bmm(_blocks(W_OI, r), B_GRR, out=_blocks(adapted_OI, r))
        _in_blocks(adapted_OI, r).add_(B_GRR.transpose(0, 1))
        adapted_OI += W_OI
        return adapted_OI

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        return F.linear(x_NI, self.adapted(W_OI, B_GRR), bias_O), None

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx = g W'. With D = g^T x the gradient of W': dB_b = sum_a W_ab^T D_ab + D_ab."""
        dx_NI = g_NO @ self.adapted(W_OI, B_GRR) if need_dx else None
        return dx_NI, self.dB(g_NO.t() @ x_NI, W_OI, B_GRR.shape[-1]) if need_dB else None

    def dB(self, D_OI: Tensor, W_OI: Tensor, r: int) -> Tensor:
        dB_GRR = torch.bmm(_operand(_blocks(W_OI, r)).transpose(1, 2), _blocks(D_OI, r))
        return dB_GRR.add_(_in_blocks(D_OI, r).sum(0).transpose(0, 1))


WORKSPACE_BYTES = 30 * 2**20
"""For what col builds of a weight at a time. From 32 MiB up, glibc takes new pages for every tensor, and two tensors of half as much are
given back to the system as soon as they are freed: writing new pages costs a CPU as much as the building does."""


class _FusedCol:
    """Builds W' for the product, slab by slab, and drops it; again in backward, and then the weight's gradient.

    What is built lies in one workspace that the next slab uses again.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        r = B_GRR.shape[-1]
        y_NO = x_NI.new_empty(len(x_NI), len(W_OI)) if bias_O is None else bias_O.repeat(len(x_NI), 1)
        size = self.slab_size(W_OI, 0, r)
        workspace = W_OI.new_empty(size * W_OI.shape[1])
        for W_SI, B_SRR, y_NS in zip(W_OI.split(size), B_GRR.split(size // r), y_NO.split(size, dim=1)):
            built_SI = self.build(W_SI, B_SRR, workspace)
            torch.addmm(y_NS, x_NI, built_SI.t(), beta=0 if bias_O is None else 1, out=y_NS)
        return y_NO, None

    def backward(
        self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx = g W'. With D = g^T x the gradient of W': dB_a = sum_b W_ab^T D_ab + D_ab."""
        dx_NI = self.dx(g_NO, W_OI, B_GRR) if need_dx else None
        return dx_NI, self.dB(g_NO, x_NI, W_OI, B_GRR.shape[-1]) if need_dB else None

    def dx(self, g_NO: Tensor, W_OI: Tensor, B_GRR: Tensor) -> Tensor:
        """In slabs of inputs: those of outputs would have to be summed, and each sum rounded."""
        dx_NI = g_NO.new_empty(len(g_NO), W_OI.shape[1])
        # A slab of columns is copied first, to be an operand of the building: two parts of the workspace.
        parts = 1 if W_OI.nbytes <= WORKSPACE_BYTES and W_OI.is_contiguous() else 2
        size = self.slab_size(W_OI, 1, B_GRR.shape[-1], parts)
        workspaces = W_OI.new_empty(parts, size * W_OI.shape[0])
        for W_OS, dx_NS in zip(W_OI.split(size, dim=1), dx_NI.split(size, dim=1)):
            if parts == 2:
                W_OS = _within(workspaces[1], W_OS.shape).copy_(W_OS)
            torch.mm(g_NO, self.build(W_OS, B_GRR, workspaces[0]), out=dx_NS)
        return dx_NI

    def dB(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, r: int) -> Tensor:
        dB_GRR = W_OI.new_empty(W_OI.shape[0] // r, r, r)
        size = self.slab_size(W_OI, 0, r)
        workspace = W_OI.new_empty(size * W_OI.shape[1])
        for W_SI, g_NS, dB_SRR in zip(W_OI.split(size), g_NO.split(size, dim=1), dB_GRR.split(size // r)):
            D_SI = torch.mm(g_NS.t(), x_NI, out=_within(workspace, W_SI.shape))
            W_SMR, D_SMR = (part.reshape(len(dB_SRR), -1, r) for part in (W_SI, D_SI))
            torch.bmm(W_SMR.transpose(1, 2), D_SMR, out=dB_SRR)
            dB_SRR += _in_blocks(D_SI, r).sum(2)
        return dB_GRR

    def slab_size(self, W_OI: Tensor, dim: int, r: int, parts: int = 1) -> int:
        """How much of a dimension is in a slab, so that `parts` of them fit the workspace: blocks of r, in slabs of about equal size."""
        blocks = W_OI.shape[dim] // r
        block_bytes = r * W_OI.shape[1 - dim] * W_OI.element_size() * parts
        slabs = math.ceil(blocks / max(1, WORKSPACE_BYTES // block_bytes))
        return r * math.ceil(blocks / slabs)

    def build(self, W_SI: Tensor, B_GRR: Tensor, workspace: Tensor) -> Tensor:
        """W'_ab = W_ab + W_ab B_a + B_a of the slab, paper eq. 7, in the workspace."""
        r = B_GRR.shape[-1]
        built_SI = _within(workspace, W_SI.shape)
        torch.add(_in_blocks(W_SI, r), B_GRR[:, :, None], out=_in_blocks(built_SI, r))
        built_GMR = built_SI.view(len(B_GRR), -1, r)
        torch.baddbmm(built_GMR, W_SI.reshape(built_GMR.shape), B_GRR, out=built_GMR)
        return built_SI


def _within(workspace: Tensor, shape: torch.Size) -> Tensor:
    """The beginning of a flat workspace as a tensor of the shape."""
    return workspace[:shape.numel()].view(shape)


class _FrozenProduct(torch.autograd.Function):
    """Dtypes and autograd around a form: an object with `forward` and `backward` on matrices of one dtype.

    `forward` gives y and what `backward` gets in place of x, or None where that is x, kept as it was given since others may keep it
    too. W and B are kept as they were given, the parameters themselves: ZeRO-3 frees a parameter's data after forward and
    gathers it, into other storage, before backward; anything derived from it would keep the whole weight alive.
    """

    @staticmethod
    def forward(ctx, x_NI, W_OI, B_GRR, bias_O, form, dtype):
        ctx.form, ctx.dtype = form, dtype
        bias_O = None if bias_O is None else bias_O.to(dtype)
        with _autocast_off(x_NI):
            y_NO, kept = form.forward(x_NI.to(dtype), W_OI.to(dtype), B_GRR.to(dtype), bias_O)
        ctx.save_for_backward(x_NI if kept is None else kept, W_OI, B_GRR)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):
        need_dx, _, need_dB, need_dbias, _, _ = ctx.needs_input_grad
        dx_NI = dB_GRR = dbias_O = None
        with _autocast_off(g_NO):
            if need_dx or need_dB:
                kept, W_OI, B_GRR = (saved.to(ctx.dtype) for saved in ctx.saved_tensors)
                dx_NI, dB_GRR = ctx.form.backward(g_NO, kept, W_OI, B_GRR, need_dx, need_dB)
            if need_dbias:
                dbias_O = g_NO.sum(0)
        return dx_NI, None, dB_GRR, dbias_O, None, None


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside, all operands have the dtype of the product already; backward keeps to it wherever it is called."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


Form = _FactoredRow | _FactoredLeft | _FusedRow | _FusedCol


def _by_form(form: Form, x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(x, W)
    # Not -1: it is ambiguous where there are no rows.
    x_NI = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    y_NO = _FrozenProduct.apply(x_NI, W, B, bias, form, dtype)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


STRATEGIES: dict[str, dict[str, Product]] = {
    "materialized": {grouping: partial(_materialized, grouping) for grouping in GROUPINGS},
    "checkpointed": {grouping: partial(_checkpointed, grouping) for grouping in GROUPINGS},
    "fused": {"row": partial(_by_form, _FusedRow()), "col": partial(_by_form, _FusedCol())},
    "factored": {"row": partial(_by_form, _FactoredRow()), "left": partial(_by_form, _FactoredLeft())},
}
STRATEGIES["auto"] = STRATEGIES["factored"] | {"col": STRATEGIES["fused"]["col"]}
"""By strategy, then by grouping."""
