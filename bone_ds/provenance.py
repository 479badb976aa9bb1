"""Where figures come from: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def provenance(*packages: str) -> dict:
    return {
        "commit": commit(), "python": platform.python_version(),
        "machine": platform.machine(), "processor": processor(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in packages},
    }


def commit() -> str | None:
    """Of the checkout this file lies in; None where it is installed, or without git."""
    root = Path(__file__).parents[1]
    if _git("rev-parse", "--show-toplevel") != str(root):
        return None
    return _git("describe", "--always", "--dirty")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
