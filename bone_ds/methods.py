"""The adapter methods bone and lora: what each puts on a linear layer, and the weight it amounts to."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor, nn

from bone_ds.bone.grouping import bone_shape, divisors, fits, largest_common_block
from bone_ds.bone.layer import BoneLinear
from bone_ds.bone.reference import adapted_weight
from bone_ds.config import AdapterConfig
from bone_ds.errors import InjectionError


def adapt(model: nn.Module, linears: dict[str, nn.Linear], adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    """Puts the adapter on the named linears of a frozen model; returns its trainable parameters by adapter name."""
    return _adapt_with_bone(model, linears, adapter) if adapter.method == "bone" else _adapt_with_lora(model, linears, adapter)


def merged_weight(weight: Tensor, tensors: dict[str, Tensor], adapter: AdapterConfig) -> Tensor:
    """The adapted weight of one layer in fp32: weight (out, in), tensors by their last name (bone; lora_A, lora_B)."""
    weight = weight.float()
    if adapter.method == "bone":
        return adapted_weight(weight, tensors["bone"].float(), adapter.grouping, adapter.form)
    return weight + lora_scale(adapter) * (tensors["lora_B"].float() @ tensors["lora_A"].float())


def lora_scale(adapter: AdapterConfig) -> float:
    return (adapter.alpha or adapter.rank) / adapter.rank


def _adapt_with_bone(model: nn.Module, linears: dict[str, nn.Linear], adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    check(linears, adapter)
    trainable = {}
    for name, linear in linears.items():
        layer = BoneLinear(linear, adapter.rank, adapter.grouping, adapter.strategy, form=adapter.form, groups=adapter.groups)
        _replace(model, name, layer)
        trainable[f"{name}.bone"] = layer.bone
    return trainable


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def check(linears: dict[str, nn.Linear], adapter: AdapterConfig) -> None:
    """Raises InjectionError where Bone's block size, or its number of groups, does not fit every layer; LoRA's rank fits any."""
    if adapter.method != "bone":
        return
    by_shape = defaultdict(list)
    for name, linear in linears.items():
        by_shape[linear.out_features, linear.in_features].append(name)
    misfits = {shape: names for shape, names in by_shape.items() if not fits(adapter.grouping, *shape, adapter.rank, adapter.groups)}
    if misfits:
        named = "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({out} x {in_})"
                          for (out, in_), names in misfits.items())
        raise InjectionError(_misfit(adapter, list(by_shape), named))


def _misfit(adapter: AdapterConfig, shapes: list[tuple[int, int]], named: str) -> str:
    """Which field does not fit the layers that are named, and what would fit all of these (out, in)."""
    if adapter.grouping == "miss":
        largest = min(in_features for _, in_features in shapes)
        return f"adapter.rank: {adapter.rank} is more than the inputs of {named}; the largest that fits every target: {largest}"
    sizes = largest_common_block(shapes)
    if adapter.rank not in sizes:
        usable = ", ".join(map(str, sizes[:4]))
        return f"adapter.rank: {adapter.rank} does not divide {named}\nThe largest block sizes that fit every target: {usable}"
    usable = divisors(math.gcd(*(out * in_ // adapter.rank**2 for out, in_ in shapes)))
    return (f"adapter.groups: {adapter.groups} does not divide the number of blocks of {adapter.rank} x {adapter.rank} in {named}\n"
            f"The largest that fit every target: {', '.join(map(str, usable[:8]))}")


def trainable_parameters(linears: dict[str, nn.Linear], adapter: AdapterConfig, rank: int) -> int:
    """How many the adapter would train at a rank that fits."""
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    if adapter.method == "bone":
        return sum(math.prod(bone_shape(adapter.grouping, *shape, rank, adapter.form, adapter.groups)) for shape in shapes)
    return sum(rank * sum(shape) for shape in shapes)


def largest_rank(linears: dict[str, nn.Linear], adapter: AdapterConfig) -> int:
    """The largest that trains at most adapter.parameters; Bone's block size fits every layer too. InjectionError if 1 is too large."""
    budget = adapter.parameters
    check(linears, adapter.model_copy(update={"rank": 1}))
    smallest = trainable_parameters(linears, adapter, 1)
    if budget < smallest:
        raise InjectionError(f"adapter.parameters: {budget} are too few for these targets and layers: rank 1 trains {smallest}")
    if adapter.method == "lora":
        return budget // smallest
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    if adapter.grouping == "miss":
        return min(budget // smallest, *(in_features for _, in_features in shapes))
    sizes = [size for size in largest_common_block(shapes) if all(fits(adapter.grouping, *shape, size, adapter.groups) for shape in shapes)]
    return next(size for size in sizes if trainable_parameters(linears, adapter, size) <= budget)


def _adapt_with_lora(model: nn.Module, linears: dict[str, nn.Linear], adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    dtype = next(iter(linears.values())).weight.dtype
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha or adapter.rank, target_modules=list(linears), lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    trainable = {}
    for name in linears:
        layer = model.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            module = getattr(layer, part)["default"].to(dtype)
            trainable[f"{name}.{part}"] = module.weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return trainable
