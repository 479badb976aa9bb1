"""What a run leaves on disk: the resolved config, events.jsonl, log.txt, checkpoints/ and adapter.safetensors.

`events.jsonl` is append-only, one JSON object a line. Every line has `event` and `time` (seconds since 1970). By event:

- `start`: `step`, `steps`, `world_size`, `trainable_parameters`, `data` and `eval` (counts of rows, kept, truncated,
  dropped, label-less, split and their pieces), `sources` (name, commits of the hub, weight, samples, samples per epoch),
  `model` (origin, revision, fingerprint), `versions`; a resumed run has one for each start, whose `step` is where it went on
- `step`: `step` (1 is the first), `epoch`, `loss` (nats, mean over the loss-bearing tokens of the global batch),
  `learning_rate`, `grad_norm` (before clipping), `step_s`, `tokens` and `label_tokens` of the global batch,
  `positions_per_s`, `tokens_per_s`, `label_tokens_per_s`, `memory_gib` (rank 0, high-water)
- `eval`: `step`, `loss` (nats, mean over the held-out loss-bearing tokens), `label_tokens`, `eval_s`
- `norms`, with train.log_norms_every: `step`, `gradient` (before clipping) and `adapter` (after the step), each by adapter tensor
- `checkpoint`: `step`, `path`, `save_s`
- `end`: `step`, `train_s`
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from bone_ds.config import RunConfig, dump_yaml, load_config
from bone_ds.errors import ConfigError


class RunDirectory:
    def __init__(self, path: Path):
        self.path = path
        self.events = path / "events.jsonl"
        self.log = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter.safetensors"

    @classmethod
    def planned(cls, config: RunConfig) -> RunDirectory:
        return cls(Path(config.output.directory).expanduser())

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raises ConfigError where the directory holds another run, or, to resume, none or one that differs."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output.directory: {self.path} is a file, not a directory")
        if resume:
            self._check_same_run(config)
        elif self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"output.directory: {self.path} is not empty; continue its run with --resume, or name another")

    def _check_same_run(self, config: RunConfig) -> None:
        stored_path = self.path / "config.yaml"
        if not stored_path.exists():
            raise ConfigError(f"--resume: {self.path} holds no run (no config.yaml)")
        stored = load_config(stored_path)
        free = {"wkv"}  # operators give equal results
        if not config.adapter.has_rank:
            free.add("rank")  # it follows from the other fields
        for section in ("model", "adapter", "data"):
            fields = type(getattr(config, section)).model_fields
            alike = tuple(field for field in fields if field not in free)
            self._check_equal(section, getattr(stored, section), getattr(config, section), alike)
        self._check_equal("train", stored.train, config.train, ("global_batch_size", "seed", "chunk_length", "l2wrap"))

    def _check_equal(self, section: str, stored, given, fields: tuple[str, ...]) -> None:
        for field in fields:
            before, now = getattr(stored, field), getattr(given, field)
            if before != now:
                raise ConfigError(f"--resume: {section}.{field}: {now!r} differs from the run's {before!r} ({self.path / 'config.yaml'})")

    def create(self, config: RunConfig, ds: dict) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._replace("config.yaml", dump_yaml(config))
        self._replace("deepspeed.json", json.dumps(ds, indent=2) + "\n")
        self._end_torn_line()

    def _replace(self, name: str, text: str) -> None:
        aside = self.path / f"{name}.partial"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.path / name)

    def _end_torn_line(self) -> None:
        """A run that was killed may have left half a line: it stays, on a line of its own."""
        if self.events.exists() and not self.events.read_bytes().endswith(b"\n"):
            with self.events.open("a", encoding="utf-8") as file:
                file.write("\n")

    def record(self, event: str, **fields) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3)} | fields)
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
