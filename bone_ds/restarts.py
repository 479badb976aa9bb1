"""A run that breaks is started anew from its last checkpoint, as long as that gets it further."""

from __future__ import annotations

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
    was_there, starts = run.config.exists(), len(run.recorded("start"))
    code = launch.start(arguments, ranks)
    for restart in range(1, max_restarts + 1):
        if code in _NOT_BROKEN:
            break
        steps = len(run.recorded("step"))
        # A run that was there and has not been begun upon goes on from where it was told to: --resume PATH.
        begun = run.config.exists() and (not was_there or len(run.recorded("start")) > starts)
        _say(f"exit code {code}; restart {restart} of {max_restarts} {'from the last checkpoint' if begun else 'as it was started'}")
        code = launch.start([*arguments, *["--resume"] * begun], ranks)
        if code not in _NOT_BROKEN and len(run.recorded("step")) == steps:
            _say(f"exit code {code}; restart {restart} made no step, so there is no other")
            break
    return code


def _say(line: str) -> None:
    print(f"bone-ds: {line}", file=sys.stderr, flush=True)
