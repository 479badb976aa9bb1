"""What lies in a model's directory or GGUF file, from headers alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

from transformers import LlamaConfig

from bone_ds.arch import Inventory
from bone_ds.config import ModelConfig
from llama_adapters import checks, gguf_conversion, weights
from llama_adapters.weights import OutlinedSource

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "max_position_embeddings")


def inventory(model: ModelConfig) -> Inventory:
    """Of a directory or .gguf on this machine. Raises CheckpointError where it is not whole."""
    place = Path(os.path.expanduser(model.path))
    if place.is_dir():
        source = weights.open(model)
        config = weights.config_of(source)
        stored = checks.check_tensors(config, checks.read_tensors(source.path), source.path).values()
        return Inventory(source, _sizes(config), _by_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in stored))
    config, tensors = gguf_conversion.read(place)
    source = OutlinedSource(path=place, origin=model.path, revision=None, fingerprint="", config=config)
    return Inventory(source, _sizes(config), _by_dtype((tensor.tensor_type.name, int(tensor.n_elements)) for tensor in tensors.values()))


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _SIZES}


def _by_dtype(parameters) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for dtype, count in parameters:
        counts[dtype] += count
    return dict(counts.most_common())
