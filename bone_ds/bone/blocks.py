"""Matrices as blocks of r, and operands of products by block.

Suffixes here and where this is used: N rows of x, I in, O out, S a part of in or out, R the block size r, G matrices of B; _GNR has one
(N, r) block of x or y for each matrix of B, _GMR the (M, r) of a weight that each matrix acts on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(x_NI: Tensor, r: int) -> Tensor:
    """(N, in) -> a view (in/r, N, r)."""
    return x_NI.unflatten(1, (-1, r)).transpose(0, 1)


def in_blocks(W_OI: Tensor, r: int) -> Tensor:
    """(out, in) -> a view (out/r, r, in/r, r)."""
    return W_OI.unflatten(1, (-1, r)).unflatten(0, (-1, r))


def block_sum(x_NI: Tensor, r: int) -> Tensor:
    """(N, in) -> (N, r), the sum of x's blocks."""
    return x_NI.unflatten(1, (-1, r)).sum(1)


def operand(x_GNR: Tensor) -> Tensor:
    """For a product by block: in bf16 on a CPU it takes three to eight times as long with strides, and a copy a third of it."""
    return x_GNR.contiguous() if x_GNR.is_cpu else x_GNR


def operand_plus(h_GNR: Tensor, s_NR: Tensor) -> Tensor:
    """h + s in memory of its own, to be an operand; on a CPU a copy and a sum in place are the faster way to a contiguous one."""
    return h_GNR.clone(memory_format=torch.contiguous_format).add_(s_NR) if h_GNR.is_cpu else h_GNR + s_NR


def factor_and_term(B: Tensor) -> tuple[Tensor, Tensor]:
    """A and C of W A + C, each (G, r, r): the two of `unconstrained`, (2, G, r, r), and B as both of them in `affine`, (G, r, r)."""
    return (B[0], B[1]) if B.dim() == 4 else (B, B)
