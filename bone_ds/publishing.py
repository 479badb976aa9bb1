"""Files and directories that are whole or absent, also after a power cut: written aside, synced, renamed, the parent synced."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bone_ds.errors import CheckpointError

PARTIAL = ".partial"
"""Behind the name of what is not finished."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CheckpointError, one line, where the system refuses a write inside: a full disk, a place without permission."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {error.strerror or error}") from None


def aside(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def sync(path: Path) -> None:
    """Returns when a file's contents, or a directory's entries, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files alone.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def publish(written: Path, path: Path) -> None:
    """Gives what was written and synced aside its name; returns when the disk has it there. A directory must not be there yet."""
    os.replace(written, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file. Raises CheckpointError where that fails; the file is then as it was."""
    with _replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def copy(source: Path, path: Path) -> None:
    """Replaces a file by another's contents. Raises CheckpointError where that fails; the file is then as it was."""
    with _replacing(path) as written:
        shutil.copyfile(source, written)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    written = aside(path)
    with writing(path):
        try:
            yield written
            sync(written)
            publish(written, path)
        except OSError:
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)
            raise
