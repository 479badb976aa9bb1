"""base + adapter -> a plain model directory, file by file: fp32 arithmetic, one cast, nothing held whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bone_ds import adapter_file, arch, methods
from bone_ds.adapter_file import Header
from bone_ds.arch import Source
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError, ConfigError


def merge(adapter_path: Path, out: Path, base: str | None = None, cache_dir: str | None = None) -> Source:
    """Writes the merged model to `out`, which must not exist; returns the base it was merged into.

    base: where the base model lies now; default where it lay in training. Raises CheckpointError where base and
    adapter don't belong together.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists already; name a directory to be made")
    header, tensors = adapter_file.read(adapter_path)
    source = open_base(header, adapter_path, base, cache_dir)
    modules = adapter_file.by_module(tensors)
    files = arch.load(header.architecture).weight_files(source)
    _check_fit(adapter_path, header, modules, _shapes(files))
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in files:
            _merge_file(file, aside / file.name, modules, header)
        _copy_the_rest(source.directory, aside, {file.name for file in files})
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return source


def open_base(header: Header, adapter_path: Path, base: str | None, cache_dir: str | None = None) -> Source:
    """The model the adapter was trained on. Raises CheckpointError where another one lies there."""
    given = {"path": base or header.base, "dtype": header.base_dtype, "architecture": header.architecture}
    given |= {"cache_dir": cache_dir} if cache_dir else {}
    given |= {"revision": header.base_revision} if not base else {}
    source = arch.load(header.architecture).open(ModelConfig(**given))
    if source.fingerprint != header.base_fingerprint:
        raise CheckpointError(
            f"{adapter_path}: was trained on another base: fingerprint {header.base_fingerprint}, "
            f"{given['path']} has {source.fingerprint}")
    return source


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _check_fit(path: Path, header: Header, modules: dict[str, dict[str, Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
    for module, tensors in modules.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise CheckpointError(f"{path}: {module}: the base has no such layer")
        expected = methods.tensor_shapes(*shape, header.adapter)
        found = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        if found != expected:
            grouping = f" with grouping {header.grouping!r}" if header.grouping else ""
            raise CheckpointError(f"{path}: {module}: has {found}, a {shape[0]} x {shape[1]} layer{grouping} needs {expected}")


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
    """Config, tokenizer, index; not the weights, and no directories."""
    for path in source.iterdir():
        if path.is_file() and path.name not in written and path.suffix != ".lock":
            shutil.copy2(path, target / path.name)
