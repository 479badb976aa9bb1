"""The linear modules of an RWKV6 block and where the blocks are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

TARGETS = ("att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.receptance", "ffn.value")


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The residual blocks in order, with their module names in `model`."""
    return [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
