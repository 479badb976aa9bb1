"""Training state on disk, readable at any ZeRO stage and world size.

`checkpoints/step-00000100/` holds `state.safetensors`, the adapter's fp32 weights and AdamW's moments by name, and
`manifest.json`. Frozen weights are never written. Training draws no random numbers and the order of the data is a
function of seed and step, so the step count is all the position there is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bone_ds import engine as engines
from bone_ds import tensor_file
from bone_ds.engine import Engine
from bone_ds.engine.state import PARTS
from bone_ds.errors import CheckpointError
from bone_ds.tensor_file import save_file

FORMAT_VERSION = 2
"""2: the fingerprint of the data covers what is learnt and how sources are mixed."""
_STATE, _MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Manifest:
    format_version: int
    step: int
    """Optimizer steps done."""
    adam_step: int
    base_fingerprint: str
    data_fingerprint: str
    """Of the tokenised training samples: their order is meaningless over others."""
    world_size: int
    state_bytes: int


def save(directory: Path, engine: Engine, step: int, base_fingerprint: str, data_fingerprint: str, keep: int) -> dict[str, Tensor]:
    """Writes `step-N` aside, renames it, and removes all but the latest `keep`; returns the masters (on rank 0).

    Every rank calls it; rank 0 writes.
    """
    adam_step = engine.adam_step()
    parts = {part: engine.gather(part) for part in PARTS}
    if parts["master"]:
        _write(directory, parts, Manifest(FORMAT_VERSION, step, adam_step, base_fingerprint, data_fingerprint, engine.world_size, 0))
        for old in existing(directory)[:-keep]:
            shutil.rmtree(old)
    engines.barrier()
    return parts["master"]


def load(path: Path, engine: Engine, base_fingerprint: str, data_fingerprint: str) -> int:
    """Restores the engine and returns the number of steps done. Raises CheckpointError naming what does not fit."""
    manifest = read_manifest(path)
    if manifest.base_fingerprint != base_fingerprint:
        raise CheckpointError(f"{path}: was trained on another base model than now lies at model.path")
    if manifest.data_fingerprint != data_fingerprint:
        raise CheckpointError(f"{path}: was written over other training samples; data files, prompt or tokenizer have changed")
    engine.restore(_read_state(path / _STATE, manifest, engine), manifest.adam_step)
    return manifest.step


def outline(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and the adapter's tensors without data, from headers alone. Raises CheckpointError where the files are not whole."""
    manifest = read_manifest(path)
    _check_size(path / _STATE, manifest)
    state, _ = tensor_file.outline(path / _STATE)
    adapter = {name.removeprefix("master/"): tensor for name, tensor in state.items() if name.startswith("master/")}
    for name, tensor in adapter.items():
        for part in PARTS:
            found = state.pop(f"{part}/{name}", None)
            if found is None or found.shape != tensor.shape:
                has = "is missing" if found is None else f"has shape {tuple(found.shape)}, the adapter's is {tuple(tensor.shape)}"
                raise CheckpointError(f"{path / _STATE}: {part}/{name}: {has}")
    for name in state:
        raise CheckpointError(f"{path / _STATE}: {name}: is no part of the adapter's state")
    return manifest, adapter


def existing(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".partial" and (path / _MANIFEST).exists())


def latest(directory: Path) -> Path:
    found = existing(directory)
    if not found:
        raise CheckpointError(f"--resume: {directory} holds no checkpoint; start without --resume in another directory")
    return found[-1]


def _write(directory: Path, parts: dict[str, dict[str, Tensor]], manifest: Manifest) -> None:
    final = directory / f"step-{manifest.step:08d}"
    aside = final.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    flat = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    save_file(flat, aside / _STATE)
    whole = asdict(manifest) | {"state_bytes": (aside / _STATE).stat().st_size}
    (aside / _MANIFEST).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises CheckpointError where it is missing or damaged."""
    path = checkpoint / _MANIFEST
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: is damaged: it holds no JSON object")
    if given.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {given.get('format_version')!r} is not {FORMAT_VERSION}, the one this version reads")
    for field in fields(Manifest):
        value = given.get(field.name)
        if type(value).__name__ != field.type or field.type == "int" and value < 0:
            raise CheckpointError(f"{path}: is damaged: {field.name} is {value!r}")
    return Manifest(**{field.name: given[field.name] for field in fields(Manifest)})


def _read_state(path: Path, manifest: Manifest, engine: Engine) -> dict[str, dict[str, Tensor]]:
    _check_size(path, manifest)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged: {str(error).splitlines()[0]}") from None
    for part in PARTS:
        _check(path, part, parts[part], engine)
    return parts


def _check_size(path: Path, manifest: Manifest) -> None:
    if not path.exists() or path.stat().st_size != manifest.state_bytes:
        size = path.stat().st_size if path.exists() else "no"
        raise CheckpointError(f"{path}: has {size} bytes, its manifest says {manifest.state_bytes}; it is not whole")


def _check(path: Path, part: str, tensors: dict[str, Tensor], engine: Engine) -> None:
    for name in tensors.keys() ^ engine.trainable.keys():
        where = "the run's adapter" if name in tensors else "the checkpoint"
        raise CheckpointError(f"{path}: {part}/{name}: is missing from {where}")
    for name, parameter in engine.trainable.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: {part}/{name}: shape {tuple(tensors[name].shape)} is not the adapter's {shape}")
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{path}: {part}/{name}: holds NaN or infinite values")
