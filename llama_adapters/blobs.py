"""Files of the Hugging Face hub's cache: a link leads to `blobs/DIGEST`, which names the content.

DIGEST is the SHA-256 of large files and git's SHA-1 of the others. The hub's client compares sizes alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from bone_ds.errors import CheckpointError

_NAME = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def check(paths: Iterable[Path]) -> None:
    """Reads every byte of those that are such links. Raises CheckpointError for one whose content is not what its name says."""
    for path in paths:
        blob = path.resolve()
        if blob.parent.name == "blobs" and _NAME.fullmatch(blob.name) and _digest(blob) != blob.name:
            raise CheckpointError(f"{path}: is damaged: its content is not the one that the hub names it by; remove {blob}, and it is "
                                  "downloaded again")


def _digest(blob: Path) -> str:
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    try:
        with blob.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{blob}: can't be read: {error.strerror}") from None
