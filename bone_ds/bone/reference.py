"""The Bone product as the paper writes it: what every strategy is tested against. Clear rather than fast, any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bone_ds.bone.grouping import named


def adapted_weight(W: Tensor, B: Tensor, grouping: str) -> Tensor:
    """W (out, in), B (G, r, r) of the same dtype -> W' (out, in).

    W'_ab = W_ab + W_ab B_g + B_g, g the block's matrix: paper eq. 7 and 10, whose difference is the grouping. In `left`, which
    is not the paper's, B_g W_ab.
    """
    (out_features, in_features), r = W.shape, B.shape[-1]
    blocks = W.reshape(out_features // r, r, in_features // r, r).permute(0, 2, 1, 3)
    how = named(grouping)
    bone = how.over_blocks(B)
    delta = how.product(blocks, bone) + bone
    return W + delta.permute(0, 2, 1, 3).reshape(out_features, in_features)


def bone_linear(x: Tensor, W: Tensor, B: Tensor, grouping: str, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> x W'^T + bias (..., out), paper eq. 1."""
    return F.linear(x, adapted_weight(W, B, grouping), bias)
