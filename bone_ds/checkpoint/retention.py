"""Which of a run's checkpoints stay, and what becomes of those that nothing goes on from."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable
from itertools import count
from pathlib import Path

from bone_ds import publishing
from bone_ds.checkpoint import manifest as manifests
from bone_ds.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_REMOVED = ".removed"
SUPERSEDED, DAMAGED = ".superseded", ".damaged"
"""Behind the names of checkpoints that are kept for the user to look at, and that no run goes on from by itself."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """As its name says; None for a directory that has been given another."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def existing(directory: Path) -> list[Path]:
    """Published checkpoints, oldest first. They were whole when they were published; `verify` says if they still are.

    Raises PermissionError, where `glob` would find none.
    """
    if not directory.exists():
        return []
    return sorted((path for path in directory.iterdir() if step_of(path) is not None), key=step_of)


def thin(directory: Path, keep: int, keep_best: bool) -> None:
    """Leaves the latest `keep` checkpoints, and with `keep_best` the one of the lowest held-out loss."""
    published = existing(directory)
    best = _best(published) if keep_best else None
    for path in published[:-keep]:
        if path != best:
            discard(path)


def _best(published: Iterable[Path]) -> Path | None:
    """The earliest of the lowest held-out loss; None where no loss is known."""
    losses = {path: loss for path in published if math.isfinite(loss := _held_out_loss(path))}
    return min(losses, key=losses.__getitem__, default=None)


def _held_out_loss(checkpoint: Path) -> float:
    """NaN where it is unknown."""
    try:
        loss = manifests.read(checkpoint).held_out_loss
    except CheckpointError:
        return math.nan
    return math.nan if loss is None else loss


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint, if there; half removed it no longer has a checkpoint's name."""
    if checkpoint.exists():
        doomed = publishing.aside(checkpoint.with_name(checkpoint.name + _REMOVED))
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def settle(directory: Path, step: int, damaged: Collection[Path]) -> None:
    """Readies the directory for a run that goes on from `step`, and says what it does.

    What a killed run left unfinished is removed. Checkpoints that were found damaged, and others of later steps, which are of another
    course of the run now, are kept under names that end in `.damaged` and `.superseded`.
    """
    for path in sorted(directory.glob(f"step-*{publishing.PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)
        if not path.stem.endswith(_REMOVED):
            _say(f"{path}: was never finished, removed")
    given_up = [path for path in existing(directory) if path in damaged or step_of(path) > step]
    for path in given_up:
        kept = _free_name(path, DAMAGED if path in damaged else SUPERSEDED)
        os.replace(path, kept)
        _say(f"{path}: the run goes on from step {step}; kept as {kept.name}")
    if given_up:
        publishing.sync(directory)


def _free_name(path: Path, suffix: str) -> Path:
    names = (path.with_name(f"{path.name}{suffix}{number or ''}") for number in count())
    return next(name for name in names if not name.exists())


def _say(line: str) -> None:
    logging.getLogger("bone_ds").warning(f"--resume: {line}")
