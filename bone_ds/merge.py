"""base + adapter -> a plain model: fp32 arithmetic, one cast at the end. How a model lies on disk, its architecture knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bone_ds import adapter_file, arch, methods
from bone_ds.adapter_file import Header
from bone_ds.arch import Architecture, Source
from bone_ds.checksums import Checksums
from bone_ds.config import model_of
from bone_ds.errors import CheckpointError, ConfigError, InjectionError
from bone_ds.inject import inject


def merge(adapter_path: Path, out: Path, base: str | None = None, cache_dir: str | None = None) -> Source:
    """Writes the merged model to `out`, which must not exist; returns the base it was merged into.

    base: where the base model lies now; default where it lay in training. Raises CheckpointError where base and
    adapter don't belong together.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists already; name one to be made")
    header, tensors = adapter_file.read(adapter_path)
    architecture = arch.load(header.architecture)
    source = open_base(header, adapter_path, base, cache_dir)
    check_fit(adapter_path, header, tensors, architecture, source)
    try:
        architecture.rewrite(source, out, change_of(header, tensors), _added(header, tensors, architecture, source),
                             checksums_of(header, adapter_path, source))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out: {out}: can't be written: {str(error).splitlines()[0]}") from None
    return source


def open_base(header: Header, adapter_path: Path, base: str | None, cache_dir: str | None = None) -> Source:
    """The model the adapter was trained on. Raises CheckpointError where another one lies there."""
    moved = {} if base is None else {"path": base, "revision": None}
    cache = {} if cache_dir is None else {"cache_dir": cache_dir}
    source = arch.load(header.architecture).open(model_of(**header.model.model_dump() | moved | cache))
    check_base(header, adapter_path, source)
    return source


def check_base(header: Header, adapter_path: Path, source: Source) -> None:
    """Raises CheckpointError where the adapter was trained on another model than this."""
    if source.fingerprint != header.base_fingerprint:
        raise CheckpointError(
            f"{adapter_path}: was trained on another base: fingerprint {header.base_fingerprint}, "
            f"{source.origin} has {source.fingerprint}")


def checksums_of(header: Header, adapter_path: Path, source: Source) -> Checksums:
    """Those of the base that is about to be read, which must be as the adapter was trained on it."""
    return Checksums(header.base_crc32, f"{adapter_path}: its base {source.origin} has changed since it was trained")


def check_fit(path: Path, header: Header, tensors: dict[str, Tensor], architecture: Architecture, source: Source) -> None:
    """Raises CheckpointError unless the file holds exactly the tensors that this adapter on this base would train."""
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    try:
        expected = inject(model, architecture, header.adapter)
    except InjectionError as error:
        raise CheckpointError(f"{path}: does not fit {source.origin}: {error}") from None
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: {name}: is missing; the header's method, targets and layers include it")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {name}: {source.origin} has no such layer, or the header's targets and layers leave it out")
    for name, tensor in tensors.items():
        found, needed = tuple(tensor.shape), tuple(expected[name].shape)
        if found != needed:
            grouping = f" with grouping {header.grouping!r}" if header.grouping else ""
            if header.form not in (None, "affine"):
                grouping += f" and form {header.form!r}"
            raise CheckpointError(f"{path}: {name}: has shape {found}, this layer{grouping} needs {needed}")


def change_of(header: Header, tensors: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """What the adapter makes of the base's weight of a name: in fp32 where it changes it, as it is elsewhere."""
    if header.method in ("state", "full"):
        return lambda name, weight: tensors.get(name, weight)
    adapter, modules = header.adapter, adapter_file.by_module(tensors)

    def change(name: str, weight: Tensor) -> Tensor:
        module = modules.get(name.removesuffix(".weight"))
        return weight if module is None else methods.merged_weight(weight, module, adapter)

    return change


def _added(header: Header, tensors: dict[str, Tensor], architecture: Architecture, source: Source) -> dict[str, Tensor]:
    """A model's file has the states of all its layers or of none: those that were not trained are zero."""
    if header.method != "state":
        return {}
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    states = architecture.add_initial_state(model, 0, len(architecture.layers(model)))
    return {name: tensors.get(name, torch.zeros(state.shape)) for name, state in states.items()}
