"""The adapter on disk: one safetensors file of fp32 tensors whose header says what they are and whose base they fit.

Tensors by method: `MODULE.bone`, whose shape follows from grouping and form; `MODULE.lora_A` and `MODULE.lora_B`;
`MODULE.time_state` (state); every weight of the model by its own name (full).

A SHA-256 of the header and of every tensor's name, shape and bytes stands in the header. Files without one are read too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from bone_ds import checksums, tensor_file
from bone_ds.arch import Architecture, Source
from bone_ds.bone.grouping import matches, shape_pattern
from bone_ds.config import AdapterConfig, ModelConfig, RunConfig
from bone_ds.errors import CheckpointError

FORMAT_VERSION = 1
_KEY, _DIGEST = "bone_ds", "sha256"
_KINDS = {"targets": list, "base_fingerprint": str, "step": int}
"""Of the fields that are no part of a config."""
_LATER = {"form", "groups", "base_crc32"}
"""Fields that files written before them don't have."""


@dataclass(frozen=True)
class Header:
    format_version: int
    architecture: str
    method: str
    grouping: str | None
    rank: int | None
    alpha: float | None
    targets: list[str]
    layers: list[int] | None
    base: str
    base_revision: str | None
    base_dtype: str
    base_fingerprint: str
    step: int
    form: str | None = None
    groups: int | None = None
    base_crc32: str | None = None
    """`checksums.record` of the base as it was trained on; None where an older version or another program trained."""

    @property
    def adapter(self) -> AdapterConfig:
        given = {"method": self.method, "layers": None if self.layers is None else tuple(self.layers)}
        if self.method in ("bone", "lora"):
            given |= {"rank": self.rank, "targets": tuple(self.targets)}
            bone = {"grouping": self.grouping, "form": self.form or "affine", "groups": self.groups}
            given |= bone if self.method == "bone" else {"alpha": self.alpha}
        return AdapterConfig.model_validate(given)

    @property
    def model(self) -> ModelConfig:
        """The base as it lay in training."""
        return ModelConfig(path=self.base, revision=self.base_revision, dtype=self.base_dtype, architecture=self.architecture)


def header_of(config: RunConfig, architecture: Architecture, source: Source, step: int, base_crc32: str | None = None) -> Header:
    adapter = config.adapter
    on_linears = adapter.method in ("bone", "lora")
    return Header(
        format_version=FORMAT_VERSION,
        architecture=architecture.name,
        method=adapter.method,
        grouping=adapter.grouping if adapter.method == "bone" else None,
        rank=adapter.rank if on_linears else None,
        alpha=adapter.alpha if adapter.method == "lora" else None,
        targets=list(adapter.targets or architecture.targets) if on_linears else [],
        layers=None if adapter.layers is None else list(adapter.layers),
        base=source.origin,
        base_revision=source.revision,
        base_dtype=config.model.dtype,
        base_fingerprint=source.fingerprint,
        step=step,
        form=adapter.form if adapter.method == "bone" else None,
        groups=adapter.groups if adapter.method == "bone" else None,
        base_crc32=base_crc32)


