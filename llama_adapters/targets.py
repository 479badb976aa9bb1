"""The linear modules of a Llama block and where the blocks are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The residual blocks in order, with their module names in `model`."""
    return [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
