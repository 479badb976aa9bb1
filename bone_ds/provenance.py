"""Where figures come from: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

UNKNOWN, DIRTY = "unknown", "-dirty"
_OURS = Path(__file__).resolve().parents[1]


def provenance(*packages: str, checkout: Path = _OURS) -> dict:
    """checkout: the directory whose commit it is, by default this package's."""
    return {
        "commit": commit(checkout), "python": platform.python_version(),
        "machine": platform.machine(), "processor": processor(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in packages},
    }


def commit(checkout: Path) -> str:
    """With "-dirty" behind it where files have changed since; "unknown" where the directory is no checkout of its own, or without git."""
    root = _git(checkout, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != checkout.resolve():
        return UNKNOWN  # an installed package may lie inside another project's checkout
    return _git(checkout, "describe", "--always", f"--dirty={DIRTY}") or UNKNOWN


def is_unchanged(checkout: Path, since: str, *paths: str) -> bool:
    """Whether tracked files at the paths, git's pathspecs, are now as they were at that commit."""
    return since != UNKNOWN and not since.endswith(DIRTY) and _git(checkout, "diff", "--quiet", since, "--", *paths) is not None


def _git(directory: Path, *arguments: str) -> str | None:
    """What it prints; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=directory)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
