"""The peak of one rank, from the trace of the model and DeepSpeed's own tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bone_ds.plan import heap, process, zero
from bone_ds.plan.report import COMPONENTS
from bone_ds.plan.trace import Trace


@dataclass(frozen=True)
class Memory:
    by_component: dict[str, int]
    """At the peak; sums to peak_bytes."""
    peak_bytes: int
    live_by_component: dict[str, int]
    """Of tensors alone, at their own peak."""
    host_by_component: dict[str, int] = field(default_factory=dict)
    """cuda: what offload and cpu_checkpointing keep in host memory, at its highest."""

    @property
    def live_peak_bytes(self) -> int:
        return sum(self.live_by_component.values())


def memory(traced: Trace, ds: dict, world_size: int, dtype_bytes: int, accumulates: bool, device: str,
           later: tuple[float, float] = (1.0, 1.0), held_bytes: int | None = None) -> Memory:
    """later: how many tokens and label tokens the micro-batches after a step's first have, as shares of its. held_bytes: what
    the process holds already (cpu).
    """
    trainable = zero.elements(list(traced.trainable.values()))
    engine = zero.engine_memory(ds, world_size, traced.weights, trainable, dtype_bytes, accumulates, device)
    in_host = _in_host(traced, engine)
    if device == "cpu":
        engine = engine.in_one_memory()
    whole = zero.gathered(ds, world_size, traced.modules, traced.modules_in_backward, device)
    phases = _phases(traced, engine, whole, dtype_bytes, later)
    live_peak = max(phases.values(), key=Counter.total)
    if device == "cuda":
        return _on_cuda(live_peak, in_host)
    phases["save"] = Counter(engine.fixed) + Counter(engine.save)
    context_bytes = process.CPU_CONTEXT_BYTES if held_bytes is None else held_bytes
    slack_bytes = process.cpu_slack_bytes(heap.fragmentation_bytes(traced.segments), _gathered_in_heap(traced, whole, dtype_bytes))
    return _on_cpu(phases, engine, context_bytes, slack_bytes, live_peak)


def _phases(traced: Trace, engine: zero.EngineMemory, whole: zero.Gathered, dtype_bytes: int,
            later: tuple[float, float]) -> dict[str, Counter]:
    """Bytes by component at the peak of each part of a step; `later` are micro-batches that find gradients of those before."""
    later_tokens, later_labels = later
    fixed, between = Counter(engine.fixed) + Counter(weights=traced.buffers_bytes), Counter(engine.between)
    forward = Counter(activations=traced.kept_bytes, transient=traced.forward_peak_bytes - traced.kept_bytes,
                      gathered=whole.in_forward[-1] * dtype_bytes)
    transient = traced.backward_peak_bytes - traced.kept_at_backward_peak
    backward = Counter(activations=traced.kept_at_backward_peak, transient=transient, gathered=whole.at_start_of_backward * dtype_bytes)
    return {
        "forward": fixed + forward,
        "backward": fixed + Counter(engine.backward) + backward,
        # In forward it is the loss that holds much for a moment, by label tokens.
        "later forward": fixed + between + _scaled(forward, later_tokens, later_labels),
        "later backward": fixed + (between | Counter(engine.backward)) + _scaled(backward, later_tokens, later_tokens),
        "end of backward": fixed + Counter(engine.end_of_backward) + Counter(activations=traced.kept_by_a_layer, transient=transient),
        "update": fixed + Counter(engine.update),
        "fetch": fixed + between + _fetch(traced, whole.in_forward, dtype_bytes),
    }


def _gathered_in_heap(traced: Trace, whole: zero.Gathered, dtype_bytes: int) -> int:
    """Without the tensors that have pages of their own, such as a large vocabulary's."""
    sizes = {name: elements * dtype_bytes for module in traced.modules for name, elements in module}
    return max(0, whole.most * dtype_bytes - sum(size for size in sizes.values() if size > heap.LARGEST_THRESHOLD_BYTES))


def _fetch(traced: Trace, gathered: tuple[int, ...], dtype_bytes: int) -> Counter:
    """Within the layer of forward where what is gathered and what is kept of those before are most together."""
    moments = [Counter(activations=max(0, traced.kept_bytes * module // len(gathered) - traced.kept_by_a_layer),
                       gathered=elements * dtype_bytes) for module, elements in enumerate(gathered)]
    return max(moments, key=Counter.total) + Counter(transient=traced.within_a_layer)


def _scaled(parts: Counter, activations: float, transient: float) -> Counter:
    return Counter({**parts, "activations": int(activations * parts["activations"]), "transient": int(transient * parts["transient"])})


def _in_host(traced: Trace, engine: zero.EngineMemory) -> dict[str, int]:
    """Forward's inputs are there until backward, AdamW's temporaries after it."""
    host = engine.host or zero.HostMemory({}, {})
    highest = max(Counter(activations=traced.host_bytes), Counter(host.update), key=Counter.total) + Counter(host.fixed)
    return {component: highest[component] for component in COMPONENTS if highest[component]}


def _on_cuda(live: Counter, in_host: dict[str, int]) -> Memory:
    held = live + Counter(context=process.CUDA_CONTEXT_BYTES, slack=process.CUDA_SLACK_BYTES)
    return Memory(_ordered(held), held.total(), _ordered(live), in_host)


def _on_cpu(phases: dict[str, Counter], engine: zero.EngineMemory, context_bytes: int, slack_bytes: int, live_peak: Counter) -> Memory:
    """Pages that nobody writes to are not resident."""
    touched = (phase - Counter(buckets=min(engine.untouched_bytes, phase["buckets"])) for phase in phases.values())
    held = max(touched, key=Counter.total) + Counter(context=context_bytes, slack=slack_bytes)
    return Memory(_ordered(held), held.total(), _ordered(live_peak))


def _ordered(held: Counter) -> dict[str, int]:
    return {component: held[component] for component in COMPONENTS}


def trainable_elements(traced: Trace) -> int:
    return sum(zero.elements(list(traced.trainable.values())))
