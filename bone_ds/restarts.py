"""A run that breaks is started anew from its last checkpoint, as long as that gets it further."""

from __future__ import annotations

import json
import signal
import sys

from bone_ds import launch
from bone_ds.run_directory import RunDirectory
from bone_ds.stopping import STOPPED

_NOT_BROKEN = (0, 2, STOPPED, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
"""Done, the user's to mend, or asked to end."""


def start(arguments: list[str], ranks: int, run: RunDirectory, max_restarts: int) -> int:
    """As `launch.start`, up to so many times more: each where the run broke, and made a step since it was restarted."""
    arguments = [*arguments, "--max-restarts", "0"]  # a rank has no restarts of its own
    code = launch.start(arguments, ranks)
    for restart in range(1, max_restarts + 1):
        if code in _NOT_BROKEN:
            break
        _say(f"exit code {code}; restart {restart} of {max_restarts} from the last checkpoint")
        steps = _steps_recorded(run)
        code = launch.start([*arguments, *["--resume"] * run.config.exists()], ranks)
        if code not in _NOT_BROKEN and _steps_recorded(run) == steps:
            _say(f"exit code {code}; restart {restart} made no step, so there is no other")
            break
    return code


def _steps_recorded(run: RunDirectory) -> int:
    if not run.events.exists():
        return 0
    with run.events.open(encoding="utf-8", errors="replace") as file:
        return sum(_is_step(line) for line in file)


def _is_step(line: str) -> bool:
    try:
        return json.loads(line)["event"] == "step"
    except (ValueError, KeyError, TypeError):
        return False  # torn by the end of the run that wrote it


def _say(line: str) -> None:
    print(f"bone-ds: {line}", file=sys.stderr, flush=True)
