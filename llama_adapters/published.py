"""Sizes of published Llama models, so that a run can be planned before the weights are here."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import LlamaConfig

from bone_ds.arch import Source
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from llama_adapters import checks, weights
from llama_adapters.weights import OutlinedSource

_LLAMA2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "max_position_embeddings": 4096}
_LLAMA2_13B = _LLAMA2_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
                            "num_key_value_heads": 40}
_SMOLLM2_135M = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                 "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_SMOLLM2_360M = _SMOLLM2_135M | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
                                 "num_key_value_heads": 5}
_SMOLLM2_1B7 = _SMOLLM2_135M | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                                "num_key_value_heads": 32}
CONFIGS = {"Llama-2-7b": _LLAMA2_7B, "Llama-2-13b": _LLAMA2_13B, "SmolLM2-135M": _SMOLLM2_135M, "SmolLM2-360M": _SMOLLM2_360M,
           "SmolLM2-1.7B": _SMOLLM2_1B7}
"""By what a hub id's last part begins with; from the config.json of meta-llama and HuggingFaceTB on the hub."""


def outline(model: ModelConfig) -> Source:
    """As `weights.open`, without a download; a directory with config.json alone or a name of `CONFIGS` will do. Raises CheckpointError."""
    place = Path(os.path.expanduser(model.path))
    if place.is_dir() and (any(place.glob("*.safetensors")) or not (place / "config.json").exists()):
        return weights.open(model)
    if place.is_dir():
        return _outlined(model, place, checks.read_config(place).to_dict(), str(place / "config.json"))
    if place.exists():
        return weights.open(model)
    name = next((name for name in CONFIGS if place.name.lower().startswith(name.lower())), None)
    if name is None:
        raise CheckpointError(f"model.path: {model.path}: there is no such directory or file, and the sizes of that name are not known; "
                              f"known are {', '.join(CONFIGS)}, and directories that hold a config.json")
    return _outlined(model, place, CONFIGS[name], name)


def without_weights(model: ModelConfig) -> Source:
    """As `outline`, with a tokenizer: of a model on the hub its config and tokenizer are fetched. Raises CheckpointError."""
    if Path(os.path.expanduser(model.path)).exists():
        return outline(model)
    directory, _ = weights.download(model, weights.TOKENIZER_FILES)
    return _outlined(model, directory, checks.read_config(directory).to_dict(), model.path)


def _outlined(model: ModelConfig, path: Path, fields: dict, origin: str) -> OutlinedSource:
    return OutlinedSource(path=path, origin=origin, revision=None, fingerprint="", config=LlamaConfig.from_dict(fields))
