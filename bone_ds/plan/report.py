"""What a plan says: numbers, and the same as a table, a line and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

GIB = 2**30
COMPONENTS = ("weights", "adapter", "gradients", "optimizer", "buckets", "gathered", "activations", "transient", "context", "slack")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the matrix products, attention and WKV in one optimizer step on one rank."""

    forward: int
    backward: int
    recomputed: int
    """Forward work that activation checkpointing does again in backward."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class Workload:
    """What the run goes over."""

    steps: int | None
    """Optimizer steps; None where the data are not there and train.steps is not given."""
    tokens_per_step: float
    """Mean over the steps, of all ranks."""
    label_tokens_per_step: float
    report: dict | None
    """`bone_ds.data.Report` of data.train; None where the data are not there."""
    heaviest: dict
    """The micro-batch that was planned: tokens, documents, label_tokens."""


@dataclass(frozen=True)
class Change:
    """A changed configuration that fits."""

    overrides: dict[str, object]
    """Field -> value; `--ranks` is one too."""
    peak_bytes: int
    flops_ratio: float
    """FLOPs of a step on one rank against the plan's."""
    note: str
    """What it costs, in words."""

    def __str__(self) -> str:
        return " ".join(f"{field} {value}" if field.startswith("--") else f"{field}={value}" for field, value in self.overrides.items())


@dataclass(frozen=True)
class Plan:
    """The memory of the rank that needs most, and the work of a step, before the run."""

    model: str
    notes: tuple[str, ...]
    """What was assumed because it is not there: weights, data."""
    device: str
    """cpu or cuda"""
    world_size: int
    stage: int
    parameters: int
    """Of the base model."""
    trainable_parameters: int
    by_component: dict[str, int]
    """Bytes at the peak by `COMPONENTS`; they sum to peak_bytes.

    weights: the frozen base, whole or this rank's share. adapter: trainable tensors in the model's dtype. gradients: of the adapter.
    optimizer: fp32 masters and AdamW's moments. buckets: what ZeRO reduces gradients in. gathered: parameters that ZeRO-3 has made
    whole. activations: what forward keeps for backward. transient: everything else in tensors at the peak. context: what the process
    or the device holds before any tensor. slack: what the allocator and the libraries hold beyond the tensors.
    """
    peak_bytes: int
    """cuda: of the device; cpu: the process's high-water resident set."""
    live_peak_bytes: int
    """Of tensors alone."""
    saved_by_layer_kind: dict[str, int]
    """Bytes that forward keeps for backward: attention, mlp, norms, embedding, loss, other."""
    flops: Flops
    workload: Workload
    checkpoint_bytes: int
    """On disk, one of train.keep_checkpoints."""
    adapter_bytes: int
    """On disk."""
    capacity_bytes: int | None
    """Of one rank; None where nobody said."""
    changes: tuple[Change, ...]
    """That would make it fit, the cheapest first; empty where it fits."""

    @property
    def fits(self) -> bool | None:
        """None without a capacity."""
        return None if self.capacity_bytes is None else self.peak_bytes <= self.capacity_bytes

    def as_dict(self) -> dict:
        """For JSON."""
        changes = [asdict(change) for change in self.changes]
        return asdict(self) | {"flops": asdict(self.flops) | {"total": self.flops.total}, "fits": self.fits, "changes": changes}
