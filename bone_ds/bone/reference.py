"""The Bone product as the paper writes it: what every strategy is tested against. Clear rather than fast, any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bone_ds.bone import form as forms
from bone_ds.bone.blocks import in_blocks
from bone_ds.bone.grouping import named


def adapted_weight(W: Tensor, B: Tensor, grouping: str, form: str = "affine") -> Tensor:
    """W (out, in), B (G, r, r) of the same dtype -> W' (out, in); B (2, G, r, r) in the form unconstrained, (r, out) in the grouping miss.

    W'_ab = W_ab + W_ab B_g + B_g, g the block's matrix: paper eq. 7 and 10, whose difference is the grouping. In `left`, which
    is not the paper's, B_g W_ab. Forms: paper eq. 11 and 12.
    """
    how, its_form = named(grouping), forms.named(form, grouping)
    if grouping == "miss":
        shards = -(-W.shape[1] // len(B))
        return W + B.t().repeat(1, shards)[:, :W.shape[1]]
    r = B.shape[-1]
    blocks = in_blocks(W, r).transpose(1, 2)
    bone = how.over_blocks(B, range(blocks.shape[0]), range(blocks.shape[1]), blocks.shape[1])
    delta = its_form.change(blocks, bone, how.product)
    return W + delta.transpose(1, 2).reshape(W.shape)


def bone_linear(x: Tensor, W: Tensor, B: Tensor, grouping: str, bias: Tensor | None = None, form: str = "affine") -> Tensor:
    """x (..., in) -> x W'^T + bias (..., out), paper eq. 1."""
    return F.linear(x, adapted_weight(W, B, grouping, form), bias)
