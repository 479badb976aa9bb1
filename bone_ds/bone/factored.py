"""Ways to compute y = x W'^T + bias through the input or the output: nothing of the weight's size is built or kept.

Each has `forward` and `backward` as `strategies.FrozenProduct` calls them. Suffixes: see blocks.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bone_ds.bone.blocks import block_sum, blocks, operand, operand_plus

Gradients = tuple[Tensor | None, Tensor | None]


class Row:
    """Bone-row through the input.

    z_b = B_b x_b, then y_a = sum_b W_ab (x_b + z_b) + sum_b z_b: right multiplication of W's blocks acts on x's blocks.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        r = B_GRR.shape[-1]
        x_GNR = operand(blocks(x_NI, r))
        z_GNR = torch.bmm(x_GNR, B_GRR.transpose(1, 2))
        # The big product is added to the small terms, not they to it: y is rounded once.
        y_NO = z_GNR.sum(0).repeat(1, W_OI.shape[0] // r)
        if bias_O is not None:
            y_NO += bias_O
        z_GNR += x_GNR
        return torch.addmm(y_NO, z_GNR.transpose(0, 1).flatten(1), W_OI.t(), out=y_NO), None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """With h = W^T g and t_b = h_b + sum_a g_a: dB_b = t_b x_b^T and dx_b = h_b + B_b^T t_b."""
        r = B_GRR.shape[-1]
        h_NI = g_NO @ W_OI
        h_GNR = blocks(h_NI, r)
        t_GNR = operand_plus(h_GNR, block_sum(g_NO, r))
        dB_GRR = torch.bmm(t_GNR.transpose(1, 2), operand(blocks(x_NI, r))) if need_dB else None
        if not need_dx:
            return None, dB_GRR
        torch.baddbmm(h_GNR, t_GNR, B_GRR, out=h_GNR)
        return h_NI, dB_GRR


class UnconstrainedRow:
    """Row's form W A + C, whose two matrices go ways of their own: z_b = A_b x_b, y_a = sum_b W_ab (x_b + z_b) + sum_b C_b x_b."""

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_2GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        (A_GRR, C_GRR), r = B_2GRR, B_2GRR.shape[-1]
        x_GNR = operand(blocks(x_NI, r))
        y_NO = (x_NI @ C_GRR.transpose(1, 2).flatten(0, 1)).repeat(1, W_OI.shape[0] // r)
        if bias_O is not None:
            y_NO += bias_O
        z_GNR = torch.baddbmm(x_GNR, x_GNR, A_GRR.transpose(1, 2))
        return torch.addmm(y_NO, z_GNR.transpose(0, 1).flatten(1), W_OI.t(), out=y_NO), None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B_2GRR: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """With h = W^T g and s = sum_a g_a: dA_b = h_b x_b^T, dC_b = s x_b^T and dx_b = h_b + A_b^T h_b + C_b^T s."""
        (A_GRR, C_GRR), r = B_2GRR, B_2GRR.shape[-1]
        h_NI, s_NR = g_NO @ W_OI, block_sum(g_NO, r)
        h_GNR = blocks(h_NI, r).clone(memory_format=torch.contiguous_format)
        dB_2GRR = None
        if need_dB:
            dB_2GRR = torch.empty_like(B_2GRR, memory_format=torch.contiguous_format)
            torch.bmm(h_GNR.transpose(1, 2), operand(blocks(x_NI, r)), out=dB_2GRR[0])
            dB_2GRR[1] = blocks(s_NR.t() @ x_NI, r)
        if not need_dx:
            return None, dB_2GRR
        torch.addmm(h_NI, s_NR, C_GRR.transpose(0, 1).flatten(1), out=h_NI)
        torch.baddbmm(blocks(h_NI, r), h_GNR, A_GRR, out=blocks(h_NI, r))
        return h_NI, dB_2GRR


class Left:
    """Bone-left through the output, which it keeps in place of the input.

    With h = W x and t_a = h_a + sum_b x_b: y_a = h_a + B_a t_a, left multiplication of W's blocks acts on the product's blocks.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, B_GRR: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
        r = B_GRR.shape[-1]
        h_NO = x_NI @ W_OI.t()
        h_GNR = blocks(h_NO, r)
        t_GNR = operand_plus(h_GNR, block_sum(x_NI, r))
        if bias_O is not None:
            h_NO += bias_O
        torch.baddbmm(h_GNR, t_GNR, B_GRR.transpose(1, 2), out=h_GNR)
        return h_NO, t_GNR

    def backward(self, g_NO: Tensor, t_GNR: Tensor, W_OI: Tensor, B_GRR: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """With u_a = B_a^T g_a: dB_a = g_a t_a^T and dx = W^T (g + u) + sum_a u_a in every block."""
        r = B_GRR.shape[-1]
        g_GNR = operand(blocks(g_NO, r))
        dB_GRR = torch.bmm(g_GNR.transpose(1, 2), t_GNR) if need_dB else None
        if not need_dx:
            return None, dB_GRR
        u_GNR = torch.bmm(g_GNR, B_GRR)
        dx_NI = u_GNR.sum(0).repeat(1, W_OI.shape[1] // r)
        u_GNR += g_GNR
        return torch.addmm(dx_NI, u_GNR.transpose(0, 1).flatten(1), W_OI, out=dx_NI), dB_GRR


class Free:
    """Free groups as row's: every p-th row of blocks has the same matrices, p = g / gcd(g, in/r), and is a Bone-row of its own.

    Where p is 1, since g divides in/r, the whole layer is one; else a p-th of W at a time is copied together.
    """

    def __init__(self, row: Row | UnconstrainedRow):
        self.row = row

    def forward(self, x_NI: Tensor, W_OI: Tensor, B: Tensor, bias_O: Tensor | None) -> tuple[Tensor, None]:
        rows_of_B, r = self._rows(B, W_OI.shape[1]), B.shape[-1]
        p = len(rows_of_B)
        if p == 1:
            return self.row.forward(x_NI, W_OI, rows_of_B[0], bias_O)
        y_NO = x_NI.new_empty(len(x_NI), len(W_OI))
        for i, B_GRR in enumerate(rows_of_B):
            bias_S = None if bias_O is None else _every(p, i, bias_O, r)
            y_NS, _ = self.row.forward(x_NI, _every(p, i, W_OI, r), B_GRR, bias_S)
            y_NO.unflatten(1, (-1, p, r))[:, :, i] = y_NS.unflatten(1, (-1, r))
        return y_NO, None

    def backward(self, g_NO: Tensor, x_NI: Tensor, W_OI: Tensor, B: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """The sum of the rows' gradients of x, in fp32; those of a matrix are added where it comes again."""
        rows_of_B, r = self._rows(B, W_OI.shape[1]), B.shape[-1]
        p, dx_NI, dB_of_rows = len(rows_of_B), None, []
        for i, B_GRR in enumerate(rows_of_B):
            g_NS = g_NO.unflatten(1, (-1, p, r))[:, :, i].flatten(1)
            part_NI, dB_GRR = self.row.backward(g_NS, x_NI, _every(p, i, W_OI, r), B_GRR, need_dx, need_dB)
            if need_dx and dx_NI is None:
                dx_NI = part_NI if p == 1 else part_NI.to(torch.promote_types(part_NI.dtype, torch.float32))
            elif need_dx:
                dx_NI += part_NI
            dB_of_rows.append(dB_GRR)
        dB = torch.stack(dB_of_rows, -4).flatten(-4, -3).unflatten(-3, (-1, B.shape[-3])).sum(-4) if need_dB else None
        return dx_NI.to(g_NO.dtype) if need_dx else None, dB

    def _rows(self, B: Tensor, in_features: int) -> Tensor:
        """(..., g, r, r) -> (p, ..., in/r, r, r): the matrices of each of p rows of blocks, after which they begin again."""
        g, in_blocks = B.shape[-3], in_features // B.shape[-1]
        times = math.lcm(g, in_blocks) // g
        return B.repeat(*[1] * (B.dim() - 3), times, 1, 1).unflatten(-3, (-1, in_blocks)).movedim(-4, 0)


def _every(p: int, i: int, W_OI: Tensor, r: int) -> Tensor:
    """Of every p rows of blocks the i-th, (out, ...) -> (out/p, ...); a view where p is 1."""
    return W_OI.unflatten(0, (-1, p, r))[:, i].flatten(0, 1)


class Miss:
    """Additive shards: y = x W^T + s D, s the sum of x's shards of r inputs, the last of them filled up with zeros.

    Keeps s (N, r) in place of x.
    """

    def forward(self, x_NI: Tensor, W_OI: Tensor, D_RO: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
        r = len(D_RO)
        missing = -x_NI.shape[1] % r
        s_NR = block_sum(F.pad(x_NI, (0, missing)) if missing else x_NI, r)
        y_NO = s_NR @ D_RO
        if bias_O is not None:
            y_NO += bias_O
        return torch.addmm(y_NO, x_NI, W_OI.t(), out=y_NO), s_NR

    def backward(self, g_NO: Tensor, s_NR: Tensor, W_OI: Tensor, D_RO: Tensor, need_dx: bool, need_dB: bool) -> Gradients:
        """dD = s^T g, and dx = W^T g + D g in every shard."""
        dD_RO = s_NR.t() @ g_NO if need_dB else None
        if not need_dx:
            return None, dD_RO
        (r, _), in_features = D_RO.shape, W_OI.shape[1]
        dx_NI = (g_NO @ D_RO.t()).repeat(1, -(-in_features // r))[:, :in_features]
        return torch.addmm(dx_NI, g_NO, W_OI, out=dx_NI), dD_RO
