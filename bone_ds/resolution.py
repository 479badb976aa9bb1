"""What of a config waits for the model: whether its architecture can do it, and the rank that adapter.parameters asks for."""

from __future__ import annotations

import torch

from bone_ds.arch import Architecture, Source
from bone_ds.config import RunConfig
from bone_ds.errors import ConfigError
from bone_ds.inject import with_rank

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check(config: RunConfig, architecture: Architecture) -> None:
    """Raises ConfigError for what this architecture has not."""
    if config.train.chunk_length and not architecture.carries_state:
        raise ConfigError(f"train.chunk_length: {config.train.chunk_length} needs an architecture that carries a state from chunk to "
                          f"chunk, {architecture.name} has none; remove it")


def context_warning(architecture: Architecture, source: Source, longest: int) -> str | None:
    """A line for samples beyond the model's context, which is no error: some models are trained to reach further. longest: in tokens."""
    context = architecture.context_length(source)
    if context is None or longest <= context:
        return None
    return (f"warning: the longest sample has {longest} tokens, the model's context is {context} (max_position_embeddings); what lies "
            f"beyond is new to it, set data.max_length: {context} to leave it out")


def resolve(config: RunConfig, architecture: Architecture, source: Source) -> RunConfig:
    """The config with its rank. Raises InjectionError where no rank is right."""
    if config.adapter.parameters is None:
        return config
    with torch.device("meta"):
        model = architecture.build(source, DTYPES[config.model.dtype])
    return config.model_copy(update={"adapter": with_rank(model, architecture, config.adapter)})
