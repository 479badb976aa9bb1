"""Activation checkpointing: what backward computes again instead of keeping."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bone_ds.arch import Architecture
from bone_ds.bone.layer import BoneLinear


def apply(model: nn.Module, architecture: Architecture, policy: str) -> None:
    """`none`: nothing. `bone`: every Bone layer keeps its input alone. `layer`: every residual block keeps its input alone."""
    for module in _recomputed(model, architecture, policy):
        # Non-reentrant: a reentrant one sees only frozen inputs and gives the adapters no gradient.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def _recomputed(model: nn.Module, architecture: Architecture, policy: str) -> list[nn.Module]:
    if policy == "layer":
        return [layer for _, layer in architecture.layers(model)]
    if policy == "bone":
        # The other strategies keep nothing but their input already.
        return [module for module in model.modules() if isinstance(module, BoneLinear) and module.strategy == "materialized"]
    return []
