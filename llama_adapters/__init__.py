"""LLaMA models: `ARCHITECTURE` is what `bone_ds.arch` asks for.

Importing the package is cheap; torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapters.targets import TARGETS, layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bone_ds.arch import Placement, Source
    from bone_ds.config import ModelConfig


class Llama:
    """`bone_ds.arch.Architecture` for Hugging Face Llama directories, hub ids and GGUF files."""

    name = "llama"
    targets = TARGETS

    def recognises(self, path: str) -> bool:
        from llama_adapters import weights

        return weights.recognises(path)

    def open(self, model: ModelConfig) -> Source:
        from llama_adapters import weights

        return weights.open(model)

    def tokenizer(self, source: Source):
        from llama_adapters import weights

        return weights.tokenizer(source)

    def build(self, source: Source, dtype: torch.dtype) -> nn.Module:
        from llama_adapters import weights

        return weights.build(source, dtype)

    def load(self, model: nn.Module, source: Source, placement: Placement) -> None:
        from llama_adapters import weights

        weights.load(model, source, placement)

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return layers(model)

    def hidden(self, model: nn.Module, tokens: Tensor, document_lengths: tuple[int, ...]) -> Tensor:
        from llama_adapters import attention

        return attention.hidden(model, tokens, document_lengths)

    def head(self, model: nn.Module) -> nn.Parameter:
        return model.lm_head.weight

    def weight_files(self, source: Source) -> list[Path]:
        from llama_adapters import weights

        return weights.weight_files(source)


ARCHITECTURE = Llama()
