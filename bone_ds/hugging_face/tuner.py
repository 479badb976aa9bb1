"""Puts Bone on the linear modules of a model, as PEFT's tuners put their methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from bone_ds.errors import ConfigError, InjectionError
from bone_ds.hugging_face.config import NEW_HEADS, BoneConfig
from bone_ds.hugging_face.layer import AdaptedLinear

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BoneTuner(BaseTuner):
    """A model whose targeted nn.Linear modules are `AdaptedLinear`; `BoneModel` holds one as its `base_model`."""

    block_name = "bone_block"
    # PEFT looks for it anywhere in a module's name; without the dot `backbone_blocks` would hold it.
    prefix = f".{block_name}"
    tuner_layer_cls = AdaptedLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As PEFT's, but where one layer can't be adapted all others are as they were."""
        _check_modules_to_save(model, self.peft_config[adapter_name])
        with frozen_as_before_on_error(model):
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except Exception:
                _take_back(model, adapter_name)
                raise

    def _create_and_replace(self, config: BoneConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
                            current_key: str, **_: Any) -> None:
        try:
            if isinstance(target, AdaptedLinear):
                target.update_layer(adapter_name, config)
                return
            _check_linear(target, parent)
            layer = AdaptedLinear(target, adapter_name, config)
        except InjectionError as error:
            raise InjectionError(f"target_modules: {current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32 in place of bf16 and fp16. PEFT's would make a frozen adapter trainable by it."""
        for module in self.model.modules():
            if isinstance(module, AdaptedLinear) and autocast_adapter_dtype:
                module.widen(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator[None]:
        if adapter_names is not None:
            raise ConfigError(f"adapter_names: {adapter_names!r}: a batch that mixes adapters is not supported; choose by set_adapter")
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but where one layer can't be merged none is. Raises ValueError, InjectionError."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
                                     adapter_names: list[str] | None = None) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        owners = _owners(self.model)
        for name, layer in self.model.named_modules():
            if not isinstance(layer, AdaptedLinear) or not layer.to_merge(adapter_names):
                continue
            others = [owner for owner in owners[layer.base_layer.weight] if owner != f"{name}.base_layer"]
            if others:
                raise InjectionError(f"{name}: its weight is that of {others[0].removesuffix('.base_layer')} too, which merging would "
                                     "change; use the adapter unmerged, or untie the weights first")
            if safe_merge:
                layer.check_merge(adapter_names)

    def unload(self) -> nn.Module:
        """The base model with its own weights, and without adapters."""
        for module in self.model.modules():
            if isinstance(module, AdaptedLinear) and module.merged:
                module.unmerge()
        return super().unload()

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config: BoneConfig, adapter_name: str,
                                           state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's keys to the model's; those of MiSS files too."""
        renamed = {name.removesuffix(".miss_block") + cls.prefix if name.endswith(".miss_block") else name: tensor
                   for name, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)


@contextmanager
def frozen_as_before_on_error(model: nn.Module) -> Iterator[None]:
    """Where the body raises, the parameters that were there before require gradients as they did."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise


def _check_modules_to_save(model: nn.Module, config: BoneConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for wanted in set(config.modules_to_save or ()).difference(NEW_HEADS.get(config.task_type, ())):
        if not any(name.endswith(wanted) for name in names):
            raise InjectionError(f"modules_to_save: {wanted!r} is the ending of no module's name")


def _check_linear(target: nn.Module, parent: nn.Module) -> None:
    if not isinstance(target, nn.Linear):
        raise InjectionError(f"is a {type(target).__name__}, Bone adapts nn.Linear modules; name those alone")
    if parametrize.is_parametrized(target):
        raise InjectionError("its weight is parametrized, Bone adapts plain weights; remove the parametrization or exclude the module")
    if getattr(getattr(target, "_hf_hook", None), "offload", False):
        raise InjectionError("its weight is offloaded, Bone reads it directly; load the model without offloading")
    if target.weight.dtype not in _DTYPES or type(target.weight) not in (nn.Parameter, Tensor):
        told = str(target.weight.dtype).removeprefix("torch.")
        kind = "" if type(target.weight) in (nn.Parameter, Tensor) else f", {type(target.weight).__name__}"
        raise InjectionError(f"its weight is quantised ({told}{kind}), Bone adapts plain weights in float16, bfloat16, float32 or float64; "
                             "load the model unquantised")
    _check_call(target, parent)


def _check_call(target: nn.Linear, parent: nn.Module) -> None:
    """That the layer's result is the plain product alone, and that its module is what computes it."""
    if isinstance(target, NonDynamicallyQuantizableLinear) or isinstance(parent, nn.TransformerEncoderLayer):
        raise InjectionError(f"its {type(parent).__name__} reads the weight without calling the layer, so that an adapter would be left "
                             "out; exclude it")
    own_forward = "forward" in vars(target) and not hasattr(target, "_hf_hook")
    if own_forward or type(target).forward is not nn.Linear.forward:
        raise InjectionError(f"is a {type(target).__name__} with a forward of its own, which Bone would leave out; exclude it")
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if any(getattr(target, kind) for kind in hooks):
        raise InjectionError("has hooks (weight_norm and spectral_norm are such), which Bone would leave out; remove them or exclude it")


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of the modules that hold each parameter."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return owners


def _take_back(model: nn.Module, adapter_name: str) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            layer.remove(adapter_name)
            if not layer.bone_block:
                model.set_submodule(name, layer.base_layer)
