"""A linear layer with a Bone adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bone_ds.bone.grouping import bone_shape, fits, largest_common_block
from bone_ds.bone.reference import adapted_weight
from bone_ds.bone.strategies import resolve
from bone_ds.errors import InjectionError


class BoneLinear(nn.Module):
    """Stands in for an nn.Linear: the same `weight` and `bias`, frozen, and a trainable `bone`, zero at first.

    x (..., in) -> x W'^T + bias (..., out); until `bone` moves, what the base layer gives.
    """

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        grouping: str = "row",
        strategy: str = "auto",
        dtype: torch.dtype | None = None,
        form: str = "affine",
        groups: int | None = None,
    ):
        """Takes the parameters of `linear` over and freezes them; `dtype` is bone's, by default the weight's.

        groups: of `free`, the number of its matrices. Raises InjectionError if blocks of r x r, or the groups, don't cut the
        layer, or strategy, grouping and form don't go together.
        """
        super().__init__()
        # Not weight.shape: a weight that ZeRO-3 has partitioned is empty here.
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.grouping, self.strategy, self.form, self.groups = r, grouping, strategy, form, groups
        self._product = resolve(strategy, grouping, form)
        self._check_block_size()

        self.weight, self.bias = linear.weight, linear.bias
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        shape = bone_shape(grouping, self.out_features, self.in_features, r, form, groups)
        self.bone = nn.Parameter(torch.zeros(shape, dtype=dtype or self.weight.dtype, device=self.weight.device))
        self.train(linear.training)

    def _check_block_size(self) -> None:
        if (self.groups is None) == (self.grouping == "free"):
            raise InjectionError(f"Bone grouping {self.grouping!r} with groups={self.groups}: groups is for 'free', which needs it")
        shape = (self.out_features, self.in_features)
        if fits(self.grouping, *shape, self.r, self.groups):
            return
        if self.grouping == "miss":
            raise InjectionError(f"Bone shard size r={self.r} does not fit a layer of (out, in) = {shape}; 1 to {self.in_features} do")
        sizes = largest_common_block([shape])
        if self.r not in sizes:
            raise InjectionError(f"Bone block size r={self.r} does not divide a layer of (out, in) = {shape}; "
                                 f"these do: {', '.join(map(str, sizes))}")
        raise InjectionError(f"Bone groups={self.groups} does not divide the {self.out_features * self.in_features // self.r**2} blocks "
                             f"of {self.r} x {self.r} of a layer of (out, in) = {shape}")

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bone, self.bias)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' (out, in), computed in fp32 or wider, returned in `dtype`. Under ZeRO-3 gather the parameters first."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return adapted_weight(self.weight.to(wide), self.bone.to(wide), self.grouping, self.form).to(dtype)

    def extra_repr(self) -> str:
        form = "" if self.form == "affine" else f", form={self.form}"
        groups = "" if self.groups is None else f", groups={self.groups}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, grouping={self.grouping}{groups}{form}, strategy={self.strategy}"
        )
