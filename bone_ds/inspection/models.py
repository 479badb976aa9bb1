"""Models: a Llama's directory or .gguf, an RWKV6 file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from bone_ds import arch
from bone_ds.arch import Architecture, Source
from bone_ds.config import model_of
from bone_ds.inspection.report import Inspection

_TITLES = {"llama": "Llama model", "rwkv": "RWKV6 model"}


def inspect_model(path: Path, architecture: Architecture) -> Inspection:
    """Raises CheckpointError where it is not whole."""
    found = architecture.inventory(model_of(path=str(path), architecture=architecture.name))
    kinds = _parameters_by_kind(architecture, found.source)
    return Inspection(str(path), _TITLES[architecture.name], {
        "architecture": architecture.name, "size_bytes": size_bytes(path), "sizes": dict(found.sizes),
        "parameters": sum(kinds.values()), "parameters_by_kind": kinds, "stored_as": dict(found.parameters_by_dtype),
        "fingerprint": found.source.fingerprint or None})


def kind_of(architecture: Architecture, name: str) -> str:
    """Of a parameter or an adapter's tensor: attention, mlp, norm, embedding or head."""
    parts = name.split(".")
    for part in parts:
        if part in architecture.kinds:
            return architecture.kinds[part]
    if any("emb" in part for part in parts):
        return "embedding"
    return "head" if any("head" in part for part in parts) else "norm"


def size_bytes(path: Path) -> int:
    """Of a file, or of all in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def at(path: str) -> Source:
    """The model at a path of this machine. Raises CheckpointError where it is not whole, or none."""
    model = model_of(path=path)
    return arch.resolve(model).inventory(model).source


def _parameters_by_kind(architecture: Architecture, source: Source) -> dict[str, int]:
    """A head that is the embedding counts as the embedding."""
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[kind_of(architecture, name)] += parameter.numel()
    return dict(counts.most_common())
