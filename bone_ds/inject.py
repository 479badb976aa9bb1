"""Freezes the base model and puts an adapter on the targets that the config selects."""

from __future__ import annotations

import difflib

from torch import nn

from bone_ds import methods
from bone_ds.arch import Architecture
from bone_ds.config import AdapterConfig
from bone_ds.errors import InjectionError


def inject(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    """Adapts the model in place; returns the trainable parameters by adapter name, in model order.

    A name is the module's with the tensor's, for example `model.layers.0.self_attn.q_proj.bone`.
    Raises InjectionError for targets or layers that the model lacks, and where the rank fits not every layer.
    """
    linears = select(model, architecture, adapter)
    model.requires_grad_(False)
    return methods.adapt(model, linears, adapter)


def check(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> None:
    """Raises what `inject` would, and changes nothing."""
    methods.check(select(model, architecture, adapter), adapter)


def select(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> dict[str, nn.Linear]:
    """The linear modules to adapt, by their full names, in model order."""
    targets = _targets(architecture, adapter)
    layers = architecture.layers(model)
    first, last = adapter.layers or (0, len(layers))
    if last > len(layers):
        raise InjectionError(f"adapter.layers: [{first}, {last}] goes past the model's {len(layers)} layers")
    selected = {}
    for layer_name, layer in layers[first:last]:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and any(name == t or name.endswith("." + t) for t in targets):
                selected[f"{layer_name}.{name}"] = module
    return selected


def _targets(architecture: Architecture, adapter: AdapterConfig) -> tuple[str, ...]:
    for target in adapter.targets or ():
        if target not in architecture.targets:
            near = difflib.get_close_matches(target, architecture.targets, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InjectionError(
                f"adapter.targets: {architecture.name} has no {target!r}, choose among {', '.join(architecture.targets)}{hint}")
    return adapter.targets or architecture.targets
