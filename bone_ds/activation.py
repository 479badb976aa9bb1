"""Activation checkpointing: what backward computes again instead of keeping."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from bone_ds.activation_policy import ActivationPolicy
from bone_ds.arch import Architecture
from bone_ds.bone.layer import BoneLinear
from bone_ds.errors import ConfigError


def apply(model: nn.Module, architecture: Architecture, policy: ActivationPolicy) -> None:
    """Makes the modules that the policy names keep nothing but their inputs; results are equal to the bit.

    Called after `inject`. Raises ConfigError for layers or modules that the model lacks.
    """
    outer = _layers_or_modules(model, architecture, policy) if policy.layer else {}
    inner = _bone_layers(model) if policy.bone else {}
    for name, module in (outer | inner).items():
        # Within a module that is recomputed itself nothing is kept, so there is nothing to move.
        enclosed = any(name.startswith(f"{other}.") for other in outer)
        module.forward = _recomputed(module.forward, policy.cpu_checkpointing and not enclosed)


def check(model: nn.Module, architecture: Architecture, policy: ActivationPolicy) -> None:
    """Raises what `apply` would, and changes nothing."""
    if policy.layer:
        _layers_or_modules(model, architecture, policy)


def _recomputed(forward: Callable, on_cpu: bool) -> Callable:
    def recomputed(*args, **kwargs):
        names, positional = tuple(kwargs), len(args)

        def by_position(*values):
            return forward(*values[:positional], **dict(zip(names, values[positional:])))

        # By position: arguments by keyword are kept aside, where neither the host nor an enclosing checkpoint takes them.
        # Non-reentrant: a reentrant one sees only frozen inputs and gives the adapters no gradient.
        with save_on_cpu(pin_memory=_on_accelerator(args, kwargs)) if on_cpu else nullcontext():
            return checkpoint(by_position, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)

    return recomputed


def _on_accelerator(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in (*args, *kwargs.values()))


def _layers_or_modules(model: nn.Module, architecture: Architecture, policy: ActivationPolicy) -> dict[str, nn.Module]:
    """By full name: the layers the policy takes, or its modules in them."""
    layers = architecture.layers(model)
    chosen = _chosen(layers, policy)
    if policy.modules is None:
        return dict(chosen)
    _check_modules(architecture, layers, policy.modules)
    return {f"{layer_name}.{name}": module for layer_name, layer in chosen
            for name, module in layer.named_modules() if name in policy.modules}


def _chosen(layers: list, policy: ActivationPolicy) -> list:
    """The first is always among them: what the last ones keep is needed first in backward."""
    count = len(layers)
    asked = policy.number_checkpoints or policy.every
    if asked > count:
        field = "number_checkpoints" if policy.number_checkpoints else "every (train.recompute_every)"
        raise ConfigError(f"activation_checkpointing.{field}: {asked} is more than the model's {count} layers")
    if policy.number_checkpoints:
        return [layers[index * count // asked] for index in range(asked)]
    return layers[::asked]


def _check_modules(architecture: Architecture, layers: list, names: tuple[str, ...]) -> None:
    known = list(dict.fromkeys(name for _, layer in layers for name, _ in layer.named_modules() if name))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"activation_checkpointing.modules (train.recompute_modules): a layer of {architecture.name} has no "
                              f"{name!r}, choose among {', '.join(known)}{hint}")


def _bone_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, BoneLinear) and _keeps_more_than_its_input(module)}


def _keeps_more_than_its_input(layer: BoneLinear) -> bool:
    """materialized keeps weights; left, factored, its product in place of its input."""
    keeps_output = layer.grouping == "left" and layer.strategy in ("auto", "factored")
    return layer.strategy == "materialized" or keeps_output and layer.out_features > layer.in_features
