"""Training runs through the installed command line, each in processes of its own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KILLED = 128 + 9
REFUSED = 2
"""Also of a run whose loss is no longer finite."""


@dataclass(frozen=True)
class Run:
    exit_code: int
    events: list[dict]

    @property
    def killed(self) -> bool:
        """By the system: as a rule for want of memory."""
        return self.exit_code == KILLED

    @property
    def diverged(self) -> bool:
        """Its last step had a loss or a gradient that isn't finite."""
        last = self.steps[-1] if self.steps else None
        return self.exit_code == REFUSED and last is not None and not (math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"]))

    @property
    def start(self) -> dict:
        return next(event for event in self.events if event["event"] == "start")

    @property
    def steps(self) -> list[dict]:
        return [event for event in self.events if event["event"] == "step"]

    @property
    def held_out_losses(self) -> list[float]:
        return [event["loss"] for event in self.events if event["event"] == "eval"]


def train(config: dict, directory: Path, overrides: tuple[str, ...] = (), ranks: int = 1, may_be_killed: bool = False,
          may_diverge: bool = False) -> Run:
    """Trains in `directory`, which is emptied before; raises SystemExit where the run fails.

    config: without the output section. may_be_killed: it is started even where the plan says that it can't fit, and where the
    system ends it, what it had recorded is returned. may_diverge: so it is where the loss is no longer finite.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(directory.name + ".yaml")
    path.write_text(json.dumps(config | {"output": {"directory": str(directory)}}))
    force = ("--force",) if may_be_killed else ()
    command = [sys.executable, "-m", "bone_ds", "train", str(path), "--ranks", str(ranks), *force, *overrides]
    code = subprocess.run(command).returncode
    run = recorded(directory, code)
    if code and not (may_be_killed and run.killed or may_diverge and run.diverged):
        raise SystemExit(f"{' '.join(command)}: ended with exit code {code}")
    return run


def recorded(directory: Path, exit_code: int = 0) -> Run:
    events = directory / "events.jsonl"
    return Run(exit_code, [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else [])


def without_paths(config: object) -> object:
    """The config as it is recorded: files by their last names, since directories are another machine's."""
    if isinstance(config, dict):
        return {field: without_paths(value) for field, value in config.items()}
    return Path(config).name if isinstance(config, str) and "/" in config else config
