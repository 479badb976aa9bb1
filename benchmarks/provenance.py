"""Where rows come from: commit, machine, versions."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def provenance(*packages: str) -> dict:
    return {
        "commit": commit(), "python": platform.python_version(), "machine": platform.machine(),
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)), "versions": {name: version(name) for name in packages},
    }


def commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return described.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
