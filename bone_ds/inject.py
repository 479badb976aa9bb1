"""Freezes the base model and adds what the config's method trains, where it says."""

from __future__ import annotations

import difflib

from torch import nn

from bone_ds import methods
from bone_ds.arch import Architecture
from bone_ds.config import AdapterConfig
from bone_ds.errors import InjectionError


def inject(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    """Adapts the model in place; returns the trainable parameters by adapter name, in model order.

    A name is the module's with the tensor's, for example `model.layers.0.self_attn.q_proj.bone`; with `full`, the weight's.
    Raises InjectionError for targets or layers that the model lacks, and where the rank fits not every layer.
    """
    adapter = with_rank(model, architecture, adapter)
    check(model, architecture, adapter)
    if adapter.method == "full":
        model.requires_grad_(True)
        return dict(model.named_parameters())
    model.requires_grad_(False)
    if adapter.method == "state":
        return architecture.add_initial_state(model, *_layer_range(model, architecture, adapter))
    return methods.adapt(model, select(model, architecture, adapter), adapter)


def with_rank(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> AdapterConfig:
    """The adapter with the rank that adapter.parameters asks for; as it is where none are named. The model's shapes are enough.

    Raises InjectionError where no rank trains so few, and for another rank that is given beside.
    """
    if adapter.parameters is None:
        return adapter
    rank = methods.largest_rank(select(model, architecture, adapter), adapter)
    if adapter.has_rank and adapter.rank != rank:
        raise InjectionError(f"adapter.rank: {adapter.rank} is given beside adapter.parameters: {adapter.parameters}, "
                             f"which choose {rank}; remove one")
    return adapter.model_copy(update={"rank": rank})


def check(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> None:
    """Raises what `inject` would, and changes nothing."""
    adapter = with_rank(model, architecture, adapter)
    if adapter.method == "state" and not architecture.carries_state:
        raise InjectionError(f"adapter.method: 'state' trains a state that documents begin with, {architecture.name} has none; use bone")
    if adapter.method in ("state", "full"):
        _layer_range(model, architecture, adapter)
    else:
        methods.check(select(model, architecture, adapter), adapter)


def select(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> dict[str, nn.Linear]:
    """The linear modules to adapt, by their full names, in model order."""
    targets = _targets(architecture, adapter)
    first, last = _layer_range(model, architecture, adapter)
    selected = {}
    for layer_name, layer in architecture.layers(model)[first:last]:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and any(name == t or name.endswith("." + t) for t in targets):
                selected[f"{layer_name}.{name}"] = module
    return selected


def _layer_range(model: nn.Module, architecture: Architecture, adapter: AdapterConfig) -> tuple[int, int]:
    count = len(architecture.layers(model))
    first, last = adapter.layers or (0, count)
    if last > count:
        raise InjectionError(f"adapter.layers: [{first}, {last}] goes past the model's {count} layers")
    return first, last


def _targets(architecture: Architecture, adapter: AdapterConfig) -> tuple[str, ...]:
    for target in adapter.targets or ():
        if target not in architecture.targets:
            near = difflib.get_close_matches(target, architecture.targets, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InjectionError(
                f"adapter.targets: {architecture.name} has no {target!r}, choose among {', '.join(architecture.targets)}{hint}")
    return adapter.targets or architecture.targets
