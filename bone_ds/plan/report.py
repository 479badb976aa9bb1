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
    host_bytes: int
    """As Plan.host_bytes."""
    flops_ratio: float
    """FLOPs of a step on all ranks against the plan's."""
    same_results: bool
    """But for rounding. Otherwise it changes what is learnt."""
    note: str
    """What it costs, in words."""

    def __str__(self) -> str:
        """As the command line takes it."""
        values = {field: "null" if value is None else value for field, value in self.overrides.items()}
        return " ".join(f"{field} {value}" if field.startswith("--") else f"{field}={value}" for field, value in values.items())


@dataclass(frozen=True)
class Plan:
    """The memory of the rank that needs most, and the work of a step, before the run."""

    model: str
    notes: tuple[str, ...]
    """What was assumed because it is not there (weights, data), or is left out of the figures."""
    complete: bool
    """False where a setting that lowers memory is left out of the figures; then nothing is refused."""
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
    live_by_component: dict[str, int]
    """Bytes at the peak of tensors alone, by `COMPONENTS`; they sum to live_peak_bytes. On a CPU that is another moment than the resident
    set's highest, and buckets that are never written to count here alone."""
    host_by_component: dict[str, int]
    """cuda: bytes of host memory that offload and cpu_checkpointing take beside the device's, by `COMPONENTS`, at their highest; empty
    without, and on a CPU, where both are one memory."""
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
    host_capacity_bytes: int | None
    """Host memory of one rank beside its device's; None where nobody said, and on a CPU. Nothing is refused by it."""
    changes: tuple[Change, ...]
    """That would make it fit, by FLOPs added, and last those that change what is learnt; empty where it fits."""

    @property
    def host_bytes(self) -> int:
        return sum(self.host_by_component.values())

    @property
    def needed_bytes(self) -> int:
        """What is needed for sure: without `slack`, which an allocator gives back before it fails."""
        return self.peak_bytes - self.by_component["slack"]

    @property
    def fits(self) -> bool | None:
        """With all slack; None without a capacity."""
        return None if self.capacity_bytes is None else self.peak_bytes <= self.capacity_bytes

    @property
    def cannot_fit(self) -> bool | None:
        """Not even without slack: such a run is refused. One that neither fits nor can't may fit. None without a capacity."""
        return None if self.capacity_bytes is None else self.complete and self.needed_bytes > self.capacity_bytes

    def as_dict(self) -> dict:
        """For JSON."""
        changes = [asdict(change) for change in self.changes]
        verdict = {"host_bytes": self.host_bytes, "needed_bytes": self.needed_bytes, "fits": self.fits, "cannot_fit": self.cannot_fit}
        return asdict(self) | {"flops": asdict(self.flops) | {"total": self.flops.total}, "changes": changes} | verdict
