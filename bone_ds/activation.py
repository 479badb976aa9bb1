"""Activation checkpointing: what backward computes again instead of keeping."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bone_ds.arch import Architecture
from bone_ds.bone.layer import BoneLinear


def apply(model: nn.Module, architecture: Architecture, policy: str) -> None:
    """`none`: nothing. `bone`: every Bone layer keeps its input alone. `layer`: every residual block keeps its input alone."""
    if policy == "layer":
        for _, layer in architecture.layers(model):
            # Non-reentrant: a reentrant one sees only frozen inputs and gives the adapters no gradient.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    elif policy == "bone":
        for module in model.modules():
            # Fused and factored keep nothing but their input already.
            if isinstance(module, BoneLinear) and module.strategy == "materialized":
                module.strategy = "checkpointed"
