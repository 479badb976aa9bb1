"""What DeepSpeed 0.19 itself holds on one rank, from the resolved JSON and the shapes.

Read in runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py and fp16/unfused_optimizer.py, and measured with
`bone_ds.live` on the real engine. n is the number of trainable elements, w the number of ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from bone_ds import ds_json

FP32_BYTES = 4
_DEFAULT_BUCKET = 500_000_000
_DEFAULT_PREFETCH = 50_000_000
_DEFAULT_PERSISTENCE = 100_000
_DEFAULT_DISTANCE = 1_000_000_000
_DEFAULT_SUB_GROUP = 1_000_000_000
_UNBOUNDED = 2**63
_START_OF_BACKWARD = 4
"""Modules."""
_FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
_NOT_PLANNED = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False}
"""By what switches them off."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes by component, as in EngineMemory."""

    fixed: dict[str, int]
    update: dict[str, int]


@dataclass(frozen=True)
class EngineMemory:
    """Bytes by component, beside what the model's own forward and backward hold."""

    fixed: dict[str, int]
    """weights, adapter, optimizer; from stage 3 on gradients and buckets too."""
    between: dict[str, int]
    """What micro-batches before the last leave behind; empty where there is one alone."""
    backward: dict[str, int]
    """What there is in backward beside `fixed`; of what is in `between` too, the larger counts."""
    end_of_backward: dict[str, int]
    """What lies beside `fixed` when the last gradient is there and no activation is left."""
    update: dict[str, int]
    """What the optimizer step adds to `fixed`."""
    save: dict[str, int]
    """What a checkpoint adds to `fixed` in host memory on rank 0."""
    untouched_bytes: int
    """Of the buckets: allocated and never written to, so that the system keeps no pages of them."""
    host: HostMemory | None = None
    """What offload keeps in host memory, beside all this."""

    def in_one_memory(self) -> EngineMemory:
        """As it is on a CPU, where the host's memory is the device's."""
        if self.host is None:
            return self
        fixed, update = (dict(Counter(ours) + Counter(theirs)) for ours, theirs in
                         ((self.fixed, self.host.fixed), (self.update, self.host.update)))
        return replace(self, fixed=fixed, update=update, host=None)


def engine_memory(ds: dict, world_size: int, weights: Sequence[int], trainable: Sequence[int], dtype_bytes: int,
                  accumulates: bool, device: str = "cpu") -> EngineMemory:
    """weights and trainable: elements of each frozen and trainable tensor. accumulates: several micro-batches make one step."""
    zero, offloaded = ds["zero_optimization"], ds_json.offloaded(ds)
    gradient_bytes = _gradient_bytes(ds, dtype_bytes)
    build = {0: _replicated, 1: _flat, 2: _flat, 3: _partitioned}[zero["stage"]]
    if zero["stage"] in (1, 2) and offloaded:
        build = _flat_offloaded
    elif zero["stage"] == 1 and dtype_bytes < gradient_bytes == FP32_BYTES:
        build = _flat_in_fp32
    return build(_Sizes(zero, world_size, weights, trainable, dtype_bytes, gradient_bytes, _adam_bytes(ds), accumulates, offloaded, device))


def not_planned(ds: dict) -> tuple[str, ...]:
    """What of the JSON is left out here, a line each: ZeRO++ keeps other copies of the weights, or smaller ones."""
    section = ds["zero_optimization"]
    given = [name for name, off in _NOT_PLANNED.items() if section["stage"] == 3 and section.get(name, off) != off]
    return tuple(f"not planned: zero_optimization.{name}: {section[name]}; nothing is refused" for name in given)


def _adam_bytes(ds: dict) -> int:
    fused = ds.get("optimizer", {}).get("params", {}).get("fused", False)
    return 0 if fused else 2 * FP32_BYTES


def _gradient_bytes(ds: dict, dtype_bytes: int) -> int:
    asked = ds.get("data_types", {}).get("grad_accum_dtype")
    return dtype_bytes if asked is None else FP32_BYTES if asked in _FP32_NAMES else 2


