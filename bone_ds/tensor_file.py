"""Writing safetensors files: readable as the user's umask says, and a write that fails is the user's to mend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bone_ds.errors import CheckpointError


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises CheckpointError where the disk is full or the place can't be written to."""
    try:
        path.touch()
        mode = path.stat().st_mode & 0o777
        safetensors.torch.save_file(dict(tensors), path, metadata)
        path.chmod(mode)  # the library makes it the owner's alone
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written: {str(error).splitlines()[0]}") from None
