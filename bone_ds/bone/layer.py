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
    ):
        """Takes the parameters of `linear` over and freezes them; `dtype` is bone's, by default the weight's.

        Raises InjectionError if blocks of r x r don't cut the layer, or strategy and grouping don't go together.
        """
        super().__init__()
        # Not weight.shape: a weight that ZeRO-3 has partitioned is empty here.
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.grouping, self.strategy = r, grouping, strategy
        self._product = resolve(strategy, grouping)
        self._check_block_size()

        self.weight, self.bias = linear.weight, linear.bias
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        shape = bone_shape(grouping, self.out_features, self.in_features, r)
        self.bone = nn.Parameter(torch.zeros(shape, dtype=dtype or self.weight.dtype, device=self.weight.device))
        self.train(linear.training)

    def _check_block_size(self) -> None:
        if not fits(self.grouping, self.out_features, self.in_features, self.r):
            sizes = largest_common_block([(self.out_features, self.in_features)])
            raise InjectionError(
                f"Bone block size r={self.r} does not divide a layer of (out, in) = "
                f"({self.out_features}, {self.in_features}); these do: {', '.join(map(str, sizes))}"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bone, self.bias)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' (out, in), computed in fp32 or wider, returned in `dtype`. Under ZeRO-3 gather the parameters first."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return adapted_weight(self.weight.to(wide), self.bone.to(wide), self.grouping).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, grouping={self.grouping}, strategy={self.strategy}"
        )
