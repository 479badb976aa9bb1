"""One run at a time in a run directory: an flock on the file `lock` in it, which the system takes back when its process is gone.

The file stays; who holds the lock has written its process and host there.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bone_ds import publishing
from bone_ds.errors import ConfigError

NAME = "lock"
_PATIENCE_S = 1.0
"""`check` has another's lock for a moment."""


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds the lock of a directory, which must exist. Raises ConfigError naming the process that has it, CheckpointError on a full disk.

    On a file system without locks a warning says so, and the run goes on.
    """
    path = directory / NAME
    with path.open("a+", encoding="utf-8") as file:
        until = time.monotonic() + _PATIENCE_S
        try:
            while not _taken(file):
                if time.monotonic() > until:
                    raise _refusal(directory)
                time.sleep(0.1)
        except OSError as error:
            logging.getLogger("bone_ds").warning(f"{path}: can't be locked ({error.strerror}); nothing keeps a second run out")
        with publishing.writing(path):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


def check(directory: Path) -> None:
    """Raises ConfigError naming the process that trains in the directory, if one does. Creates nothing."""
    path = directory / NAME
    if path.exists():
        with path.open("a+", encoding="utf-8") as file, contextlib.suppress(OSError):
            if not _taken(file):
                raise _refusal(directory)


def _taken(file: TextIO) -> bool:
    """Whether the lock is now this process's. Raises OSError where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(directory: Path) -> ConfigError:
    holder = (directory / NAME).read_text(encoding="utf-8", errors="replace").strip() or "a process"
    return ConfigError(f"output.directory: {directory}: another run goes on there, {holder}; wait for its end, or name another directory")
