"""RWKV6 (x060) models: `ARCHITECTURE` is what `bone_ds.arch` asks for.

Importing the package is cheap; torch comes with the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_adapters.targets import TARGETS, layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bone_ds.arch import Inventory, Placement, Reading, Source, State
    from bone_ds.checksums import Checksums
    from bone_ds.config import ModelConfig


class Rwkv:
    """`bone_ds.arch.Architecture` for RWKV6 in official .pth files, and safetensors files of the same tensors."""

    name = "rwkv"
    targets = TARGETS
    carries_state = True
    kinds = {"att": "attention", "ffn": "mlp"}

    def recognises(self, path: str) -> bool:
        return Path(path).suffix in (".pth", ".safetensors")

    def open(self, model: ModelConfig) -> Source:
        from rwkv_adapters import weights

        return weights.open(model)

    def outline(self, model: ModelConfig) -> Source:
        from rwkv_adapters import published

        return published.outline(model)

    def without_weights(self, model: ModelConfig) -> Source:
        return self.outline(model)

    def inventory(self, model: ModelConfig) -> Inventory:
        from rwkv_adapters import weights

        return weights.inventory(model)

    def tokenizer(self, source: Source):
        from rwkv_adapters import tokenizer

        return tokenizer.tokenizer(source)

    def context_length(self, source: Source) -> None:
        return None

    def build(self, source: Source, dtype: torch.dtype) -> nn.Module:
        from rwkv_adapters import weights

        return weights.build(source, dtype)

    def load(self, model: nn.Module, source: Source, placement: Placement, checksums: Checksums | None = None) -> None:
        from rwkv_adapters import weights

        weights.load(model, source, placement, checksums)

    def keep_as_on(self, model: nn.Module, device: str) -> None:
        if device == "cuda":
            for _, layer in layers(model):
                layer.att.wkv = "chunked"  # keeps as many bytes as fla's kernel does, see `wkv6.fla`

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return layers(model)

    def hidden(self, model: nn.Module, tokens: Tensor, document_lengths: tuple[int, ...], state: State | None = None,
               keep_state: slice | None = None) -> tuple[Tensor, State | None]:
        return model.hidden(tokens, document_lengths, state, keep_state)

    def head(self, model: nn.Module) -> nn.Parameter:
        return model.head.weight

    def add_initial_state(self, model: nn.Module, first_layer: int, last_layer: int) -> dict[str, nn.Parameter]:
        return model.add_initial_state(first_layer, last_layer)

    def reading(self, model: nn.Module, documents: int) -> Reading:
        from rwkv_adapters import generation

        return generation.Reading(model, documents)

    def rewrite(self, source: Source, out: Path, change: Callable[[str, Tensor], Tensor],
                added: Mapping[str, Tensor], checksums: Checksums | None = None) -> None:
        from rwkv_adapters import rewriting

        rewriting.rewrite(source, out, change, added, checksums)


ARCHITECTURE = Rwkv()
