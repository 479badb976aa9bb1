"""The files of one checkpoint: written and verified, read and checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bone_ds import adapter_file, publishing, tensor_file
from bone_ds.adapter_file import Header
from bone_ds.checkpoint import manifest as manifests
from bone_ds.checkpoint import retention
from bone_ds.checkpoint.manifest import Damaged, FileRecord, Manifest
from bone_ds.engine.state import MASTER, MOMENTS
from bone_ds.errors import CheckpointError

ADAPTER, STATE, CONFIG = "adapter.safetensors", "state.safetensors", "config.yaml"
FILES = (ADAPTER, STATE, CONFIG)


@dataclass(frozen=True)
class Origin:
    """What every checkpoint of a run is of."""

    header: Header
    """Of the adapter; its step is replaced by the checkpoint's."""
    data_fingerprint: str
    config: str
    """YAML."""
    base_names: Collection[str] = ()
    """What the header's base_crc32 is of."""


@dataclass(frozen=True)
class Snapshot:
    """The state of training after a step, held apart from the engine."""

    step: int
    adam_step: int
    world_size: int
    held_out_loss: float | None
    """Nats; None where this step was not evaluated."""
    parts: dict[str, dict[str, Tensor]]
    """`master`, `exp_avg` and `exp_avg_sq` by the adapter's names, fp32."""


def write(directory: Path, snapshot: Snapshot, origin: Origin) -> Path:
    """Publishes `directory/step-N` and returns it. Raises CheckpointError where that fails; nothing of this step is left then."""
    final = directory / retention.name_of(snapshot.step)
    aside = publishing.aside(final)
    try:
        with publishing.writing(aside):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _fill(aside, snapshot, origin)
            retention.discard(final)
            publishing.publish(aside, final)
    except CheckpointError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def _fill(aside: Path, snapshot: Snapshot, origin: Origin) -> None:
    masters = snapshot.parts[MASTER]
    moments = {f"{part}/{name}": tensor for part in MOMENTS for name, tensor in snapshot.parts[part].items()}
    adapter_file.write(aside / ADAPTER, replace(origin.header, step=snapshot.step), masters)
    tensor_file.save_file(moments, aside / STATE)
    for name, tensors in ((ADAPTER, masters), (STATE, moments)):
        _to_disk(aside / name)
        tensor_file.check_written(aside / name, tensors)
    _write_text(aside / CONFIG, origin.config)
    _write_text(aside / manifests.NAME, manifests.dump(Manifest(
        step=snapshot.step, adam_step=snapshot.adam_step, base_fingerprint=origin.header.base_fingerprint,
        data_fingerprint=origin.data_fingerprint, world_size=snapshot.world_size, held_out_loss=snapshot.held_out_loss,
        files={name: _record(aside / name) for name in FILES})))
    publishing.sync(aside)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _to_disk(path)
    if path.read_bytes() != text.encode():
        raise CheckpointError(f"{path}: reads back as something else than was written; the disk or its driver is at fault")


def _to_disk(path: Path) -> None:
    """Syncs a file, and has the system forget what it holds of it in memory, so that it is read back from the disk."""
    publishing.sync(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size_bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def verify(path: Path) -> Manifest:
    """Reads every byte. Raises Damaged where one is not as it was written, and CheckpointError for another format
    and for what this user may not read."""
    manifest = _manifest(path)
    for name, recorded in manifest.files.items():
        try:
            found = _record(path / name)
        except OSError as error:
            raise manifests.unreadable(path / name, error) from None
        if found.sha256 != recorded.sha256:
            raise Damaged(f"{path / name}: is damaged: its content is not what its manifest's sha256 says")
    return manifest


def outline(path: Path) -> tuple[Manifest, Header, dict[str, Tensor]]:
    """The manifest, the adapter's header and its tensors without data, from the files' headers alone.

    Raises CheckpointError where files are missing or cut off, or a tensor has no moments of its shape.
    """
    manifest = _manifest(path)
    header, masters = adapter_file.outline(path / ADAPTER)
    state, _ = tensor_file.outline(path / STATE)
    _check_moments(path / STATE, state, {name: tuple(tensor.shape) for name, tensor in masters.items()})
    return manifest, header, masters


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Manifest, dict[str, dict[str, Tensor]]]:
    """The manifest and the parts of a checkpoint that `verify` has passed.

    shapes: of the run's adapter, by name. Raises CheckpointError where the checkpoint's are others.
    """
    manifest = _manifest(path)
    _, masters = adapter_file.read(path / ADAPTER)
    _check_shapes(path / ADAPTER, masters, shapes)
    try:
        with safe_open(path / STATE, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path / STATE}: is damaged: {str(error).splitlines()[0]}") from None
    _check_moments(path / STATE, state, shapes)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path / STATE}: {name}: holds NaN or infinite values; name an earlier one with --resume PATH")
    moments = {part: {name: state[f"{part}/{name}"] for name in shapes} for part in MOMENTS}
    return manifest, {MASTER: masters} | moments


def _manifest(path: Path) -> Manifest:
    """Checked against the directory's name and its files' sizes, not their content."""
    manifest = manifests.read(path)
    step = retention.step_of(path)
    if step not in (None, manifest.step):
        raise Damaged(f"{path / manifests.NAME}: is of step {manifest.step}; it or the directory's name is another's")
    if manifest.files.keys() != set(FILES):
        raise Damaged(f"{path / manifests.NAME}: is damaged: files is {sorted(manifest.files)}")
    for name, recorded in manifest.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else "no"
        if found != recorded.size_bytes:
            raise Damaged(f"{path / name}: has {found} bytes, its manifest says {recorded.size_bytes}; it is not whole")
    return manifest


def _check_moments(path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    _check_shapes(path, state, {f"{part}/{name}": shape for part in MOMENTS for name, shape in shapes.items()})


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(tensors.keys() ^ shapes.keys()):
        raise CheckpointError(f"{path}: {name}: is missing from {'the adapter that is trained' if name in tensors else 'the checkpoint'}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: {name}: shape {tuple(tensors[name].shape)} is not the adapter's {shape}")
