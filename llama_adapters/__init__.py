"""LLaMA models: `ARCHITECTURE` is what `bone_ds.arch` asks for.

Importing the package is cheap; torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapters.targets import TARGETS, layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bone_ds.arch import Inventory, Placement, Reading, Source, State
    from bone_ds.checksums import Checksums
    from bone_ds.config import ModelConfig


class Llama:
    """`bone_ds.arch.Architecture` for Hugging Face Llama directories, hub ids and GGUF files."""

    name = "llama"
    targets = TARGETS
    carries_state = False
    kinds = {"self_attn": "attention", "mlp": "mlp"}

    def recognises(self, path: str) -> bool:
        from llama_adapters import weights

        return weights.recognises(path)

    def open(self, model: ModelConfig) -> Source:
        from llama_adapters import weights

        return weights.open(model)

    def outline(self, model: ModelConfig) -> Source:
        from llama_adapters import published

        return published.outline(model)

    def without_weights(self, model: ModelConfig) -> Source:
        from llama_adapters import published

        return published.without_weights(model)

    def inventory(self, model: ModelConfig) -> Inventory:
        from llama_adapters import inventory

        return inventory.inventory(model)

    def tokenizer(self, source: Source):
        from llama_adapters import weights

        return weights.tokenizer(source)

    def context_length(self, source: Source) -> int:
        from llama_adapters import weights

        return weights.config_of(source).max_position_embeddings

    def build(self, source: Source, dtype: torch.dtype) -> nn.Module:
        from llama_adapters import weights

        return weights.build(source, dtype)

    def load(self, model: nn.Module, source: Source, placement: Placement, checksums: Checksums | None = None) -> None:
        from llama_adapters import weights

        weights.load(model, source, placement, checksums)

    def keep_as_on(self, model: nn.Module, device: str) -> None:
        from llama_adapters import attention

        if device == "cuda":
            model.config._attn_implementation = attention.AS_ON_CUDA

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return layers(model)

    def hidden(self, model: nn.Module, tokens: Tensor, document_lengths: tuple[int, ...], state: State | None = None,
               keep_state: slice | None = None) -> tuple[Tensor, None]:
        from llama_adapters import attention

        assert state is None and keep_state is None, "attention carries no state"
        return attention.hidden(model, tokens, document_lengths), None

    def add_initial_state(self, model: nn.Module, first_layer: int, last_layer: int) -> dict[str, nn.Parameter]:
        raise AssertionError("attention carries no state")

    def head(self, model: nn.Module) -> nn.Parameter:
        return model.lm_head.weight

    def reading(self, model: nn.Module, documents: int) -> Reading:
        from llama_adapters import generation

        return generation.Reading(model, documents)

    def rewrite(self, source: Source, out: Path, change: Callable[[str, Tensor], Tensor],
                added: Mapping[str, Tensor], checksums: Checksums | None = None) -> None:
        from llama_adapters import rewriting

        assert not added, "a Llama has no tensors but its own"
        rewriting.rewrite(source, out, change, checksums)


ARCHITECTURE = Llama()
