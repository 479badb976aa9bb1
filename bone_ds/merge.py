"""base + adapter -> a plain model directory, file by file: fp32 arithmetic, one cast, no more than one file held."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bone_ds import adapter_file, arch, methods
from bone_ds.adapter_file import Header
from bone_ds.arch import Architecture, Source
from bone_ds.errors import CheckpointError, ConfigError, InjectionError
from bone_ds.inject import inject
from bone_ds.tensor_file import save_file

_NOT_COPIED = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".lock")


def merge(adapter_path: Path, out: Path, base: str | None = None, cache_dir: str | None = None) -> Source:
    """Writes the merged model to `out`, which must not exist; returns the base it was merged into.

    base: where the base model lies now; default where it lay in training. Raises CheckpointError where base and
    adapter don't belong together.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists already; name a directory to be made")
    header, tensors = adapter_file.read(adapter_path)
    source = open_base(header, adapter_path, base, cache_dir)
    architecture = arch.load(header.architecture)
    _check_fit(adapter_path, header, tensors, architecture, source)
    modules = adapter_file.by_module(tensors)
    files = architecture.weight_files(source)
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in files:
            _merge_file(file, aside / file.name, modules, header)
        _copy_the_rest(source.directory, aside, {file.name for file in files})
        os.replace(aside, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out: {out}: can't be written: {str(error).splitlines()[0]}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return source


def open_base(header: Header, adapter_path: Path, base: str | None, cache_dir: str | None = None) -> Source:
    """The model the adapter was trained on. Raises CheckpointError where another one lies there."""
    moved = {"path": base, "revision": None} if base else {}
    model = header.model.model_copy(update=moved | ({"cache_dir": cache_dir} if cache_dir else {}))
    source = arch.load(header.architecture).open(model)
    if source.fingerprint != header.base_fingerprint:
        raise CheckpointError(
            f"{adapter_path}: was trained on another base: fingerprint {header.base_fingerprint}, "
            f"{model.path} has {source.fingerprint}")
    return source


def _check_fit(path: Path, header: Header, tensors: dict[str, Tensor], architecture: Architecture, source: Source) -> None:
    """The file holds exactly the tensors that injecting this adapter into this base would train."""
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    try:
        expected = inject(model, architecture, header.adapter)
    except InjectionError as error:
        raise CheckpointError(f"{path}: does not fit {source.origin}: {error}") from None
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: {name}: is missing; the header's targets and layers include it")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {name}: {source.origin} has no such layer, or the header's targets and layers leave it out")
    for name, tensor in tensors.items():
        found, needed = tuple(tensor.shape), tuple(expected[name].shape)
        if found != needed:
            grouping = f" with grouping {header.grouping!r}" if header.grouping else ""
            raise CheckpointError(f"{path}: {name}: has shape {found}, this layer{grouping} needs {needed}")


def _merge_file(source: Path, target: Path, modules: dict[str, dict[str, Tensor]], header: Header) -> None:
    merged = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():
            weight = file.get_tensor(name)
            tensors = modules.get(name.removesuffix(".weight"))
            if tensors is not None:
                weight = methods.merged_weight(weight, tensors, header.adapter).to(weight.dtype)
            merged[name] = weight
        metadata = file.metadata()
    save_file(merged, target, metadata=metadata)


def _copy_the_rest(source: Path, target: Path, written: set[str]) -> None:
    """Config, tokenizer, the shards' index; no other weights, which would be the unmerged ones, and no directories."""
    sharded = "model.safetensors" not in written
    for path in source.iterdir():
        is_index = path.name.endswith(".index.json")
        wanted = sharded and path.name == "model.safetensors.index.json" if is_index else path.suffix not in _NOT_COPIED
        if path.is_file() and wanted:
            shutil.copy2(path, target / path.name)
