"""What an import or export makes: a file or directory that is whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bone_ds.errors import ConfigError


def check_absent(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out: {out} exists already; name one to be made")


def write_aside(out: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a path beside `out`, and renames what it makes there. Raises ConfigError where that fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent, ignore_cleanup_errors=True) as directory:
            aside = Path(directory) / out.name
            write(aside)
            os.replace(aside, out)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise ConfigError(f"--out: {out}: can't be written: {str(error).splitlines()[0]}") from None


def chosen_dtype(tensors: Mapping[str, Tensor], dtype: str) -> str:
    """bf16 or fp32 as given; for auto bf16 where that keeps every bit of fp32 tensors, else fp32."""
    if dtype != "auto":
        return dtype
    return "bf16" if all(torch.equal(tensor.bfloat16().float(), tensor) for tensor in tensors.values()) else "fp32"