def write(path: Path, header: Header, tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError where that fails; nothing is left there then."""
    whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    fields = asdict(header)
    tensor_file.save_file(whole, path, metadata={_KEY: json.dumps(fields | {_DIGEST: _digest(fields, whole)})})


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and every tensor, checked against it: names, shapes, finite values, and the digest where there is one."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        header = _header(path, metadata)
        for name in file.keys():
            _check_dtype(path, name, file.get_slice(name).get_dtype())
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    _check_digest(path, metadata, tensors)
    for name, tensor in tensors.items():
        _check_tensor(path, header, name, tensor)
    return header, tensors


def outline(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """As `read`, from the file's header alone: tensors without data, on the meta device, whose names and shapes are checked."""
    tensors, metadata = tensor_file.outline(path)
    header = _header(path, metadata)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    for name, tensor in tensors.items():
        _check_dtype(path, name, "F32" if tensor.dtype == torch.float32 else str(tensor.dtype).removeprefix("torch."))
    if header.method != "full":
        for name, tensor in tensors.items():
            _check_shape(path, header, name, tensor)
    return header, tensors


def is_adapter(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file with this metadata is an adapter of this project."""
    return _KEY in metadata


def by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`a.b.q_proj.bone` -> {"a.b.q_proj": {"bone": ...}}"""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules


def _opened(path: Path):
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name its adapter.safetensors")
    try:
        return tensor_file.open_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such adapter file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {tensor_file.unreadable(error)}") from None


def _header(path: Path, metadata: dict[str, str]) -> Header:
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: has no {_KEY!r} header, so it is no adapter of this project")
    try:
        given = json.loads(metadata[_KEY])
        version = given["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: its {_KEY!r} header is damaged: {metadata[_KEY][:60]!r}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version!r} is not {FORMAT_VERSION}, the one this version reads")
    given.pop(_DIGEST, None)
    names = {field.name for field in fields(Header)}
    odd = sorted((set(given) ^ names) - _LATER)
    if odd:
        raise CheckpointError(f"{path}: its header's fields are wrong at {', '.join(odd)}")
    header = Header(**given)
    check_describes_adapter(path, header, "its header")
    if header.base_crc32 is not None and not checksums.is_record(header.base_crc32):
        raise CheckpointError(f"{path}: its header's base_crc32 is {str(header.base_crc32)[:40]!r}, not 8 hexadecimal digits a tensor")
    return header


def _check_digest(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    fields = json.loads(metadata[_KEY])
    digest = fields.pop(_DIGEST, None)
    if digest is not None and digest != _digest(fields, tensors):
        raise CheckpointError(f"{path}: is damaged: its contents are not what its {_DIGEST} says; take another copy, or write it again")


def _digest(fields: dict, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_file.as_bytes(tensor))
    return digest.hexdigest()


def check_describes_adapter(path: Path, header: Header, origin: str) -> None:
    """Raises CheckpointError where the fields, which `origin` in the file at `path` gave, go not together or are of another type."""
    try:
        layers, _ = header.adapter.layers, header.model
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {origin} describes no adapter: {_first_problem(error)}") from None
    odd = next((field for field, kind in _KINDS.items() if not isinstance(getattr(header, field), kind)), None)
    if layers is not None and not 0 <= layers[0] < layers[1]:
        odd = "layers"
    if odd is not None:
        raise CheckpointError(f"{path}: {origin} describes no adapter: {odd}: {getattr(header, odd)!r:.60}")


def _first_problem(error: ValueError | TypeError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['input']!r}: {problem['msg']}"


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    """dtype: as safetensors names it."""
    if dtype != "F32":
        raise CheckpointError(f"{path}: {name}: is {dtype}, an adapter's tensors are F32")


def _check_tensor(path: Path, header: Header, name: str, tensor: Tensor) -> None:
    if header.method != "full":
        _check_shape(path, header, name, tensor)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name}: holds NaN or infinite values")


def _check_shape(path: Path, header: Header, name: str, tensor: Tensor) -> None:
    rank = header.rank
    if header.method == "bone":
        expected = {"bone": shape_pattern(header.grouping, rank, header.form or "affine")}
    else:
        expected = {"lora": {"lora_A": (rank, None), "lora_B": (None, rank)}, "state": {"time_state": (None, None, None)}}[header.method]
    part = name.rpartition(".")[2]
    if part not in expected:
        raise CheckpointError(f"{path}: {name}: method {header.method!r} has no such tensor")
    shape = expected[part]
    if not matches(tensor.shape, shape):
        fit = f"does not fit rank {rank}" if rank else f"is not {len(shape)}-dimensional"
        if header.method == "bone":
            fit += f", grouping {header.grouping!r}, form {header.form or 'affine'!r}"
        raise CheckpointError(f"{path}: {name}: shape {tuple(tensor.shape)} {fit}")
