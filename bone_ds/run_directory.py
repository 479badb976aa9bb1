"""What a run leaves on disk: the resolved config, events.jsonl, log.txt, checkpoints/, adapter.safetensors, and `lock` (`run_lock`).

`events.jsonl` is append-only, one JSON object a line. Every line has `event` and `time` (seconds since 1970). By event:

- `start`: `step`, `steps`, `world_size`, `trainable_parameters`, `data` and `eval` (counts of rows, kept, truncated,
  dropped, label-less, split and their pieces), `sources` (name, commits of the hub, weight, samples, samples per epoch),
  `model` (origin, revision, fingerprint), `versions`, `checkpoint` (the one it went on from, or null); a resumed run has one for each
  start, whose `step` is where it went on. Steps after it that the run had done before are done again: of several events of one step
  the last counts
- `step`: `step` (1 is the first), `epoch`, `loss` (nats, mean over the loss-bearing tokens of the global batch),
  `learning_rate`, `grad_norm` (before clipping), `step_s`, `tokens` and `label_tokens` of the global batch,
  `positions_per_s`, `tokens_per_s`, `label_tokens_per_s`, `memory_gib` (rank 0, high-water)
- `eval`: `step`, `loss` (nats, mean over the held-out loss-bearing tokens), `label_tokens`, `eval_s`
- `norms`, with train.log_norms_every: `step`, `gradient` (before clipping) and `adapter` (after the step), each by adapter tensor
- `checkpoint`: `step`, `path`, `held_out_loss` (nats, or null), `write_s` (to write, read back and publish it), once it is on the disk
- `bad_step`: `step`, `loss`, `grad_norm` (one is NaN or infinite: no weight was changed), `in_a_row`, `samples`: pairs of a source and
  a row of it, from 1; those of the micro-batches whose loss was so, else the global batch's
- `stop`: `step`, `signal`: the run was asked to end; null where another rank was
- `end`: `step`, `train_s`
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bone_ds import publishing, run_lock
from bone_ds.config import RunConfig, dump_yaml, load_config
from bone_ds.errors import ConfigError


class RunDirectory:
    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.events = path / "events.jsonl"
        self.log = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter.safetensors"

    @classmethod
    def planned(cls, config: RunConfig) -> RunDirectory:
        return cls(Path(config.output.directory).expanduser())

    def check(self, config: RunConfig, resume: bool | Path) -> None:
        """Raises ConfigError where the directory holds another run, or, to resume, none or one that differs.

        resume: True goes on from the run's last checkpoint; a path from that one, of this run or, in a directory without a run, of another.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output.directory: {self.path} is a file, not a directory")
        if self.path.is_symlink() and not self.path.exists():
            raise ConfigError(f"output.directory: {self.path} is a link to what is not there, {self.path.readlink()}; remove it")
        above = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ConfigError(f"output.directory: {self.path}: can't be made, {above} is no directory to write to")
        if isinstance(resume, Path) and not (resume / "manifest.json").exists():
            raise ConfigError(f"--resume: {resume} is no checkpoint (no manifest.json); name a step-N of a run's checkpoints/")
        if self.goes_on(resume):
            self._check_same_run(config, self.path)
            return
        if self._holds_a_run():
            raise self._not_empty()
        if resume:
            self._check_same_run(config, resume)

    def goes_on(self, resume: bool | Path) -> bool:
        """Whether the run is the one in the directory, rather than one that begins there."""
        return resume is True or bool(resume) and resume.resolve().parent == self.checkpoints.resolve()

    def _not_empty(self) -> ConfigError:
        return ConfigError(f"output.directory: {self.path} is not empty; continue its run with --resume, or name another")

    def _holds_a_run(self) -> bool:
        """Or anything else that is not a start's that ended before it had written its config: that has a lock."""
        if self.config.exists() or self.checkpoints.exists() and any(self.checkpoints.iterdir()):
            return True
        return self.path.exists() and not (self.path / run_lock.NAME).exists() and any(self.path.iterdir())

    def _check_same_run(self, config: RunConfig, directory: Path) -> None:
        """The one whose config lies there: a run's directory or a checkpoint."""
        stored_path = directory / "config.yaml"
        if not stored_path.exists():
            raise ConfigError(f"--resume: {directory} holds no run (no config.yaml)")
        stored = load_config(stored_path)
        free = {"wkv"}  # operators give equal results
        if not config.adapter.has_rank:
            free.add("rank")  # it follows from the other fields
        for section in ("model", "adapter", "data"):
            fields = type(getattr(config, section)).model_fields
            alike = tuple(field for field in fields if field not in free)
            _check_equal(stored_path, section, getattr(stored, section), getattr(config, section), alike)
        _check_equal(stored_path, "train", stored.train, config.train, ("global_batch_size", "seed", "chunk_length", "l2wrap"))

    def check_unlocked(self) -> None:
        """Raises ConfigError where another process trains in the directory."""
        run_lock.check(self.path)

    @contextlib.contextmanager
    def locked(self, resume: bool | Path) -> Iterator[None]:
        """Makes the directory, which is made if it isn't there, this process's alone.

        Raises ConfigError where another run goes on in it, or has been there since `check`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with run_lock.held(self.path):
            if self.config.exists() and not self.goes_on(resume):
                raise self._not_empty()
            yield

    def record_start(self, checkpoint: str | None, **fields) -> None:
        """On the disk when it returns. It comes before `create`: whichever run has a configuration says where it began."""
        self._end_torn_line()
        self.record("start", checkpoint=checkpoint, **fields)
        with publishing.writing(self.events):
            publishing.sync(self.events)

    def create(self, config: RunConfig, ds: dict) -> None:
        with publishing.writing(self.checkpoints):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            publishing.sync(self.path.parent)
        publishing.write_text(self.config, dump_yaml(config))
        publishing.write_text(self.path / "deepspeed.json", json.dumps(ds, indent=2) + "\n")

    def began_from(self) -> Path | None:
        """The checkpoint of another run that the last start went on from, if any."""
        starts = self.recorded("start")
        path = starts[-1].get("checkpoint") if starts else None
        return Path(path) if path and Path(path).parent != self.checkpoints.absolute() else None

    def recorded(self, event: str) -> list[dict]:
        """Of all starts, in order."""
        if not self.events.exists():
            return []
        with self.events.open(encoding="utf-8", errors="replace") as file:
            return [found for line in file if (found := _parsed(line)).get("event") == event]

    def _end_torn_line(self) -> None:
        """A run that was killed may have left half a line: it stays, on a line of its own."""
        if self.events.exists() and not self.events.read_bytes().endswith(b"\n"):
            with publishing.writing(self.events), self.events.open("a", encoding="utf-8") as file:
                file.write("\n")

    def record(self, event: str, **fields) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3)} | fields)
        with publishing.writing(self.events), self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _parsed(line: str) -> dict:
    """Empty for one that was torn by the end of the run that wrote it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _check_equal(stored_path: Path, section: str, stored, given, fields: tuple[str, ...]) -> None:
    for field in fields:
        before, now = getattr(stored, field), getattr(given, field)
        if before != now:
            raise ConfigError(f"--resume: {section}.{field}: {now!r} differs from the run's {before!r} ({stored_path})")
