"""What one worker found, as it lies on disk between the worker and the report."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

PARTS = ("data", "forward", "backward", "optimizer", "rest")
"""Of a step, one after another. communication is inside backward and optimizer. rest: sums over the ranks, reading the loss."""
COMPONENTS = ("weights", "adapter", "optimizer", "gradients", "buckets", "gathered", "activations", "transient")
"""Of live bytes; named as the plan's."""


@dataclass(frozen=True)
class Step:
    """One timed step of all ranks."""

    parts_s: dict[str, float]
    """By `PARTS`, on rank 0."""
    positions: int
    tokens: int
    label_tokens: int

    @property
    def total_s(self) -> float:
        return sum(self.parts_s.values())


@dataclass(frozen=True)
class Kinds:
    """What one profiled step did, on rank 0."""

    step_s: float
    """Under the profiler, which costs time of its own."""
    by_kind_s: dict[str, float]
    """Sums to step_s."""
    matrix_products_s: float
    """Inside of all kinds."""


@dataclass(frozen=True)
class Memory:
    """Live bytes of tensor storages through one step, on rank 0."""

    peak_bytes: int
    at_peak: dict[str, int]
    """By `COMPONENTS`; sums to peak_bytes."""
    time_s: list[float]
    """From the start of the step; storages are counted meanwhile, so it takes longer than a timed one."""
    by_component: dict[str, list[int]]
    """At each time."""
    phases: list[tuple[str, float, float]]
    """Part, start and end, in seconds from the start of the step."""


@dataclass(frozen=True)
class Measurement:
    """One turn of one variant. Memory figures without "live" are the largest of any rank."""

    world_size: int
    device: str
    """cpu, or the GPU's name."""
    trainable_parameters: int
    steps: list[Step]
    resident_bytes: int
    """High-water mark of the process before any instrument, loading included."""
    allocated_bytes: int | None
    """High-water mark of torch's CUDA allocator; None without a GPU."""
    reserved_bytes: int | None
    matrix_peak_flops: float
    """Of one rank while all are at it, per second, in the model's dtype."""
    kinds: Kinds | None
    """None in turns that only time."""
    memory: Memory | None

    def write(self, path: Path) -> None:
        _write(path, {"measurement": asdict(self)})


@dataclass(frozen=True)
class Failure:
    """Why a variant has no measurement."""

    reason: str

    def write(self, path: Path) -> None:
        _write(path, {"failure": self.reason})


def read(path: Path) -> Measurement | Failure:
    tree = json.loads(path.read_text(encoding="utf-8"))
    if "failure" in tree:
        return Failure(tree["failure"])
    fields = tree["measurement"]
    steps = [Step(**step) for step in fields["steps"]]
    kinds, memory = fields["kinds"] and Kinds(**fields["kinds"]), None
    if fields["memory"]:
        memory = Memory(**fields["memory"] | {"phases": [tuple(phase) for phase in fields["memory"]["phases"]]})
    return Measurement(**fields | {"steps": steps, "kinds": kinds, "memory": memory})


def _write(path: Path, tree: dict) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(tree), encoding="utf-8")
    os.replace(aside, path)