@dataclass(frozen=True)
class _Sizes:
    zero: dict
    world_size: int
    weights: Sequence[int]
    trainable: Sequence[int]
    dtype_bytes: int
    gradient_bytes: int
    adam_bytes: int
    """Of an element, what AdamW computes with."""
    accumulates: bool
    offloaded: tuple[str, ...]
    device: str

    @property
    def n(self) -> int:
        return sum(self.trainable)

    @property
    def flat_part(self) -> int:
        """Elements of this rank's part of the flat adapter."""
        return -(-self.n // (2 * self.world_size)) * 2

    @property
    def shares(self) -> list[int]:
        """Elements of each trainable tensor that a rank holds at stage 3."""
        return [-(-elements // self.world_size) for elements in self.trainable]

    @property
    def weight_shares(self) -> list[int]:
        return [-(-elements // self.world_size) for elements in self.weights]

    @property
    def stepped(self) -> int:
        """Elements that AdamW steps at a time at stage 3."""
        return min(sum(self.shares), max(int(self.zero.get("sub_group_size", _DEFAULT_SUB_GROUP)), *self.shares))

    def in_host(self, section: str, *sizes_bytes: int) -> int:
        """Bytes that tensors take in host memory: pinned ones get the next power of two from torch's allocator."""
        pinned = self.device == "cuda" and self.zero[section].get("pin_memory", True)
        return sum(1 << (size_bytes - 1).bit_length() if pinned else size_bytes for size_bytes in sizes_bytes)

    @property
    def save(self) -> dict[str, int]:
        """Masters and both moments of the whole adapter, gathered one tensor after the other."""
        return {"transient": 3 * FP32_BYTES * self.n + 2 * FP32_BYTES * max(self.trainable)}

    @property
    def bucket(self) -> int:
        """Bytes of one buffer that gradients are reduced in."""
        return int(self.zero.get("reduce_bucket_size", _DEFAULT_BUCKET)) * self.dtype_bytes


def _replicated(s: _Sizes) -> EngineMemory:
    """Stage 0: fp32 masters in bf16 alone; gradients stay on the parameters, where the trace has them."""
    masters = 0 if s.dtype_bytes == FP32_BYTES else 1
    largest = s.adam_bytes * max(s.trainable)
    reduced = {"buckets": s.n * s.dtype_bytes} if s.world_size > 1 else {}
    gradients = {"gradients": s.n * s.dtype_bytes}
    return EngineMemory(
        fixed={"weights": sum(s.weights) * s.dtype_bytes, "adapter": s.n * s.dtype_bytes, "optimizer": (2 + masters) * FP32_BYTES * s.n},
        between=gradients if s.accumulates else {}, backward={},
        end_of_backward=gradients | reduced,
        update=gradients | {"transient": masters * FP32_BYTES * s.n + largest},
        save=s.save, untouched_bytes=0)


def _flat(s: _Sizes) -> EngineMemory:
    """Stages 1 and 2: one flat copy of the adapter, and this rank's part of it in fp32 with its moments."""
    part = s.flat_part
    contiguous = s.zero.get("contiguous_gradients", True)
    buckets = s.bucket * (2 if s.zero.get("overlap_comm") else 1) if contiguous else 0
    kept = {"gradients": part * s.gradient_bytes} if s.zero["stage"] == 2 else {"gradients": s.n * s.gradient_bytes, "buckets": buckets}
    # In stage 2 a micro-batch's own go from the buckets into a copy of this rank's part, and then into the sum of those before.
    copied = part * s.dtype_bytes if s.zero["stage"] == 2 and s.accumulates and s.gradient_bytes == s.dtype_bytes and contiguous else 0
    # In stage 1 the buckets stay from the first micro-batch of a step to the last.
    in_backward = {"buckets": buckets} if contiguous else {"gradients": min(s.bucket, s.n * s.dtype_bytes)}
    return EngineMemory(
        fixed={"weights": sum(s.weights) * s.dtype_bytes, "adapter": s.n * s.dtype_bytes, "optimizer": 3 * FP32_BYTES * part},
        between=kept if s.accumulates else {}, backward=in_backward,
        end_of_backward={"buckets": buckets + copied} | kept,
        # The gradients, in fp32 too, and what AdamW computes with or, before it, their second copy.
        update={"gradients": part * s.gradient_bytes + FP32_BYTES * part,
                "transient": (max(s.adam_bytes, FP32_BYTES) - s.gradient_bytes) * part},
        save=s.save, untouched_bytes=max(0, buckets - s.n * s.dtype_bytes))


def _flat_in_fp32(s: _Sizes) -> EngineMemory:
    """Stage 1 in bf16 with fp32 gradients, an optimizer of its own (bf16_optimizer.py): all of them in one flat buffer at all times,
    and within a step the parameters' own in bf16 too."""
    part = s.flat_part
    own = {"gradients": s.n * s.dtype_bytes}
    return EngineMemory(
        fixed={"weights": sum(s.weights) * s.dtype_bytes, "adapter": s.n * s.dtype_bytes, "optimizer": 3 * FP32_BYTES * part,
               "gradients": s.n * FP32_BYTES},
        between=own if s.accumulates else {}, backward={},
        end_of_backward=own | {"transient": max(FP32_BYTES * max(s.trainable), s.n * s.dtype_bytes if s.world_size > 1 else 0)},
        update=own | {"transient": s.adam_bytes * part},
        save=s.save, untouched_bytes=0)


def _flat_offloaded(s: _Sizes) -> EngineMemory:
    """Stages 1 and 2 with the optimizer in host memory: there this rank's part with its gradients, both in fp32, and a copy in the model's
    dtype on its way back. In between, gradients pass through a buffer of the largest tensor's size, one on either side."""
    stage, part, in_fp32 = s.zero["stage"], s.flat_part, s.gradient_bytes > s.dtype_bytes
    largest_bytes = max(s.trainable) * s.dtype_bytes
    in_host = partial(s.in_host, "offload_optimizer")
    # In stage 2 gradients in the model's dtype are summed in host memory, those in fp32 on the device.
    summed_there = stage == 2 and s.accumulates and not in_fp32
    summed_bytes = in_host(*(elements * s.dtype_bytes for elements in s.trainable)) // s.world_size if summed_there else 0
    host = HostMemory(
        fixed={"adapter": in_host(part * s.dtype_bytes), "optimizer": in_host(FP32_BYTES * part) + 2 * FP32_BYTES * part,
               "gradients": in_host(FP32_BYTES * part, largest_bytes) + summed_bytes},
        update={"transient": s.adam_bytes * part})
    staged_bytes = s.gradient_bytes if stage == 1 else s.dtype_bytes
    buckets = s.bucket // s.dtype_bytes * staged_bytes * (2 if s.zero.get("overlap_comm") else 1)
    own = s.n * s.gradient_bytes if stage == 1 else 0
    part_in_fp32 = part * s.gradient_bytes if in_fp32 else 0
    between = {"gradients": own, "buckets": buckets} if stage == 1 else {"gradients": part_in_fp32}
    return EngineMemory(
        fixed={"weights": sum(s.weights) * s.dtype_bytes, "adapter": s.n * s.dtype_bytes, "gradients": largest_bytes},
        between=between if s.accumulates else {}, backward={"buckets": buckets},
        end_of_backward={"gradients": own + part_in_fp32, "buckets": buckets}, update={"gradients": part_in_fp32},
        save=s.save, untouched_bytes=max(0, buckets - s.n * staged_bytes), host=host)


def _partitioned(s: _Sizes) -> EngineMemory:
    """Stage 3: a share of everything, the bucket and a flat buffer of gradients at all times."""
    part, stepped = sum(s.shares), s.stepped
    buckets = s.bucket if s.zero.get("contiguous_gradients", True) else 0
    fixed = {"buckets": buckets}
    if "offload_param" not in s.offloaded:
        fixed |= {"weights": sum(s.weight_shares) * s.dtype_bytes, "adapter": part * s.dtype_bytes}
    update = {}
    if "offload_optimizer" not in s.offloaded:
        fixed |= {"optimizer": 3 * FP32_BYTES * part, "gradients": part * s.gradient_bytes}
        # What AdamW computes with or, before it, the gradients' copy in bf16.
        update = {"gradients": FP32_BYTES * stepped, "transient": max(s.adam_bytes, FP32_BYTES - s.gradient_bytes) * stepped}
    return EngineMemory(
        fixed=fixed, between={}, backward={},
        end_of_backward={"transient": s.n * s.dtype_bytes if s.world_size > 1 else 0},
        update=update, save=s.save, untouched_bytes=max(0, buckets - s.n * s.dtype_bytes),
        host=_partitioned_in_host(s) if s.offloaded else None)


def _partitioned_in_host(s: _Sizes) -> HostMemory:
    """The shares, and with the optimizer's the gradients, in fp32 too at all times."""
    part, fixed, update = sum(s.shares), {}, {}
    if "offload_param" in s.offloaded:
        in_host = partial(s.in_host, "offload_param")
        fixed |= {"weights": in_host(*(share * s.dtype_bytes for share in s.weight_shares)), "adapter": in_host(part * s.dtype_bytes)}
    if "offload_optimizer" in s.offloaded:
        gradients = s.in_host("offload_optimizer", part * s.gradient_bytes, part * FP32_BYTES)
        fixed |= {"optimizer": 3 * FP32_BYTES * part, "gradients": gradients}
        update = {"transient": s.adam_bytes * s.stepped}
    return HostMemory(fixed, update)


Modules = Sequence[Sequence[tuple[str, int]]]
"""In the order they run: name and elements of each parameter that a module owns itself."""


@dataclass(frozen=True)
class Gathered:
    """Elements that stage 3 holds whole, beside its shares."""

    in_forward: tuple[int, ...]
    """By module, in the order they run."""
    at_start_of_backward: int
    most: int


def gathered(ds: dict, world_size: int, forward: Modules, backward: Modules, device: str = "cpu") -> Gathered:
    """Of the forward that follows on the first recorded one: everything is fetched anew, with what DeepSpeed prefetches.

    One rank gathers nothing, its shares are the parameters, unless they come from host memory.
    """
    from_host = device == "cuda" and "offload_param" in ds_json.offloaded(ds)
    if ds["zero_optimization"]["stage"] < 3 or world_size == 1 and not from_host:
        return Gathered((0,), 0, 0)
    coordinator = _Coordinator(ds["zero_optimization"], [*forward, *backward], collects=world_size > 1)
    held = [coordinator.run(step) for step in range(len(forward) + len(backward))]
    middle = len(forward)
    return Gathered(tuple(held[:middle]), max(held[middle:middle + _start(backward)]), max(held))


def _start(backward: Modules) -> int:
    """How many modules run while what forward has kept is all there still: through the first recomputed layer, if there is one."""
    # Its last module runs again at once, for its own backward.
    turn = next((step for step in range(1, len(backward)) if backward[step] == backward[step - 1]), 0)
    return max(_START_OF_BACKWARD, turn + 1)


@dataclass
class _Group:
    """Parameters fetched by one collective into one flat buffer, from which all are copied when the first is waited for.

    The buffer lives until the last of them is.
    """

    elements: int
    waited: bool = False


class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator over a complete trace. What it calls persistent is released after backward too."""

    def __init__(self, zero: dict, order: Modules, collects: bool):
        """collects: from other ranks; otherwise each parameter is copied alone."""
        self.order, self.collects = order, collects
        self.sizes = {name: elements for module in order for name, elements in module}
        threshold = int(zero.get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENCE))
        self.persistent = {name for name, elements in self.sizes.items() if elements <= threshold}
        self.prefetch = int(zero.get("stage3_prefetch_bucket_size", _DEFAULT_PREFETCH))
        self.most_live = int(zero.get("stage3_max_live_parameters", _DEFAULT_DISTANCE))
        self.distance = int(zero.get("stage3_max_reuse_distance", _DEFAULT_DISTANCE))
        self.queue = deque((step, name) for step, module in enumerate(order) for name in sorted({name for name, _ in module}))
        self.fetched_for = {name: -_UNBOUNDED for name in self.sizes}
        self.available: set[str] = set()
        self.groups: dict[str, _Group] = {}

    def run(self, step: int) -> int:
        """One module: fetch, wait, prefetch; the most elements held; then release."""
        needed = {name for name, _ in self.order[step]}
        self._fetch(needed - self.available)
        for name in needed:
            self._wait(name)
        held = self._held()
        self._skip(step, needed)
        self._prefetch()
        held = max(held, self._held())
        for name in needed:
            if self._is_released(name, step + 1):
                self.available.discard(name)
        return held

    def _held(self) -> int:
        if not self.collects:
            return sum(self.sizes[name] for name in self.available)
        groups = {id(group): group for group in self.groups.values()}.values()
        flat = sum(group.elements for group in groups)
        copied = sum(self.sizes[name] for name in self.available if name not in self.groups or self.groups[name].waited)
        return flat + copied

    def _fetch(self, names: set[str]) -> None:
        if not names:
            return
        group = _Group(sum(self.sizes[name] for name in names))
        for name in names:
            self.groups[name] = group
        self.available |= names

    def _wait(self, name: str) -> None:
        group = self.groups.pop(name, None)
        if group is not None:
            group.waited = True

    def _skip(self, step: int, needed: set[str]) -> None:
        todo = {name for name in needed if self.fetched_for[name] < step}
        while self.queue and todo:
            used_at, name = self.queue.popleft()
            self.fetched_for[name] = used_at
            todo.discard(name)

    def _prefetch(self) -> None:
        limit = min(self.most_live - sum(self.sizes[name] for name in self.available), self.prefetch)
        chosen: set[str] = set()
        while self.queue and sum(self.sizes[name] for name in chosen) < limit:
            used_at, name = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for[name], used_at)
            if name not in self.available:
                chosen.add(name)
        self._fetch(chosen)

    def _is_released(self, name: str, step: int) -> bool:
        if name in self.persistent or self.fetched_for[name] > step:
            return False
        traversed = 0
        for module in self.order[step:]:
            if traversed >= self.distance:
                break
            for other, elements in module:
                if other == name:
                    return False
                traversed += elements
        return True


def elements(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return [prod(shape) for shape in shapes]
