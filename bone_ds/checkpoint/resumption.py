"""The checkpoint that a run goes on from: found and verified by rank 0, restored on every rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from bone_ds import adapter_file, checksums
from bone_ds import engine as engines
from bone_ds.checkpoint import files, retention
from bone_ds.checkpoint.files import Origin
from bone_ds.checkpoint.manifest import Damaged, Manifest
from bone_ds.engine import Engine
from bone_ds.errors import CheckpointError


@dataclass(frozen=True)
class Found:
    path: Path
    step: int
    """Optimizer steps done."""
    damaged: tuple[Path, ...] = ()
    """Later ones that were passed over."""


def last_whole(directory: Path, origin: Origin) -> Found | None:
    """The latest checkpoint of which every byte is as it was written; a warning tells of each later one what is wrong with it.

    None where there is no checkpoint yet. Raises CheckpointError where none is whole, and where the first whole one is of another base,
    of other data or in another format: those before it are too.
    """
    reasons: dict[Path, str] = {}
    for path in reversed(retention.existing(directory)):
        try:
            manifest = given(path, origin)
        except Damaged as error:
            reasons[path] = str(error)
            continue
        for reason in reasons.values():
            logging.getLogger("bone_ds").warning(f"--resume: passed over: {reason}")
        return Found(path, manifest.step, tuple(reasons))
    if not reasons:
        return None
    raise CheckpointError(f"--resume: {directory} holds no whole checkpoint: {'; '.join(reasons.values())}")


def given(path: Path, origin: Origin) -> Manifest:
    """The manifest of one checkpoint, verified. Raises Damaged, and CheckpointError where it is of another base or of other data."""
    manifest = files.verify(path)
    if manifest.base_fingerprint != origin.header.base_fingerprint:
        raise CheckpointError(f"{path}: was trained on another base model than now lies at model.path")
    before, now = adapter_file.outline(path / files.ADAPTER)[0].base_crc32, origin.header.base_crc32
    if name := checksums.changed(before, now, origin.base_names):
        raise CheckpointError(f"{path}: the base model at model.path has changed since: {name} holds other bytes; it is damaged, or "
                              "another: give the one that was trained on")
    if manifest.data_fingerprint != origin.data_fingerprint:
        raise CheckpointError(f"{path}: was written over other training samples; data files, prompt or tokenizer have changed")
    return manifest


def load(path: Path, engine: Engine) -> None:
    """Restores the engine on every rank from a verified checkpoint that rank 0 reads.

    Raises CheckpointError, naming the tensor, where it is another adapter's.
    """
    parts: dict = {}

    def read() -> int:
        manifest, found = files.read(path, engine.shapes())
        parts.update(found)
        return manifest.adam_step

    adam_step = engines.by_first(read)
    engine.restore(engine.spread(parts), adam_step)
