"""One step with every tensor storage counted: what lives when, and what for.

What lives before the step is told by who holds it; what the step makes, by the part of the step that makes it and by how long it
lives. A storage that forward makes is an activation if it outlives that forward, one that backward makes a gradient if it outlives
that backward; what ZeRO makes meanwhile is told by the code that asks for it.
"""

from __future__ import annotations

import gc
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bone_ds.engine import Engine
from bone_ds.live import OTHER, LiveMemory, Moment
from bone_ds.profile.clock import ClockedEngine, Span
from bone_ds.profile.measurement import COMPONENTS, Memory

_POINTS = 800
"""Of the time line that is kept."""
_CUDA_GRANULARITY_BYTES = 512
_ZERO = "zero"
_OURS = tuple(f"{Path(__file__).parents[2]}/{package}/" for package in ("bone_ds", "llama_adapters", "rwkv_adapters"))


def counted(step: Callable[[ClockedEngine], object], engine: Engine, device: torch.device) -> Memory:
    """The step's live bytes by component over time."""
    live = _ByMaker(_CUDA_GRANULARITY_BYTES if device.type == "cuda" else 1)
    clocked = ClockedEngine(engine, device)
    gc.collect()
    with live.history() as history:
        for component, tensors in _held(engine):
            live.claim(component, [tensor for tensor in tensors if not live.knows(tensor)])
        first = len(history)
        with live:
            step(clocked)
    return _memory(history, first, clocked.spans)


class _ByMaker(LiveMemory):
    """The component of what the step makes is the code that asks for it: ZeRO's, or any other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.component(_maker(sys._getframe(1))):
            return super().__torch_dispatch__(func, types, args, kwargs)


def _maker(frame: FrameType | None) -> str:
    """Of the nearest caller that tells. What autograd runs by itself stands right within its engine's call."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/runtime/zero/partition" in path:
            return "gathered"
        if "/deepspeed/runtime/zero/" in path or "/deepspeed/runtime/bf16_" in path:
            return _ZERO
        if path.endswith("/torch/autograd/graph.py") or path.startswith(_OURS) and path != __file__:
            return OTHER
        frame = frame.f_back
    return OTHER


def _held(engine: Engine) -> Iterator[tuple[str, list[Tensor]]]:
    """What lives between steps, by component; a tensor's first one counts."""
    model, optimizer = engine.deepspeed.module, engine.deepspeed.optimizer
    attributes = {name: _tensors_in(value) for name, value in vars(optimizer).items()}

    def of_attributes(*parts: str) -> list[Tensor]:
        return [tensor for name, tensors in attributes.items() if any(part in name for part in parts) for tensor in tensors]

    trainable = list(engine.trainable.values())
    known = {id(parameter) for parameter in trainable}
    yield "weights", [*_placed(parameter for parameter in model.parameters() if id(parameter) not in known), *model.buffers()]
    yield "adapter", [*_placed(trainable), *of_attributes("16")]
    yield "gradients", [parameter.grad for parameter in trainable if parameter.grad is not None] + of_attributes("grad")
    yield "buckets", of_attributes("ipg", "bucket")
    yield "optimizer", _tensors_in(dict(getattr(optimizer, "optimizer", optimizer).state)) + of_attributes("fp32")
    yield "transient", [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def _placed(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """The parameters, and what a rank holds of those that ZeRO-3 has partitioned."""
    for parameter in parameters:
        yield parameter
        if getattr(parameter, "ds_tensor", None) is not None:
            yield parameter.ds_tensor


def _tensors_in(value: object) -> list[Tensor]:
    """Also in DeepSpeed's own records, such as its buckets."""
    leaves = tree_leaves(value)
    inside = [leaf for record in leaves if type(record).__module__.startswith("deepspeed.runtime.zero") and hasattr(record, "__dict__")
              for leaf in tree_leaves(list(vars(record).values()))]
    return [leaf for leaf in leaves + inside if isinstance(leaf, Tensor)]


@dataclass
class _Life:
    size_bytes: int
    maker: str
    born_s: float
    dead_s: float = math.inf


def _memory(history: list[Moment], first: int, spans: list[Span]) -> Memory:
    """history[:first] is what lives before the step."""
    lives, by_moment = _lives(history)
    start_s = spans[0].start_s
    components = [_component(life, held=index < first, spans=spans) for index, life in enumerate(lives)]
    now = dict.fromkeys(COMPONENTS, 0)
    line = []
    for index, (moment, (life, sign)) in enumerate(zip(history, by_moment, strict=True)):
        now[components[life]] += sign * lives[life].size_bytes
        if index >= first - 1:
            line.append((max(0.0, moment.time_s - start_s), dict(now)))
    highest = max(line, key=lambda point: sum(point[1].values()))[1]
    kept = _thinned(line)
    return Memory(
        sum(highest.values()), highest, [time_s for time_s, _ in kept],
        {component: [by_component[component] for _, by_component in kept] for component in COMPONENTS},
        [(span.part, span.start_s - start_s, span.end_s - start_s) for span in spans])


def _lives(history: list[Moment]) -> tuple[list[_Life], list[tuple[int, int]]]:
    """Every storage, and at each moment which of them came (1) or went (-1)."""
    lives: list[_Life] = []
    by_moment, alive = [], {}
    for before, moment in pairwise([Moment(0.0, 0, {}), *history]):
        change = moment.total_bytes - before.total_bytes
        if moment.storage in alive:
            index, sign = alive.pop(moment.storage), -1
            lives[index].dead_s = moment.time_s
        else:
            index, sign = len(lives), 1
            alive[moment.storage] = index
            lives.append(_Life(change, _changed(before, moment), moment.time_s))
        by_moment.append((index, sign))
    return lives, by_moment


def _changed(before: Moment, moment: Moment) -> str:
    changed = [name for name, size in moment.by_component.items() if size != before.by_component.get(name, 0)]
    return changed[0] if changed else OTHER  # an empty storage


def _component(life: _Life, held: bool, spans: list[Span]) -> str:
    if held or life.maker == "gathered":
        return life.maker if life.maker in COMPONENTS else "transient"  # an empty storage has no maker
    index = bisect_right(spans, life.born_s, key=lambda span: span.start_s) - 1
    if index < 0 or life.born_s > spans[index].end_s:
        return "transient"
    outlives = life.dead_s > spans[index].end_s
    if spans[index].part == "backward":
        return "gradients" if outlives else "buckets" if life.maker == _ZERO else "transient"
    return {"forward": "activations", "optimizer": "optimizer"}[spans[index].part] if outlives else "transient"


def _thinned(line: list[tuple[float, dict[str, int]]]) -> list[tuple[float, dict[str, int]]]:
    """Of each stretch of time the highest point, so that no peak is lost, and the last one."""
    end_s = line[-1][0] or 1.0
    kept: dict[int, tuple[float, dict[str, int]]] = {}
    for time_s, by_component in line[:-1]:
        stretch = int(_POINTS * time_s / end_s)
        if stretch not in kept or sum(by_component.values()) > sum(kept[stretch][1].values()):
            kept[stretch] = time_s, by_component
    return [*kept.values(), line[-1]]
