"""What a file or directory is, what it holds and whether it is whole. Headers are read, values are not."""

from __future__ import annotations

import os
from pathlib import Path

from bone_ds import adapter_file, arch, tensor_file
from bone_ds.config import model_of
from bone_ds.errors import CheckpointError
from bone_ds.formats import peft, rwkv_peft
from bone_ds.inspection import adapters, models
from bone_ds.inspection.report import Inspection

__all__ = ["Inspection", "inspect"]

_DIRECTORIES = ("a model (config.json, *.safetensors), an adapter of PEFT or BoneModel (adapter_config.json), a run (config.yaml, "
                "events.jsonl), a checkpoint (manifest.json)")
_FILES = "a model (.pth, .safetensors, .gguf) and an adapter (.safetensors, .pth)"


def inspect(path: Path) -> Inspection:
    """Raises CheckpointError for a damaged file, and for what is none of the things it looks for."""
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return _directory(place)
    if not place.exists():
        raise CheckpointError(f"{path}: there is no such file or directory")
    if place.suffix == ".gguf":
        return models.inspect_model(place, arch.load("llama"))
    if place.suffix == ".safetensors":
        return _safetensors(place)
    if place.suffix == ".pth":
        return _pth(place)
    raise CheckpointError(f"{path}: is none of the files that are looked for: {_FILES}")


def _directory(path: Path) -> Inspection:
    def holds(*names: str) -> bool:
        return any((path / name).exists() for name in names)

    if holds(peft.CONFIG, peft.WEIGHTS):
        return adapters.inspect_peft(path)
    if holds("config.json") or any(path.glob("model*.safetensors*")):
        return models.inspect_model(path, arch.load("llama"))
    from bone_ds.inspection import runs  # the engine's imports take seconds

    if holds("manifest.json", "state.safetensors"):
        return runs.inspect_checkpoint(path)
    if holds("config.yaml", "events.jsonl", "adapter.safetensors"):
        return runs.inspect_run(path)
    if named := peft.adapters_in(path):
        raise CheckpointError(f"{path}: holds adapters in directories of their own, inspect one of them: {', '.join(named)}")
    raise CheckpointError(f"{path}: is none of the directories that are looked for: {_DIRECTORIES}")


def _safetensors(path: Path) -> Inspection:
    """A file that belongs to a directory is inspected with it."""
    tensors, metadata = tensor_file.outline(path)
    if adapter_file.is_adapter(metadata):
        return adapters.inspect_adapter(path)
    siblings = {file.name for file in path.absolute().parent.iterdir()}
    if path.name == peft.WEIGHTS or path.name == "state.safetensors" and "manifest.json" in siblings:
        return _directory(path.absolute().parent)
    if "config.json" in siblings and any(name.startswith(("model.", "lm_head.")) for name in tensors):
        return _directory(path.absolute().parent)
    return models.inspect_model(path, arch.resolve(model_of(path=str(path))))


def _pth(path: Path) -> Inspection:
    from rwkv_adapters import checks

    tensors = checks.read_tensors(path)
    if rwkv_peft.is_adapter(tensors):
        return adapters.inspect_rwkv_peft(path, tensors)
    return models.inspect_model(path, arch.load("rwkv"))
