"""One step under torch's profiler: the time by kind of work.

Modules are labelled while they run forward. An operation belongs to the nearest label around it, in backward to that of the
forward operation whose gradient it is: the profiler numbers both alike. Names tell WKV, attention and communication.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bone_ds.engine import Engine
from bone_ds.profile.clock import PREFIX, wait
from bone_ds.profile.measurement import Kinds

ADAPTED, WKV, ATTENTION, LOSS, OPTIMIZER, COMMUNICATION, OTHER = KINDS = (
    "adapted layers", "WKV", "attention", "head and loss", "optimizer", "communication", "other")
_STEP = PREFIX + "step"
_LABELS = {PREFIX + kind: kind for kind in (ADAPTED, LOSS, OPTIMIZER)}
_BY_NAME = (
    (re.compile("c10d::|gloo:|nccl:|record_param_comms"), COMMUNICATION),
    (re.compile(r"bone_ds::wkv6|ChunkRWKV6|\b_Chunked(Backward)?$"), WKV),
    (re.compile("scaled_dot_product|flash_attn|FlashAttn"), ATTENTION))
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"}


def profiled(step: Callable[[], object], engine: Engine, adapted: list[nn.Module], device: torch.device, trace: Path | None) -> Kinds:
    """The step by kind. adapted: the layers with an adapter. trace: where to write Chrome's trace, a .json.gz."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write its own progress to stderr
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with _labelled(adapted, ADAPTED), _labelled([engine.deepspeed.module.head], LOSS), profile(activities=activities) as profiler:
        with record_function(_STEP):
            step()
            wait(device)
    if trace:
        profiler.export_chrome_trace(str(trace))
    return _kinds(list(profiler.events()), device.type)


@contextmanager
def _labelled(modules: list[nn.Module], kind: str) -> Iterator[None]:
    ranges = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: ranges.append(record_function(PREFIX + kind).__enter__())))
        hooks.append(module.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kinds(events: list[FunctionEvent], device_type: str) -> Kinds:
    step = next(event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU)
    within = [event for event in events if event.device_type == DeviceType.CPU and _is_within(event, step)]
    # A GPU's backward has threads of its own, whose operations are told apart by the kernels they start.
    here = [event for event in within if not event.is_async and (device_type == "cuda" or event.thread == step.thread)]
    kinds = _Kinds(here)
    by_kind_us = dict.fromkeys(KINDS, 0.0)
    products_us = 0.0
    for event in here:
        cost_us = event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total
        by_kind_us[kinds.of(event)] += cost_us
        products_us += cost_us * (event.name in _PRODUCTS)
    if device_type == "cuda":
        by_kind_us[OTHER] += max(0.0, step.cpu_time_total - sum(by_kind_us.values()))  # the device is idle
    else:
        waiting_us = min(_waiting_us(within, here), by_kind_us[OTHER])
        by_kind_us[COMMUNICATION] += waiting_us
        by_kind_us[OTHER] -= waiting_us
    return Kinds(sum(by_kind_us.values()) / 1e6, {kind: cost_us / 1e6 for kind, cost_us in by_kind_us.items()}, products_us / 1e6)


class _Kinds:
    def __init__(self, events: list[FunctionEvent]):
        self._by_sequence: dict[int, str] = {}
        for event in events:
            if event.sequence_nr >= 0 and not event.fwd_thread:
                self._by_sequence[event.sequence_nr] = self._around(event)

    def of(self, event: FunctionEvent) -> str:
        found = self._around(event)
        return OTHER if found is None else found

    def _around(self, event: FunctionEvent | None) -> str | None:
        """Of the event or the nearest one around it that has a kind."""
        while event is not None:
            kind = self._own(event)
            if kind:
                return kind
            event = event.cpu_parent
        return None

    def _own(self, event: FunctionEvent) -> str | None:
        if event.name in _LABELS:
            return _LABELS[event.name]
        named = next((kind for names, kind in _BY_NAME if names.search(event.name)), None)
        # A node of backward is numbered as the operation of forward that it belongs to.
        return named or (self._by_sequence.get(event.sequence_nr) if event.fwd_thread else None)


def _is_within(event: FunctionEvent, step: FunctionEvent) -> bool:
    return event.time_range.start >= step.time_range.start and event.time_range.end <= step.time_range.end


def _waiting_us(events: list[FunctionEvent], here: list[FunctionEvent]) -> float:
    """How long other threads send something while this one runs no operation."""
    busy = [event for event in here if not event.name.startswith(PREFIX)]
    sending = [event for event in events if event.is_async and event.name.startswith("gloo:")]
    return _covered_us(busy + sending) - _covered_us(busy)


def _covered_us(events: list[FunctionEvent]) -> float:
    """Of the time line by at least one of them."""
    covered_us, until = 0.0, 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        covered_us += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered_us
