"""manifest.json: what a checkpoint is of, the size and SHA-256 of each file beside it, and a SHA-256 of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bone_ds.errors import CheckpointError

NAME = "manifest.json"
FORMAT_VERSION = 3
"""2 had one file without digests; 3: the adapter is a file of its own, the config is with it."""
_DIGEST = "sha256"


class Damaged(CheckpointError):
    """A checkpoint that is not as it was written, or was never finished. The one before it may be whole."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    size_bytes: int = Field(ge=0)
    sha256: str


class Manifest(_Record):
    step: int = Field(ge=1)
    """Optimizer steps done."""
    adam_step: int = Field(ge=0)
    base_fingerprint: str
    data_fingerprint: str
    """Of the tokenised training samples: their order is meaningless over others."""
    world_size: int = Field(ge=1)
    held_out_loss: float | None
    """Nats; None where no evaluation belongs to this step."""
    files: dict[str, FileRecord]


def dump(manifest: Manifest) -> str:
    fields = {"format_version": FORMAT_VERSION} | manifest.model_dump()
    return json.dumps(fields | {_DIGEST: _digest(fields)}, indent=2) + "\n"


def read(checkpoint: Path) -> Manifest:
    """Raises Damaged, and CheckpointError for one of another format or that this user may not read."""
    path = checkpoint / NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing, the checkpoint is not whole") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise Damaged(f"{path}: is damaged: it holds no JSON object")
    digest = fields.pop(_DIGEST, None)
    version = fields.pop("format_version", None)
    if digest is None and version in (1, 2):
        raise CheckpointError(f"{path}: format_version {version} is not {FORMAT_VERSION}, the one this version reads")
    try:
        whole = digest == _digest({"format_version": version} | fields)
    except RecursionError:  # what could just be read may be nested too deeply to be written
        whole = False
    if not whole:
        raise Damaged(f"{path}: is damaged: its content is not what its {_DIGEST} says")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version!r} is not {FORMAT_VERSION}, the one this version reads")
    return _checked(path, fields)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Damaged where the disk is at fault. A checkpoint that this user may not read is not passed over: it may be whole."""
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path}: can't be read: {error.strerror}; give this user the right to, or name another with --resume PATH")
    return Damaged(f"{path}: can't be read: {error.strerror}")


def _checked(path: Path, fields: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Damaged(f"{path}: is damaged: {'.'.join(map(str, problem['loc']))} is {problem['input']!r}") from None


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
