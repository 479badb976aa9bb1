"""The ranks: who this process is, as the launcher's variables say, and how the launcher is started.

The one place that reads the environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from bone_ds.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Ranks on this host."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def current(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process's place under `deepspeed` or `torchrun`, or None where no launcher started it."""
    if not all(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return None
    # torchrun and DeepSpeed's launcher name it differently.
    local_world_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ["WORLD_SIZE"]
    return Ranks(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]), int(local_world_size))


def default_ranks() -> int:
    """All GPUs of this machine, or 1."""
    import torch

    return max(1, torch.cuda.device_count())


def start(arguments: list[str], ranks: int) -> int:
    """Runs `python -m bone_ds ARGUMENTS` on so many local ranks under DeepSpeed's launcher; returns its exit code."""
    if ranks < 1:
        raise ConfigError(f"--ranks: {ranks} is no number of ranks, give 1 or more")
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port()),
        "--no_local_rank", "--log_level", "critical", "--module", "bone_ds", *arguments]
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
