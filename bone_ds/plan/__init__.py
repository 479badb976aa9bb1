"""Memory, FLOPs, steps and disk of a run before it starts: no weights are read, no device is needed.

    trace     the real model on fake tensors: what forward keeps, the peaks, FLOPs
    zero      what DeepSpeed holds beside it, as formulas
    memory    both together, by component, at the peak
    blocks    the blocks of memory that a micro-batch takes and frees, in order
    heap      what malloc makes of them on a CPU
    process   what a process or a device holds besides tensors
    workload  the run's batches
    changes   what would make it fit
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

from bone_ds import arch, ds_json, resolution
from bone_ds.arch import Architecture, Source
from bone_ds.config import RunConfig
from bone_ds.data import GlobalOrder, Samples, load_samples
from bone_ds.data_paths import is_hub_id
from bone_ds.errors import CheckpointError, DataError
from bone_ds.plan import changes, memory, process, trace, workload, zero
from bone_ds.plan.report import Change, Flops, Plan, Workload
from bone_ds.plan.table import breakdown, gib, line, refusal, table, warning
from bone_ds.plan.trace import Shape, Trace
from bone_ds.resolution import DTYPES

__all__ = ["Change", "Flops", "Plan", "Workload", "breakdown", "gib", "line", "of_run", "plan", "process", "refusal", "table", "warning"]

_FILE_HEADER_BYTES = 90
"""Of one tensor in a safetensors file, about."""


def plan(config: RunConfig, world_size: int, device: str = "cpu", capacity_bytes: int | None = None,
         host_capacity_bytes: int | None = None) -> Plan:
    """Plans from the files that are there; what isn't is assumed and said in `notes`. Raises BoneError.

    device: cpu or cuda, of the run, not of this process. capacity_bytes, host_capacity_bytes: of one rank, the latter beside a GPU's.
    """
    architecture = arch.resolve(config.model)
    resolution.check(config, architecture)
    source = architecture.outline(config.model)
    notes = [] if source.fingerprint else [f"{config.model.path}: the weights are not there; planned from the sizes of {source.origin}"]
    samples, missing = _samples(config, architecture, source)
    return of_run(config, world_size, architecture, source, samples, device=device, capacity_bytes=capacity_bytes,
                  host_capacity_bytes=host_capacity_bytes, notes=(*notes, *missing))


def of_run(config: RunConfig, world_size: int, architecture: Architecture, source: Source, samples: Samples | None,
           order: GlobalOrder | None = None, device: str = "cpu", capacity_bytes: int | None = None, held_bytes: int | None = None,
           host_capacity_bytes: int | None = None, notes: tuple[str, ...] = ()) -> Plan:
    """As `plan`, of what is open and loaded already. held_bytes: what the process holds by now (cpu)."""
    order = order or (samples and workload.order_of(config, samples))
    traces: dict[Hashable, Trace] = {}

    def again(changed: RunConfig, ranks: int) -> Plan:
        batches = _batches(changed, ranks, architecture, *_redealt(config, changed, samples, order))
        return _planned(changed, ranks, architecture, source, *batches, device, held_bytes, traces)

    planned = again(config, world_size)
    planned = replace(
        planned, capacity_bytes=capacity_bytes, host_capacity_bytes=host_capacity_bytes, notes=(*notes, *planned.notes))
    return replace(planned, changes=changes.that_fit(planned, config, again)) if planned.fits is False else planned


def _redealt(config: RunConfig, changed: RunConfig, samples: Samples | None,
             order: GlobalOrder | None) -> tuple[Samples | None, GlobalOrder | None]:
    """What the changed config goes over."""
    if samples is None or changed.data.max_length == config.data.max_length:
        return samples, order
    shorter = workload.cut(samples, changed.data)
    return shorter, workload.order_of(changed, shorter)


def _batches(config: RunConfig, world_size: int, architecture: Architecture, samples: Samples | None,
             order: GlobalOrder | None) -> tuple[Workload, workload.Heaviest]:
    if samples is None:
        return workload.assumed(config)
    return workload.of_samples(config, world_size, samples, order, architecture.carries_state)


def _planned(config: RunConfig, world_size: int, architecture: Architecture, source: Source, work: Workload, heaviest: workload.Heaviest,
             device: str, held_bytes: int | None, traces: dict[Hashable, Trace]) -> Plan:
    """traces: those made so far; neither stage nor ranks change one."""
    ds, shape = ds_json.resolve(config, world_size), heaviest.shape
    accumulation_steps = ds_json.accumulation_steps(config, world_size)
    accumulates = accumulation_steps > 1 or bool(config.train.chunk_length)
    policy = ds_json.activation_policy(ds)
    forward_and_backward = (config.model, config.adapter, config.train, policy, shape)
    if forward_and_backward not in traces:
        traces[forward_and_backward] = trace.trace(config, architecture, source, policy, shape, device)
    traced = traces[forward_and_backward]
    held = memory.memory(traced, ds, world_size, DTYPES[config.model.dtype].itemsize, accumulates, device,
                         later=heaviest.later, held_bytes=held_bytes)
    trainable, not_planned = memory.trainable_elements(traced), zero.not_planned(ds)
    return Plan(
        model=source.origin, notes=not_planned, complete=not not_planned, device=device, world_size=world_size,
        stage=ds_json.stage(ds), parameters=traced.parameters, trainable_parameters=trainable, by_component=held.by_component,
        peak_bytes=held.peak_bytes, live_peak_bytes=held.live_peak_bytes, live_by_component=held.live_by_component,
        host_by_component=held.host_by_component, saved_by_layer_kind=traced.kept_by_kind,
        flops=_flops(traced, shape, work, world_size), workload=work,
        checkpoint_bytes=3 * 4 * trainable + 3 * _FILE_HEADER_BYTES * len(traced.trainable),
        adapter_bytes=4 * trainable + _FILE_HEADER_BYTES * len(traced.trainable), capacity_bytes=None,
        host_capacity_bytes=None, changes=())


def _flops(traced: Trace, shape: Shape, work: Workload, world_size: int) -> Flops:
    """Of a mean step: the traced micro-batch's, by tokens."""
    scale = work.tokens_per_step / world_size / shape.tokens
    return Flops(**{part: round(count * scale) for part, count in traced.flops.items()})


def _samples(config: RunConfig, architecture: Architecture, source: Source) -> tuple[Samples | None, list[str]]:
    """The training samples, or why there are none.

    Raises CheckpointError where the model is there and its tokenizer isn't, and for one that the config names.
    """
    paths = config.data.train_paths
    missing = next((path for path in paths if not Path(os.path.expanduser(path)).exists() and not is_hub_id(path)), None)
    if missing is not None:
        field = "train" if config.data.train else "mixture"
        return None, [f"data.{field}: {missing} is not there; planned for full packs of data.max_length: {config.data.max_length}"]
    try:
        tokenizer = architecture.tokenizer(source)
    except CheckpointError as error:
        if source.fingerprint or config.model.tokenizer != "auto":
            raise
        return None, [f"no tokenizer: {error}; planned for full packs of data.max_length: {config.data.max_length}"]
    try:
        samples = load_samples(config.data, tokenizer, "train", config.model.cache_dir)
    except DataError as error:
        if not any(map(is_hub_id, paths)):
            raise
        return None, [f"{str(error).splitlines()[0]}; planned for full packs of data.max_length: {config.data.max_length}"]
    warning = resolution.context_warning(architecture, source, int(samples.lengths.max()))
    return samples, [warning.removeprefix("warning: ")] if warning else []
