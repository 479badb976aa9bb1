"""A linear layer with Bone adapters by name: PEFT's way of keeping them around the product of `bone_ds.bone`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from bone_ds.bone import BoneLinear, adapted_weight, resolve
from bone_ds.hugging_face.config import BoneConfig


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """Stands in for an nn.Linear, its `base_layer`: x (..., in) -> x W'^T + bias (..., out).

    Several active adapters act in turn, each on the weight that those before it made; for `miss` that is their sum. Where they are merged
    the base layer's weight is W', and the weight as it was is kept beside it: unmerging gives back every bit.
    """

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_config",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: BoneConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.bone_block = nn.ParameterDict()
        self.bone_config: dict[str, BoneConfig] = {}
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BoneConfig) -> None:
        """Adds an adapter, in the weight's dtype. Raises InjectionError where blocks of its size don't cut the layer."""
        alike = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer = BoneLinear(alike, config.r, config.grouping, config.strategy, form=config.form, groups=config.groups)
        block = torch.zeros(layer.bone.shape, dtype=self.weight.dtype, device=self.weight.device)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.bone_config[adapter_name] = config
        self.bone_block[adapter_name] = nn.Parameter(block)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.bone_block]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return self._product(x, active)
        return self._product(self._cast_input_dtype(x, self.weight.dtype), active).to(x.dtype)

    def _product(self, x: Tensor, active: list[str]) -> Tensor:
        # The strategies are for one adapter on a frozen weight.
        if len(active) > 1 or self.weight.requires_grad:
            return F.linear(x, self._adapted(self.weight, active), self.bias)
        config = self.bone_config[active[0]]
        return resolve(config.strategy, config.grouping, config.form)(x, self.weight, self.bone_block[active[0]], self.bias)

    def _adapted(self, weight: Tensor, names: Iterable[str]) -> Tensor:
        """The weight (out, in) with the named adapters, in its dtype."""
        for name in names:
            config = self.bone_config[name]
            weight = adapted_weight(weight, self.bone_block[name].to(weight.dtype), config.grouping, config.form)
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the base layer's weight W' with these adapters, or the active ones: arithmetic in fp32 or wider, one cast.

        Raises ValueError, and changes nothing, where `safe_merge` finds values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bone_block]
        if not names:
            return
        merged = self._merged_weight(names)
        if safe_merge:
            _check_finite(merged, names)
        if self.unmerged_weight is None:
            self.unmerged_weight = self.weight.data
        self.base_layer.weight.data = merged
        self.merged_adapters += names

    def to_merge(self, adapter_names: list[str] | None = None) -> list[str]:
        """Those of these adapters, or of the active ones, that this layer has and that are not merged yet."""
        return [name for name in adapter_names or self.active_adapters
                if name in self.bone_block and name not in self.merged_adapters]

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError where `merge` with `safe_merge` would."""
        names = self.to_merge(adapter_names)
        if names:
            _check_finite(self._merged_weight(names), names)

    def _merged_weight(self, names: list[str]) -> Tensor:
        """(out, in), in the weight's dtype: the unmerged weight with what is merged already, and with these."""
        unmerged = self.weight.data if self.unmerged_weight is None else self.unmerged_weight
        wide = torch.promote_types(unmerged.dtype, torch.float32)
        return self._adapted(unmerged.to(wide), [*self.merged_adapters, *names]).to(unmerged.dtype)

    def unmerge(self) -> None:
        """Puts back the weight that was there before merging."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.weight.data = self.unmerged_weight
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def remove(self, adapter_name: str) -> None:
        """Takes away an adapter that was not used yet; nothing where there is none of the name."""
        if adapter_name in self.bone_block:
            del self.bone_block[adapter_name], self.bone_config[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """The device alone: an fp32 adapter of a bf16 layer keeps its bits."""
        if adapter_name in self.bone_block and not self.bone_block[adapter_name].is_meta:
            self._replace_block(adapter_name, device=device or self.weight.device)

    def widen(self, adapter_name: str) -> None:
        """Keeps an adapter in fp32 where it was in fewer bits."""
        if adapter_name in self.bone_block and self.bone_block[adapter_name].dtype in (torch.bfloat16, torch.float16):
            self._replace_block(adapter_name, dtype=torch.float32)

    def _replace_block(self, adapter_name: str, **changes) -> None:
        block = self.bone_block[adapter_name]
        self.bone_block[adapter_name] = nn.Parameter(block.data.to(**changes), requires_grad=block.requires_grad)

    def __repr__(self) -> str:
        return "bone." + super().__repr__()


def _check_finite(merged: Tensor, names: list[str]) -> None:
    if not torch.isfinite(merged).all():
        raise ValueError(f"the weight merged with {', '.join(names)} holds NaN or infinite values; the adapter seems to be broken")
