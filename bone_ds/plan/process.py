"""What a process or a device holds besides tensors, and what there is to hold it.

The constants are measured on Linux with torch 2.13 and DeepSpeed 0.19.8, see benchmarks/plan_against_measured.py; those of CUDA follow
from the paper's Table 7, see benchmarks/paper_table7.py, and aren't measured here.
"""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass, replace
from pathlib import Path

from bone_ds.errors import ConfigError

MIB = 2**20
CPU_CONTEXT_BYTES = 420 * MIB
"""Resident when every library is imported and the process group stands, with a small data set that is in the cache of tokens."""
CPU_SLACK_BYTES = 140 * MIB
"""Of what libraries load or set up in the first steps."""
CPU_GATHER_SHARE = 1.1
"""What the process group and malloc seem to hold besides what stage 3 gathers in the heap; fitted on four configurations."""
CUDA_CONTEXT_BYTES = 500 * MIB
CUDA_SLACK_BYTES = 892 * MIB
"""Only the sum of the two is known."""


@dataclass(frozen=True)
class _ControlGroup:
    controller: str
    """As /proc/self/cgroup says it."""
    directory: Path
    limit: str
    used: str
    file_pages: tuple[str, str]
    """In memory.stat: of files, and part of what is used."""


_CONTROL_GROUPS = (
    _ControlGroup("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", ("inactive_file", "active_file")),
    _ControlGroup("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
                  ("total_inactive_file", "total_active_file")))
"""The outermost of version 2 and of version 1."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """`24GiB`, `24GB`, `80G` or a number of bytes; without an i, powers of ten. Raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    amount_bytes = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    if not 1 <= amount_bytes < 2**63:
        raise ConfigError(f"{option}: {text[:60]!r} is no amount of memory; write 24GiB, 24GB or 80G")
    return int(amount_bytes)


def capacity_bytes(device: str, local_world_size: int) -> int | None:
    """Memory of one rank on this machine; None for a GPU where there is none."""
    if device == "cpu":
        return available_bytes(local_world_size)
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def host_capacity_bytes(device: str, local_world_size: int) -> int | None:
    """Memory of this machine that one rank has beside its GPU's; None on a CPU, and where there is no GPU."""
    import torch

    return available_bytes(local_world_size) if device == "cuda" and torch.cuda.is_available() else None


def available_bytes(local_world_size: int) -> int:
    """Memory that each of this host's ranks may take: what the system calls available, within the limits of the control groups."""
    free = [_meminfo("MemAvailable")]
    memberships = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    groups = [group for outermost in _CONTROL_GROUPS for group in _groups_of_process(outermost, memberships)]
    free += [left for left in map(_control_group_bytes, groups) if left is not None]
    return min(free) // local_world_size


def _groups_of_process(outermost: _ControlGroup, memberships: str) -> list[_ControlGroup]:
    """The one that the process is in and those around it, of which each may have a limit, as those of a Slurm job and its steps have.

    In a container the first may have a path of the host's, which is not there.
    """
    paths = [path for _, controllers, path in (line.split(":", 2) for line in memberships.splitlines())
             if outermost.controller in controllers.split(",")]
    innermost = outermost.directory.joinpath(*(path.lstrip("/") for path in paths[:1]))
    return [replace(outermost, directory=directory) for directory in (innermost, *innermost.parents)
            if directory.is_relative_to(outermost.directory)]


def _control_group_bytes(group: _ControlGroup) -> int | None:
    """What its limit leaves; the pages of files that it holds make room as soon as anything else wants it. None without a limit."""
    paths = [group.directory / name for name in (group.limit, group.used, "memory.stat")]
    if not all(path.exists() for path in paths):
        return None
    limit, used, stat = (path.read_text(encoding="ascii") for path in paths)
    if not limit.strip().isdigit():
        return None
    sizes = dict(line.split() for line in stat.splitlines())
    return int(limit) - int(used) + sum(int(sizes.get(name, 0)) for name in group.file_pages)


def cpu_slack_bytes(fragmentation_bytes: int, gathered_bytes: int) -> int:
    """What malloc keeps between tensors, and what libraries and communication take."""
    return CPU_SLACK_BYTES + fragmentation_bytes + int(CPU_GATHER_SHARE * gathered_bytes)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/meminfo has no {field}")
