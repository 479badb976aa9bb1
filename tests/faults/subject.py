"""Something on disk that is read again, and a reading of it that tells all that was taken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from bone_ds.tensor_file import as_bytes
from faults.damages import Damage


@dataclass(frozen=True)
class Taken:
    digest: str
    instead: tuple[str, ...] = ()
    """The digests of what may be taken where this is passed over."""
    made_anew: bool = False


class Subject(Protocol):
    name: str

    def write(self, directory: Path) -> None:
        """Undamaged."""

    def damages(self) -> list[Damage]: ...

    def use(self, directory: Path) -> Taken:
        """Through the project's own entry points. Raises BoneError where one refuses it."""

    def inspected(self, directory: Path) -> Iterable[Path]:
        """What `bone-ds inspect` may be asked about."""


def digest_of(*parts: str | Mapping[str, Tensor] | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            for name in sorted(part):
                digest.update(f"{name} {part[name].dtype} {tuple(part[name].shape)}".encode())
                digest.update(as_bytes(part[name]))
        else:
            digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return digest.hexdigest()
