"""A command that trains, in processes of its own: watched by what it records, its processes found by a variable that they all carry."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "RUN_UNDER_TEST"
"""A variable that its processes are found by."""


def events(run: Path, kind: str) -> list[dict]:
    """Of whole lines: a run that was killed may have left half of one."""
    if not (run / "events.jsonl").exists():
        return []
    found = []
    for line in (run / "events.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in found if event["event"] == kind]


class Started:
    """A command that trains in the directory's `run`."""

    def __init__(self, directory: Path, command: list[str], within: Sequence[str] = (), variables: Mapping[str, str] | None = None,
                 prints_to: Path | None = None):
        """command: of `python -m`, started in the directory. within: a command that runs another. variables: more of the environment.

        prints_to: a directory, by default the same.
        """
        self.run, self.steps_before = directory / "run", len(events(directory / "run", "step"))
        self.printed, self.errors = ((prints_to or directory) / name for name in ("printed.txt", "errors.txt"))
        environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: str(self.run)}
        environ |= variables or {}
        with self.printed.open("w") as printed, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", *command], cwd=directory, stdout=printed, stderr=errors, env=environ)

    def wait_for_steps(self, more: int) -> None:
        deadline = time.monotonic() + 100
        while len(events(self.run, "step")) < self.steps_before + more:
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.05)

    def processes(self) -> dict[int, dict[str, str]]:
        """Process id -> environment, of all that live: the command, its ranks and what those started."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(pair.partition("=")[::2] for pair in (path / "environ").read_text(errors="replace").split("\0"))
            except OSError:  # it has just ended
                continue
            if variables.get(MARK) == str(self.run):
                found[int(path.name)] = variables
        return found

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of all that live."""
        found = {}
        for pid, variables in self.processes().items():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            rank = variables.get("RANK") or variables.get("SLURM_PROCID")
            if "bone_ds\0train" in command and rank:
                found[int(rank)] = pid
        return found

    def ends(self) -> tuple[int, str]:
        code = self.process.wait(timeout=60)
        assert self.ranks() == {}
        return code, self.errors.read_text()
