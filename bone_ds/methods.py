"""The adapter methods bone and lora: what each puts on a linear layer, and the weight it amounts to."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from bone_ds.bone.grouping import fits, largest_common_block
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
        return adapted_weight(weight, tensors["bone"].float(), adapter.grouping)
    return weight + lora_scale(adapter) * (tensors["lora_B"].float() @ tensors["lora_A"].float())


def lora_scale(adapter: AdapterConfig) -> float:
    return (adapter.alpha or adapter.rank) / adapter.rank


def _adapt_with_bone(model: nn.Module, linears: dict[str, nn.Linear], adapter: AdapterConfig) -> dict[str, nn.Parameter]:
    check(linears, adapter)
    trainable = {}
    for name, linear in linears.items():
        layer = BoneLinear(linear, adapter.rank, adapter.grouping, adapter.strategy)
        _replace(model, name, layer)
        trainable[f"{name}.bone"] = layer.bone
    return trainable


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def check(linears: dict[str, nn.Linear], adapter: AdapterConfig) -> None:
    """Raises InjectionError where Bone's block size does not divide every layer; LoRA's rank fits any."""
    if adapter.method != "bone":
        return
    shapes = defaultdict(list)
    for name, linear in linears.items():
        shapes[linear.out_features, linear.in_features].append(name)
    misfits = {shape: names for shape, names in shapes.items() if not fits(adapter.grouping, *shape, adapter.rank)}
    if misfits:
        named = "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({out} x {in_})"
                          for (out, in_), names in misfits.items())
        usable = ", ".join(map(str, largest_common_block(list(shapes))[:4]))
        raise InjectionError(
            f"adapter.rank: {adapter.rank} does not divide {named}\nThe largest block sizes that fit every target: {usable}")


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
