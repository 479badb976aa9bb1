"""One forward and backward of the real model on fake tensors: shapes without data, no weights, no device.

Every tensor that a real run would hold is counted as it comes and goes; DeepSpeed's own are added by `bone_ds.plan.zero`. Of layers
that are alike three are run, and the others count as the second of them: the first has an input that needs no gradient.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from bone_ds import activation, inject
from bone_ds.activation_policy import ActivationPolicy
from bone_ds.arch import Architecture, Batch, Source
from bone_ds.config import RunConfig
from bone_ds.live import LiveMemory, Moment
from bone_ds.objective import Objective
from bone_ds.plan import blocks
from bone_ds.plan.blocks import Segment
from bone_ds.plan.flops import FlopCounter
from bone_ds.resolution import DTYPES

KINDS = ("attention", "mlp", "norms", "embedding", "loss", "other")
CUDA_GRANULARITY_BYTES = 512
_FIXED, _TRANSIENT = "fixed", "transient"
_RUN_OF_EACH = 3


@dataclass(frozen=True)
class Shape:
    """What of a batch its memory depends on."""

    document_lengths: tuple[int, ...]
    label_tokens: int
    continues: bool = False
    """In chunks: goes on from a state, and leaves one."""

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)


@dataclass(frozen=True)
class Trace:
    """Bytes beside the parameters on one rank, and FLOPs, of one micro-batch. Gradients of parameters are left out."""

    modules: tuple[tuple[tuple[str, int], ...], ...]
    """About in the order of forward: (name, elements) of the parameters that each module owns itself."""
    modules_in_backward: tuple[tuple[tuple[str, int], ...], ...]
    """The same in the order of backward; those within a recomputed module run forward once more before."""
    weights: tuple[int, ...]
    """Elements of each frozen tensor."""
    trainable: dict[str, tuple[int, ...]]
    """Adapter name -> shape."""
    parameters: int
    """Of the base model."""
    buffers_bytes: int
    kept_by_kind: dict[str, int]
    """What is alive at the end of forward, by `KINDS`."""
    kept_by_a_layer: int
    """The most that one residual block keeps."""
    host_bytes: int
    """What cpu_checkpointing keeps in host memory; 0 on a CPU, where that is the same memory."""
    forward_peak_bytes: int
    within_a_layer: int
    """The most that forward through one residual block adds to what it has begun with."""
    backward_peak_bytes: int
    kept_at_backward_peak: int
    """Of backward_peak_bytes, what forward has kept; the rest is transient."""
    flops: dict[str, int]
    """forward, backward, recomputed"""
    segments: tuple[Segment, ...]
    """The blocks that come and go, in order."""

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept_by_kind.values())


def trace(config: RunConfig, architecture: Architecture, source: Source, policy: ActivationPolicy, shape: Shape, device: str,
          make_objective: Callable[..., Objective] = Objective) -> Trace:
    """device: "cuda" keeps what a GPU's kernels would. Raises BoneError for an adapter or policy that doesn't fit the model."""
    with torch.device("meta"):  # peft moves its tensors about, which fake ones don't allow
        model = architecture.build(source, DTYPES[config.model.dtype])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trainable = inject.inject(model, architecture, config.adapter)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        fake = _make_fake(model)
        trainable = {name: fake[id(parameter)] for name, parameter in trainable.items()}
        architecture.keep_as_on(model, device)
        host = _Host()
        to_host = device == "cuda" and policy.cpu_checkpointing
        activation.apply(model, architecture, replace(policy, cpu_checkpointing=False))
        if to_host:
            host.take_inputs(model)
        objective = make_objective(model, architecture, config.train.loss_chunk, config.train.l2wrap)
        facts = {
            **_modules(objective), "parameters": parameters,
            "weights": tuple(parameter.numel() for parameter in objective.parameters() if not parameter.requires_grad),
            "trainable": {name: tuple(parameter.shape) for name, parameter in trainable.items()},
            "buffers_bytes": sum(buffer.nbytes for buffer in objective.buffers()),
        }
        layout = blocks.layout([_form(layer) for _, layer in architecture.layers(model)], _RUN_OF_EACH)
        left_out = _leave_out(model, architecture)
        return Trace(**facts, **_Run(objective, architecture, device, left_out, layout, host).measure(shape))


def _make_fake(model: nn.Module) -> dict[int, nn.Parameter]:
    """Replaces meta tensors by fake ones on a CPU, by the id of what was there."""
    fake: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in fake:
                fake[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            setattr(module, name, fake[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return fake


def _modules(objective: Objective) -> dict[str, tuple]:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    recomputed = [name for name, module in objective.named_modules() if "forward" in vars(module)]
    owned = [(next((outer for outer in recomputed if name.startswith(f"{outer}.")), None),
              tuple((names[id(parameter)], parameter.numel()) for parameter in module.parameters(recurse=False)))
             for name, module in objective.named_modules() if not _stands_aside(module, objective)]
    owned = [(outer, own) for outer, own in owned if own]
    backward: list[Iterable] = []
    for outer, group in itertools.groupby(reversed(owned), key=lambda pair: pair[0]):
        last_to_first = [own for _, own in group]
        backward += [reversed(last_to_first), last_to_first] if outer else [last_to_first]
    return {"modules": tuple(own for _, own in owned), "modules_in_backward": tuple(itertools.chain(*backward))}


def _stands_aside(module: nn.Module, objective: Objective) -> bool:
    """The model's own head: the objective's takes its weight and runs in its place."""
    return isinstance(module, nn.Linear) and module.weight is objective.head.weight


def _leave_out(model: nn.Module, architecture: Architecture) -> Counter[Hashable]:
    """Takes layers out of the model that are like three others; returns how many, by `_form`."""
    layers = architecture.layers(model)
    container = model.get_submodule(layers[0][0].rpartition(".")[0])
    seen: Counter[Hashable] = Counter(_form(layer) for _, layer in layers)
    left_out: Counter[Hashable] = Counter({form: count - _RUN_OF_EACH for form, count in seen.items() if count > _RUN_OF_EACH})
    todo = Counter(left_out)
    for index in reversed(range(len(container))):
        form = _form(container[index])
        if todo[form]:
            todo[form] -= 1
            del container[index]
    return left_out


def _form(layer: nn.Module) -> Hashable:
    """Layers of one form keep and compute alike: types and shapes, what is trained, what is recomputed."""
    return tuple(
        (name, type(module).__name__, "forward" in vars(module),
         tuple((tuple(parameter.shape), parameter.requires_grad) for parameter in module.parameters(recurse=False)))
        for name, module in layer.named_modules())


class _Host:
    """Host memory beside a device's: fake tensors are all on a CPU, where a copy to the host would be the tensor itself."""

    def __init__(self):
        self.bytes = 0

    def take_inputs(self, model: nn.Module) -> None:
        """Of the outermost modules that are recomputed."""
        taken: list[str] = []
        for name, module in model.named_modules():
            if "forward" in vars(module) and not any(name.startswith(f"{outer}.") for outer in taken):
                taken.append(name)
                module.forward = partial(self._with_inputs_here, module.forward)

    def _with_inputs_here(self, forward: Callable, *args, **kwargs):
        with saved_tensors_hooks(self._take, _give_back):
            return forward(*args, **kwargs)

    def _take(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype


def _give_back(taken: tuple[torch.Size, torch.dtype]) -> Tensor:
    shape, dtype = taken
    return torch.empty(shape, dtype=dtype)


class _Run:
    """Runs an objective and keeps account."""

    def __init__(self, objective: Objective, architecture: Architecture, device: str, left_out: Counter[Hashable],
                 layout: list[int], host: _Host):
        self.objective, self.left_out, self.layout, self.host = objective, left_out, layout, host
        self.live = LiveMemory(CUDA_GRANULARITY_BYTES if device == "cuda" else 1)
        self.live.claim(_FIXED, [*objective.parameters(), *objective.buffers()])
        self.counter = FlopCounter()
        self.in_forward = True
        self.forward_peak_bytes = self.within_a_layer = self.begun_with_bytes = 0
        self.kept_of: dict[Hashable, Counter[str]] = {}
        self.host_bytes_of: dict[Hashable, int] = {}
        self.flops_of: dict[Hashable, Counter[str]] = {}
        self.form_of = {id(layer): _form(layer) for _, layer in architecture.layers(objective.model)}
        self.place_of = {id(layer): place for place, (_, layer) in enumerate(architecture.layers(objective.model))}
        self.marks: list[blocks.Mark] = []
        """Of `blocks.segments`."""
        self.moments: list[Moment] = []
        self.begun: tuple[Counter[str], Hashable, int] | None = None
        self.open: Hashable | None = None
        for _, layer in architecture.layers(objective.model):
            # Outermost: what runs when the layer is called for the first time, recomputed or not.
            layer.register_forward_pre_hook(self._layer_begins)
            layer.register_forward_hook(self._layer_ends)
        for module, kind in _kinds(objective, architecture):
            module.forward = partial(self._as_kind, kind, module.forward)
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def measure(self, shape: Shape) -> dict:
        state = self._state(shape)
        with _collector_at_rest(), self.live, self.counter, self.live.history() as self.moments:
            fixed = self.live.total_bytes
            self.live.reset_peak()
            with self.live.component("other"):
                loss, after = self.objective(_batch(shape), state, keep_state=shape.continues)
            self._end_of_part()
            kept = {kind: self.live.by_component[kind] for kind in KINDS}
            self.in_forward, self.counter.part = False, "backward"
            with self.live.component(_TRANSIENT):
                loss.backward()
            self._leave()
        more = sum((_times(self.kept_of[form], count) for form, count in self.left_out.items()), Counter())
        flops = sum((_times(self.flops_of[form], count) for form, count in self.left_out.items()), Counter(self.counter.by_part))
        return {
            "kept_by_kind": {kind: kept[kind] + more[kind] for kind in KINDS},
            "kept_by_a_layer": max((kept.total() for kept in self.kept_of.values()), default=sum(kept.values())),
            "host_bytes": self.host.bytes + sum(self.host_bytes_of[form] * count for form, count in self.left_out.items()),
            "forward_peak_bytes": self.forward_peak_bytes - fixed + more.total(),
            "within_a_layer": self.within_a_layer,
            # Backward begins with all that is kept, and what it needs to go through one layer.
            "backward_peak_bytes": self.live.peak_bytes - fixed + more.total(),
            "kept_at_backward_peak": sum(self.live.at_peak.get(kind, 0) for kind in KINDS) + more.total(),
            "flops": {part: flops[part] for part in ("forward", "backward", "recomputed")},
            "segments": tuple(blocks.whole(blocks.segments(self.moments, fixed, self.marks), self.layout)),
        }

    def _state(self, shape: Shape):
        """What the chunk before left behind."""
        if not shape.continues:
            return None
        with torch.no_grad():
            state = self.objective(_batch(Shape((1,), 0)), None, keep_state=True)[1]
        self.kept_of, self.flops_of, self.begun, self.forward_peak_bytes, self.marks = {}, {}, None, 0, []
        return state

    def _end_of_part(self) -> int:
        """Of forward; its peak, in bytes."""
        peak_bytes = self.live.peak_bytes
        self.forward_peak_bytes = max(self.forward_peak_bytes, peak_bytes)
        self.live.reset_peak()
        return peak_bytes

    def _layer_begins(self, layer: nn.Module, arguments) -> None:
        """From one layer's beginning to the next one's: what lives only until then is no part of what a layer keeps."""
        if not self.in_forward:
            return
        self._mark(blocks.FORWARD, layer)
        self._end_of_part()
        self.begun_with_bytes = self.live.total_bytes
        now, form = Counter(self.live.by_component), self.form_of[id(layer)]
        if self.begun is not None:
            before, its_form, host_bytes = self.begun
            self.host_bytes_of[its_form] = self.host.bytes - host_bytes
            self.kept_of[its_form] = Counter({kind: now[kind] - before[kind] for kind in KINDS})
        self.begun, self.flops_before = (now, form, self.host.bytes), Counter(self.counter.by_part)

    def _layer_ends(self, layer: nn.Module, arguments, output) -> None:
        if not self.in_forward:
            return
        self._mark(blocks.LOSS, None)
        self.within_a_layer = max(self.within_a_layer, self._end_of_part() - self.begun_with_bytes)
        form = self.form_of[id(layer)]
        self.flops_of[form] = self.counter.by_part - self.flops_before
        out = output if isinstance(output, Tensor) else output[0]
        if out.requires_grad:
            out.register_hook(partial(self._backward_reaches, layer))

    def _backward_reaches(self, layer: nn.Module, gradient: Tensor) -> None:
        """Backward is about to enter this layer, and has left the one after it."""
        self._mark(blocks.BACKWARD, layer)
        self._leave()
        self.open, self.flops_before = self.form_of[id(layer)], Counter(self.counter.by_part)

    def _mark(self, part: str, layer: nn.Module | None) -> None:
        """What is between two layers belongs to the first; only after the last one something of its own begins."""
        if self.marks and self.marks[-1].part == blocks.LOSS and part == blocks.FORWARD:
            self.marks.pop()
        self.marks.append(blocks.Mark(len(self.moments), part, None if layer is None else self.place_of[id(layer)]))

    def _leave(self) -> None:
        if self.open is not None:
            self.flops_of[self.open] |= self.counter.by_part - self.flops_before
            self.open = None

    def _as_kind(self, kind: str, forward: Callable, *args, **kwargs):
        with self.live.component(kind if self.in_forward else _TRANSIENT):
            return forward(*args, **kwargs)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Tensors in cycles die when Python's collector comes by, at another moment in every run: here, after it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _times(counts: Counter, factor: int) -> Counter:
    return Counter({name: factor * count for name, count in counts.items()})


def _batch(shape: Shape) -> Batch:
    return Batch(
        tokens=torch.zeros(1, shape.tokens, dtype=torch.int64), document_lengths=shape.document_lengths,
        label_positions=torch.zeros(shape.label_tokens, dtype=torch.int64), labels=torch.zeros(shape.label_tokens, dtype=torch.int64),
        continues=shape.continues)


def _kinds(objective: Objective, architecture: Architecture) -> list[tuple[nn.Module, str]]:
    kinds: list[tuple[nn.Module, str]] = [(objective.head, "loss")]
    inside = set()
    for _, layer in architecture.layers(objective.model):
        inside |= {id(module) for module in layer.modules()}
        kinds += [(child, architecture.kinds.get(name, "norms")) for name, child in layer.named_children()]
    for module in objective.model.modules():
        if id(module) not in inside and isinstance(module, nn.Embedding):
            kinds.append((module, "embedding"))
        elif id(module) not in inside and "Norm" in type(module).__name__:
            kinds.append((module, "norms"))
    return kinds
