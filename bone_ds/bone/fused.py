"""Ways to compute y = x W'^T + bias that build W' for a product, drop it, and build it again in backward: nothing of its size is kept.

Each has `forward` and `backward` as `strategies.FrozenProduct` calls them. Suffixes: see blocks.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bone_ds.bone import form as forms
from bone_ds.bone.blocks import blocks, factor_and_term, in_blocks, operand
from bone_ds.bone.grouping import named

Gradients = tuple[Tensor | None, Tensor | None]
WORKSPACE_BYTES = 30 * 2**20
"""For what is built of a weight at a time. From 32 MiB up, glibc takes new pages for every tensor, and two tensors of half as much are
given back to the system as soon as they are freed: writing new pages costs a CPU as much as the building does."""


def slab_size(W_OI: Tensor, dim: int, r: int, parts: int = 1) -> int:
    """How much of a dimension is in a slab, so that `parts` of them fit the workspace: blocks of r, in slabs of about equal size."""
    block_count = W_OI.shape[dim] // r
    block_bytes = r * W_OI.shape[1 - dim] * W_OI.element_size() * parts
    slabs = math.ceil(block_count / max(1, WORKSPACE_BYTES // block_bytes))
    return r * math.ceil(block_count / slabs)


class Row:
    """Bone-row with the whole W': affine, and W A + C with two matrices."""

    def adapted(self, W_OI: Tensor, B: Tensor) -> Tensor:
        """W'_ab = W_ab + W_ab A_b + C_b; paper eq. 10 where both are B."""
        A_GRR, C_GRR = factor_and_term(B)
        r = B.shape[-1]
        adapted_OI = torch.empty_like(W_OI, memory_format=torch.contiguous_format)
        torch.bmm(blocks(W_OI, r), A_GRR, out=blocks(adapted_OI, r))
        in_blocks(adapted_OI, r).add_(C_GRR.transpose(0, 1))
        adapted_OI += W_OI
        return adapted_OI

    def forward(self, x_NI: Tensor, W_OI: Tensor, B: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        return F.linear(x_NI, self.adapted(W_OI, B), bias_O), None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """dx = g W'. With D = g^T x the gradient of W': dA_b = sum_a W_ab^T D_ab and dC_b = sum_a D_ab; dB is their sum."""
        dx_NI = g_NO @ self.adapted(W_OI, B) if need_dx else None
        return dx_NI, self.dB(g_NO.t() @ x_NI, W_OI, B) if need_dB else None

    def dB(self, D_OI: Tensor, W_OI: Tensor, B: Tensor) -> Tensor:
        r = B.shape[-1]
        dA_GRR = torch.bmm(operand(blocks(W_OI, r)).transpose(1, 2), blocks(D_OI, r))
        dC_GRR = in_blocks(D_OI, r).sum(0).transpose(0, 1)
        return dA_GRR.add_(dC_GRR) if B.dim() == 3 else torch.stack((dA_GRR, dC_GRR))


class Col:
    """Bone-col slab by slab: affine, and W A + C with two matrices. What is built lies in one workspace that the next slab uses again."""

    def forward(self, x_NI: Tensor, W_OI: Tensor, B: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        r = B.shape[-1]
        y_NO = x_NI.new_empty(len(x_NI), len(W_OI)) if bias_O is None else bias_O.repeat(len(x_NI), 1)
        size = slab_size(W_OI, 0, r)
        workspace = W_OI.new_empty(size * W_OI.shape[1])
        for W_SI, B_S, y_NS in zip(W_OI.split(size), B.split(size // r, -3), y_NO.split(size, dim=1)):
            built_SI = self.build(W_SI, B_S, workspace)
            torch.addmm(y_NS, x_NI, built_SI.t(), beta=0 if bias_O is None else 1, out=y_NS)
        return y_NO, None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """dx = g W'. With D = g^T x the gradient of W': dA_a = sum_b W_ab^T D_ab and dC_a = sum_b D_ab; dB is their sum."""
        dx_NI = self.dx(g_NO, W_OI, B) if need_dx else None
        return dx_NI, self.dB(g_NO, x_NI, W_OI, B) if need_dB else None

    def dx(self, g_NO: Tensor, W_OI: Tensor, B: Tensor) -> Tensor:
        """In slabs of inputs: those of outputs would have to be summed, and each sum rounded."""
        dx_NI = g_NO.new_empty(len(g_NO), W_OI.shape[1])
        # A slab of columns is copied first, to be an operand of the building: two parts of the workspace.
        parts = 1 if W_OI.nbytes <= WORKSPACE_BYTES and W_OI.is_contiguous() else 2
        size = slab_size(W_OI, 1, B.shape[-1], parts)
        workspaces = W_OI.new_empty(parts, size * W_OI.shape[0])
        for W_OS, dx_NS in zip(W_OI.split(size, dim=1), dx_NI.split(size, dim=1)):
            if parts == 2:
                W_OS = _within(workspaces[1], W_OS.shape).copy_(W_OS)
            torch.mm(g_NO, self.build(W_OS, B, workspaces[0]), out=dx_NS)
        return dx_NI

    def dB(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor) -> Tensor:
        dB, r = torch.empty_like(B, memory_format=torch.contiguous_format), B.shape[-1]
        size = slab_size(W_OI, 0, r)
        workspace = W_OI.new_empty(size * W_OI.shape[1])
        for W_SI, g_NS, dB_S in zip(W_OI.split(size), g_NO.split(size, dim=1), dB.split(size // r, -3)):
            dA_SRR, dC_SRR = factor_and_term(dB_S)
            D_SI = torch.mm(g_NS.t(), x_NI, out=_within(workspace, W_SI.shape))
            W_SMR, D_SMR = (part.reshape(len(dA_SRR), -1, r) for part in (W_SI, D_SI))
            torch.bmm(W_SMR.transpose(1, 2), D_SMR, out=dA_SRR)
            sum_SRR = in_blocks(D_SI, r).sum(2)
            dC_SRR.copy_(sum_SRR) if B.dim() == 4 else dC_SRR.add_(sum_SRR)
        return dB

    def build(self, W_SI: Tensor, B: Tensor, workspace: Tensor) -> Tensor:
        """W'_ab = W_ab + W_ab A_a + C_a of the slab, in the workspace; paper eq. 7 where both are B."""
        A_GRR, C_GRR = factor_and_term(B)
        r = B.shape[-1]
        built_SI = _within(workspace, W_SI.shape)
        torch.add(in_blocks(W_SI, r), C_GRR[:, :, None], out=in_blocks(built_SI, r))
        built_GMR = built_SI.view(len(A_GRR), -1, r)
        torch.baddbmm(built_GMR, W_SI.reshape(built_GMR.shape), A_GRR, out=built_GMR)
        return built_SI


def _within(workspace: Tensor, shape: torch.Size) -> Tensor:
    """The beginning of a flat workspace as a tensor of the shape."""
    return workspace[:shape.numel()].view(shape)


class Slabs:
    """Any grouping and form of r x r blocks as the reference writes it, slab by slab; dB by autograd through a slab at a time."""

    def __init__(self, grouping: str, form: str):
        self.grouping, self.form = grouping, form
        self.parts = {"hadamard": 4, "affine": 5, "unconstrained": 8}[form]
        """Tensors of a slab's size that building it and its gradient take at a time."""

    def forward(self, x_NI: Tensor, W_OI: Tensor, B: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        y_NO = x_NI.new_empty(len(x_NI), len(W_OI))
        for rows, here in self._slabs(W_OI, 0, B.shape[-1]):
            y_NO[:, here] = F.linear(x_NI, self.build(W_OI, B, rows=rows), None if bias_O is None else bias_O[here])
        return y_NO, None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        return self.dx(g_NO, W_OI, B) if need_dx else None, self.dB(g_NO, x_NI, W_OI, B) if need_dB else None

    def dx(self, g_NO: Tensor, W_OI: Tensor, B: Tensor) -> Tensor:
        """In slabs of inputs: those of outputs would have to be summed, and each sum rounded."""
        dx_NI = g_NO.new_empty(len(g_NO), W_OI.shape[1])
        for columns, here in self._slabs(W_OI, 1, B.shape[-1]):
            dx_NI[:, here] = g_NO @ self.build(W_OI, B, columns=columns)
        return dx_NI

    def dB(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor) -> Tensor:
        """Summed over the slabs in fp32 or wider."""
        dB = torch.zeros_like(B, dtype=torch.promote_types(B.dtype, torch.float32))
        leaf = B.detach().requires_grad_()
        for rows, here in self._slabs(W_OI, 0, B.shape[-1]):
            with torch.enable_grad():
                built_SI = self.build(W_OI, leaf, rows=rows)
            dB += torch.autograd.grad(built_SI, leaf, g_NO[:, here].t() @ x_NI)[0]
        return dB.to(B.dtype)

    def build(self, W_OI: Tensor, B: Tensor, rows: range | None = None, columns: range | None = None) -> Tensor:
        """W' of some rows and columns of blocks, each all by default: (len(rows) r, len(columns) r)."""
        how, r = named(self.grouping), B.shape[-1]
        all_blocks = in_blocks(W_OI, r).transpose(1, 2)
        rows, columns = rows or range(all_blocks.shape[0]), columns or range(all_blocks.shape[1])
        slab = all_blocks[rows.start:rows.stop, columns.start:columns.stop]
        bone = how.over_blocks(B, rows, columns, all_blocks.shape[1])
        built = slab + forms.named(self.form, self.grouping).change(slab, bone, how.product)
        return built.transpose(1, 2).reshape(len(rows) * r, len(columns) * r)

    def _slabs(self, W_OI: Tensor, dim: int, r: int) -> Iterator[tuple[range, slice]]:
        """Ranges of blocks along a dimension, and the rows or columns of W that they are."""
        step, count = slab_size(W_OI, dim, r, self.parts) // r, W_OI.shape[dim] // r
        for start in range(0, count, step):
            part = range(start, min(start + step, count))
            yield part, slice(part.start * r, part.stop * r)
