"""Runs of one tiny model that something happens to, beside the one that nothing did."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import tiny
from started import Started, events

from bone_ds import checkpoint
from bone_ds.run_directory import RunDirectory
from faults.equality import differences

LONGEST_S = 300
"""That anything may take before it counts as hung."""
_STARTS: list[Start] = []
KINDS = ("start", "step", "eval", "checkpoint", "bad_step", "stop", "end")


class TinyRuns:
    """A directory with model and rows, and places below it: each has a run.yaml, whose run is in `run` beside that."""

    def __init__(self, directory: Path, ranks: int = 2, rows: int = 40, held_out_rows: int = 8, **sections: dict):
        """sections: of the configuration, which all runs here have in common."""
        self.directory, self.ranks, self.sections = directory, ranks, sections
        directory.mkdir(parents=True)
        self.model = tiny.write_model(directory / "model")
        self.rows = tiny.write_rows(directory / "rows.jsonl", rows)
        self.held_out = tiny.write_rows(directory / "held_out.jsonl", held_out_rows)

    @property
    def command(self) -> list[str]:
        """Of `python -m`."""
        return ["bone_ds", "train", "run.yaml", "--ranks", str(self.ranks)]

    def place(self, name: str, **sections: dict) -> Path:
        """A new one. sections: fields of its own."""
        place = self.directory / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        tree = tiny.config_tree(self.model, self.rows, Path("run"), **self.sections)
        tree["data"]["eval"] = str(self.held_out)
        for section, fields in sections.items():
            tree[section] |= fields
        (place / "run.yaml").write_text(json.dumps(tree))
        return place

    def whole(self) -> Path:
        """The place of the run that nothing happens to, which is trained when it is first asked for."""
        place = self.directory / "whole"
        if not place.exists():
            start = Start(self.place("whole"), self.command)
            assert start.process.wait(LONGEST_S) == 0, start.errors.read_text()
        return place

    def goes_on(self, place: Path, **options) -> list[str]:
        """What is not as it must be once the run has been started again, to its end; `options` are those of Start."""
        start = Start(place, [*self.command, *resuming(place)], **options)
        code = start.process.wait(LONGEST_S)
        if code:
            return [f"started again it ended with {code}: {start.errors.read_text()}"]
        return differences(place / "run", self.whole() / "run")


class Start(Started):
    """One start of a run, with what it has recorded itself."""

    def __init__(self, place: Path, command: list[str], within: Sequence[str] = (), variables: Mapping[str, str] | None = None,
                 prints_to: Path | None = None):
        self.place = place
        self.before = {kind: len(events(place / "run", kind)) for kind in KINDS}
        super().__init__(place, command, within, variables, prints_to)
        _STARTS.append(self)

    def recorded(self, kind: str) -> list[dict]:
        return events(self.run, kind)[self.before[kind]:]

    def last(self, kind: str) -> int:
        """The step of the last such event of this start; -1 without one."""
        return max((event["step"] for event in self.recorded(kind)), default=-1)

    def lives(self) -> bool:
        return self.process.poll() is None

    def ends_now(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def said(self) -> list[str]:
        """The lines of its own on stderr; launchers have theirs."""
        lines = self.errors.read_text(errors="replace").splitlines()
        return [line.partition("bone-ds: ")[2] for line in lines if "bone-ds: " in line]


def leaving_nothing(fault: Callable[[], dict]) -> Callable[[], dict]:
    """The same, after which no process of a start lives on, were it that it failed."""

    def tried() -> dict:
        try:
            return fault()
        finally:
            while _STARTS:
                _STARTS.pop().ends_now()

    return tried


def resuming(place: Path) -> list[str]:
    """What a job script gives to a run that may have begun."""
    return ["--resume"] if RunDirectory(place / "run").config.exists() else []


def published(place: Path) -> list[int]:
    """The steps of the checkpoints there. Raises CheckpointError where one is not whole."""
    return [checkpoint.verify(path).step for path in checkpoint.existing(RunDirectory(place / "run").checkpoints)]
