"""Checkpoints as training goes, written by rank 0: at once, or on a thread beside the steps that follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bone_ds import engine as engines
from bone_ds import publishing
from bone_ds.checkpoint import files, retention
from bone_ds.checkpoint.files import Origin, Snapshot
from bone_ds.engine import Engine
from bone_ds.engine.state import MASTER, PARTS
from bone_ds.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    held_out_loss: float | None
    write_s: float
    """Of writing and verifying it, and of removing what is no longer kept."""


class Saver:
    """One a rank, a context manager that ends as `finish` does. Every rank calls its methods alike, but for `check`."""

    def __init__(self, directory: Path, adapter: Path, engine: Engine, origin: Origin, keep: int, keep_best: bool = False,
                 beside: bool = False, saved: Callable[[Saved], None] = lambda _: None):
        """directory: of the checkpoints. adapter: the file that is replaced by every checkpoint's adapter.

        beside: `save` returns when the state has been gathered; writing goes on, from a copy of 12 bytes a trainable parameter.
        saved: is called on rank 0 with each checkpoint, on the thread if there is one.
        """
        self._directory, self._adapter, self._engine, self._origin = directory, adapter, engine, origin
        self._keep, self._keep_best, self._saved = keep, keep_best, saved
        self._beside = beside
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # starts with the first thing to do
        self._writing: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown(wait=True)  # in another error what has been begun is still published

    def save(self, step: int, held_out_loss: float | None = None) -> None:
        """A checkpoint of the state after `step`, and the adapter as it is now. Waits for the one before.

        Raises CheckpointError on every rank where this one can't be written, or the one before couldn't; earlier ones are whole then.
        """
        self.finish()
        adam_step = self._engine.adam_step()
        parts = {part: self._engine.gather(part) for part in PARTS}
        snapshot = Snapshot(step, adam_step, self._engine.world_size, held_out_loss, parts)
        if not self._beside:
            engines.by_first(lambda: self._write(snapshot))
        elif parts[MASTER]:
            self._writing = self._thread.submit(self._write, snapshot)

    def finish(self) -> None:
        """Waits until what `save` began is on the disk, and raises CheckpointError on every rank where it isn't."""
        engines.by_first(self._wait)

    def check(self) -> None:
        """On rank 0 alone: raises what has gone wrong in writing so far, without waiting."""
        if self._writing and self._writing.done():
            self._wait()

    def complete(self, checkpoint: Path) -> None:
        """What follows in `save` once a checkpoint is published, and a run may not have come to."""
        engines.by_first(lambda: self._complete(checkpoint))

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            path = files.write(self._directory, snapshot, self._origin)
            self._complete(path)
            self._saved(Saved(path, snapshot.step, snapshot.held_out_loss, time.monotonic() - started))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; earlier checkpoints are whole, go on from the last with --resume") from None

    def _complete(self, checkpoint: Path) -> None:
        """What is no longer kept is gone, which makes room, and the run's adapter is that of its last checkpoint."""
        with publishing.writing(self._directory):
            retention.thin(self._directory, self._keep, self._keep_best)
        publishing.copy(checkpoint / files.ADAPTER, self._adapter)
