"""Puts Bone on the linear modules of a model, as PEFT's tuners put their methods."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from bone_ds.errors import InjectionError
from bone_ds.hugging_face.config import BoneConfig
from bone_ds.hugging_face.layer import AdaptedLinear


class BoneTuner(BaseTuner):
    """A model whose targeted nn.Linear modules are `AdaptedLinear`; `BoneModel` holds one as its `base_model`."""

    block_name = "bone_block"
    # PEFT looks for it anywhere in a module's name; without the dot `backbone_blocks` would hold it.
    prefix = f".{block_name}"
    tuner_layer_cls = AdaptedLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As PEFT's, but where one layer can't be adapted all others are as they were."""
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
            _check_linear(target)
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


def _check_linear(target: nn.Module) -> None:
    if not isinstance(target, nn.Linear):
        raise InjectionError(f"is a {type(target).__name__}, Bone adapts nn.Linear modules; name those alone")
    if getattr(getattr(target, "_hf_hook", None), "offload", False):
        raise InjectionError("its weight is offloaded, Bone reads it directly; load the model without offloading")
    if not target.weight.is_floating_point():
        raise InjectionError(f"its weight is quantised ({str(target.weight.dtype).removeprefix('torch.')}), Bone adapts weights in "
                             "floating point; load the model unquantised")


def _take_back(model: nn.Module, adapter_name: str) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            layer.remove(adapter_name)
            if not layer.bone_block:
                model.set_submodule(name, layer.base_layer)
