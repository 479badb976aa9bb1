"""The adapted layers of one model, forward and backward: Bone's strategies beside peft's LoRA, on a CPU, adapters in the base's dtype.

A turn takes the layers of one true-size block, each with a weight of its own, forward all and then backward all, by every method after
the other; times are those of a block times the number of blocks. Ratios are medians of the turns' ratios. The memory is that of one
block: live tensor storages beside weights and adapters, of a run on fake tensors. What is not equal to the reference in fp64 is not timed.

    python benchmarks/bone_operator.py [--model NAME ...] [--dtype D ...] [--tokens N ...] [--seconds S] [--turns N] [--threads N]
                                       [--quick] [--json FILE] [--fresh]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial

import rows
import torch
import torch.nn.functional as F
from peft import LoraConfig, MissConfig, inject_adapter_in_model
from rows import Row
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bone_ds.bone import BoneLinear, bone_linear
from bone_ds.live import LiveMemory

RANK = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    blocks: int
    layers: dict[str, tuple[str, int, int]]
    """Name -> (the input that it reads, out, in)."""
    lora_near: dict[str, int]
    """The LoRA rank of about the same number of parameters, by grouping; `paper` is the paper's."""

    @property
    def shapes(self) -> set[tuple[int, int]]:
        return {(out, in_) for _, out, in_ in self.layers.values()}


def _rwkv6(blocks: int, C: int, F: int) -> Model:
    """Every layer reads a mixture of its own."""
    square = {name: (name, C, C) for name in ("att_r", "att_k", "att_v", "att_g", "att_o", "ffn_r")}
    return Model(blocks, square | {"ffn_k": ("ffn_k", F, C), "ffn_v": ("ffn_v", C, F)}, dict.fromkeys(("paper", "row", "col", "left"), 32))


def _llama(blocks: int, C: int, F: int) -> Model:
    attention = {name: ("attention", C, C) for name in ("q", "k", "v")} | {"o": ("o", C, C)}
    mlp = {"gate": ("mlp", F, C), "up": ("mlp", F, C), "down": ("down", C, F)}
    return Model(blocks, attention | mlp, {"paper": 36, "row": 29, "col": 35, "left": 35})


MODELS = {"rwkv6-1.6b": _rwkv6(24, 2048, 7168), "rwkv6-3b": _rwkv6(32, 2560, 8960), "llama2-7b": _llama(32, 4096, 11008)}
BONE = {
    "row factored": ("row", "factored"), "left factored": ("left", "factored"), "col fused": ("col", "fused"),
    "col materialized": ("col", "materialized"), "row materialized": ("row", "materialized"),
    "row checkpointed": ("row", "checkpointed"), "col checkpointed": ("col", "checkpointed"),
}
PEFT_BAT = "peft bat"
TIMED_OFTEN = ("row factored", "left factored", "col fused", "col materialized")
"""With LoRA; the others bear no target, and are timed in one turn, without a spread."""
AT_MOST = {"row factored": 1.08, "left factored": 1.12, "col fused": {"bf16": 1.70, "fp32": 1.75}}
COL_TO_MATERIALIZED = 1.05


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    settings = {"threads": options.threads, "rank": RANK, "turns": options.turns, "seconds": options.seconds}
    results = rows.Results(options.json, settings, ("torch", "peft"), options.fresh, options.quick)
    found: list[Row] = []
    for name in options.model:
        for dtype in options.dtype:
            results.once(f"{name} {dtype} parity", partial(_parity, MODELS[name], DTYPES[dtype]))
            for tokens in options.tokens:
                case = f"{name} {dtype} {tokens}"
                measured = results.once(case, partial(_measure, MODELS[name], DTYPES[dtype], tokens, options.seconds, options.turns))
                found += _rows(case, MODELS[name], dtype, tokens, measured)
                results.write(found)
    results.finish(found)


# Parity


def _parity(model: Model, dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error of every method over the layers' shapes; ends the program where one is too large."""
    limits = {torch.bfloat16: {"contribution": 0.03, "gradients": 0.005}, torch.float32: {"values": 1e-5, "gradients": 1e-5}}[dtype]
    worst: dict[str, float] = {}
    for out, in_ in sorted(model.shapes):
        operands = _operands(out, in_, dtype)
        for grouping in ("row", "left", "col"):
            expected = _exactly(grouping, *operands)
            for name in [name for name, (its, _) in BONE.items() if its == grouping] + [PEFT_BAT] * (grouping == "col"):
                errors = _errors(name, expected, operands)
                for what, limit in limits.items():
                    if not errors[what] <= limit:
                        raise SystemExit(f"{name} is wrong at {out} x {in_} in {dtype}: {what}: {errors[what]:.1e}, at most {limit:g}")
                    worst[f"{name} {what}"] = max(worst.get(f"{name} {what}", 0.0), errors[what])
    return worst


def _operands(out: int, in_: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, W, B (with the matrices of the longer side) and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    W, B = random(out, in_) * in_**-0.5, 5e-3 * random(max(out, in_) // RANK, RANK, RANK)
    return tuple(tensor.to(dtype) for tensor in (random(64, in_), W, B, random(64, out)))


def _of_grouping(grouping: str, W: Tensor, B: Tensor) -> Tensor:
    return B[:W.shape[1 if grouping == "row" else 0] // RANK]


def _exactly(grouping: str, x: Tensor, W: Tensor, B: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """y(0), y(B), dx and dB in fp64."""
    x, W, B, gy = (tensor.double() for tensor in (x, W, _of_grouping(grouping, W, B), gy))
    x.requires_grad_(), B.requires_grad_()
    y = bone_linear(x, W, B, grouping)
    return F.linear(x, W).detach(), y.detach(), *torch.autograd.grad(y, (x, B), gy)


def _errors(name: str, expected: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> dict[str, float]:
    x, W, B, gy = operands
    layers = _adapted(name, {"layer": nn.Parameter(W, requires_grad=False)}, rank=0)
    (bone,) = layers.trainable
    bone.data.zero_()
    zero = layers.modules[0](x).detach()
    bone.data.copy_(_of_grouping(BONE.get(name, ("col",))[0], W, B))
    y = layers.modules[0](x.requires_grad_())
    gradients = torch.autograd.grad(y, (x, bone), gy)
    x.requires_grad_(False)
    y0, yB, *exact = expected
    relative = lambda found, wanted: ((found.double() - wanted).norm() / wanted.norm()).item()
    return {"contribution": relative(y.detach().double() - zero.double(), yB - y0), "values": relative(y.detach(), yB),
            "gradients": max(map(relative, gradients, exact))}


# The layers of a block


@dataclass
class Layers:
    """One method on the linear layers of a block, in their order."""

    modules: list[nn.Module]
    trainable: list[Tensor]


def _adapted(name: str, weights: dict[str, nn.Parameter], rank: int) -> Layers:
    """Adapters on linear layers that share these weights with other methods; rank is LoRA's."""
    linears = nn.ModuleDict({layer: _linear(weight) for layer, weight in weights.items()})
    if name in BONE:
        modules = [BoneLinear(linear, RANK, *BONE[name]) for linear in linears.values()]
        trainable = [module.bone for module in modules]
    else:
        targets = list(weights)
        config = (MissConfig(r=RANK, init_weights="bat", target_modules=targets) if name == PEFT_BAT else
                  LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        inject_adapter_in_model(config, linears)
        modules = list(linears.values())
        trainable = [parameter for key, parameter in linears.named_parameters() if "miss_block" in key or "lora_" in key]
        for parameter in trainable:
            parameter.data = parameter.data.to(next(iter(weights.values())).dtype)
    with torch.no_grad():
        for parameter in trainable:
            parameter.normal_(std=5e-3)
    return Layers(modules, trainable)


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _weights(model: Model, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter((torch.randn(out, in_) * in_**-0.5).to(dtype), requires_grad=False)
            for name, (_, out, in_) in model.layers.items()}


def _streams(model: Model, dtype: torch.dtype, tokens: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The inputs of a block by their name, and the gradients of its layers' outputs."""
    inputs = {source: torch.randn(1, tokens, in_).to(dtype).requires_grad_() for source, _, in_ in model.layers.values()}
    return inputs, [torch.randn(1, tokens, out).to(dtype) for _, out, _ in model.layers.values()]


# Measurements


def _measure(model: Model, dtype: torch.dtype, tokens: int, seconds: float, turns: int) -> dict:
    """Of a block: its seconds in every turn, and its bytes."""
    weights = _weights(model, dtype)
    layers = {name: _adapted(name, weights, rank) for name, rank in _methods(model).items()}
    taken = _seconds(layers, model, dtype, tokens, seconds, turns)
    memory = {name: _memory(adapted, model, dtype, tokens) for name, adapted in layers.items()}
    return {"seconds": taken, "saved_bytes": {name: saved for name, (saved, _) in memory.items()},
            "peak_bytes": {name: peak for name, (_, peak) in memory.items()}}


def _methods(model: Model) -> dict[str, int]:
    """LoRA's rank by method; Bone's methods have none."""
    loras = {_lora(rank): rank for rank in sorted(set(model.lora_near.values()), reverse=True)}
    return loras | dict.fromkeys(TIMED_OFTEN, 0) | dict.fromkeys([*BONE, PEFT_BAT], 0)


def _lora(rank: int) -> str:
    return f"peft lora r={rank}"


def _memory(layers: Layers, model: Model, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes that live for backward after forward, without the outputs, and the most at any time, with inputs and outputs.

    The layers can't compute afterwards: their parameters are fake then.
    """
    fake = FakeTensorMode()
    for module in nn.ModuleList(layers.modules).modules():
        module._parameters |= {name: fake.from_tensor(parameter) for name, parameter in module.named_parameters(recurse=False)}
    layers.trainable = [fake.from_tensor(parameter) for parameter in layers.trainable]
    with fake:
        sources, gradients = _streams(model, dtype, tokens)
    with fake, LiveMemory() as live:
        live.claim("given", [*nn.ModuleList(layers.modules).parameters(), *sources.values(), *gradients])
        given_bytes = live.total_bytes
        # Copies, as activations that are dropped wherever a layer doesn't keep them.
        inputs = {name: source.clone() for name, source in sources.items()}
        outputs = [module(inputs[source]) for module, (source, _, _) in zip(layers.modules, model.layers.values())]
        del inputs
        saved_bytes = live.total_bytes - sum(y.untyped_storage().nbytes() for y in outputs)
        torch.autograd.grad(outputs, [*sources.values(), *layers.trainable], gradients)
    return saved_bytes - given_bytes, live.peak_bytes - given_bytes


def _seconds(methods: dict[str, Layers], model: Model, dtype: torch.dtype, tokens: int, seconds: float, turns: int) -> dict[str, list]:
    """Three turns after one to warm up, then as many as fit into `seconds`, but at most `turns`; None where a method was left out.

    The methods without a target are left out from the second turn on.
    """
    inputs, gradients = _streams(model, dtype, tokens)
    taken: dict[str, list] = {name: [] for name in methods}
    begins: list[float] = []
    for turn in range(turns + 1):
        begins.append(time.monotonic())
        if turn > 3 and begins[-1] - begins[4] + begins[-1] - begins[-2] > seconds:
            break
        for name, layers in methods.items():
            often = name in TIMED_OFTEN or name.startswith("peft lora")
            took = _one_step(layers, model, inputs, gradients) if often or turn <= 1 else None
            if turn:
                taken[name].append(took)
    return taken


def _one_step(layers: Layers, model: Model, inputs: dict[str, Tensor], gradients: list[Tensor]) -> float:
    gc.collect()
    begin = time.perf_counter()
    outputs = [module(inputs[source]) for module, (source, _, _) in zip(layers.modules, model.layers.values())]
    torch.autograd.grad(outputs, [*inputs.values(), *layers.trainable], gradients)
    return time.perf_counter() - begin


# Rows


def _rows(case: str, model: Model, dtype: str, tokens: int, measured: dict) -> list[Row]:
    seconds, saved, peak = measured["seconds"], measured["saved_bytes"], measured["peak_bytes"]
    found = []
    for name in seconds:
        taken = [model.blocks * value for value in seconds[name] if value is not None]
        spread = (min(taken), max(taken)) if len(taken) > 1 else None
        found.append(Row(f"{case}: {name}", statistics.median(taken), f"s, {model.blocks} blocks", spread=spread))
        found.append(Row(f"{case}: {name}, saved", saved[name] / 2**20, "MiB a block", **_saved_target(name, model, saved)))
        found.append(Row(f"{case}: {name}, peak", peak[name] / 2**20, "MiB a block"))
    for name in [*BONE, PEFT_BAT]:
        near = _lora(model.lora_near[BONE.get(name, ("col",))[0]])
        for lora in dict.fromkeys((near, _lora(model.lora_near["paper"]))):
            at_most = AT_MOST.get(name)
            target = {"at_most": at_most[dtype] if isinstance(at_most, dict) else at_most} if at_most and lora == near else {}
            found.append(_ratio(case, name, lora, seconds, **target))
            if name == "col fused":
                least = _least_of_col(model, tokens, lora)
                found.append(Row(f"{case}: col fused, time at equal speed of all products", least, "ratio", lora))
    found.append(_ratio(case, "col fused", "col materialized", seconds, at_most=COL_TO_MATERIALIZED))
    return found


def _least_of_col(model: Model, tokens: int, lora: str) -> float:
    """Multiply-adds of col's products to those of LoRA's, forward and backward; see bone_ds/bone/README.md."""
    rank = _methods(model)[lora]
    col = sum(3 * tokens * out * in_ + 3 * out * in_ * RANK for _, out, in_ in model.layers.values())
    return col / sum(2 * tokens * out * in_ + 3 * tokens * rank * (in_ + out) for _, out, in_ in model.layers.values())


def _saved_target(name: str, model: Model, saved: dict[str, int]) -> dict:
    if name not in ("row factored", "col fused"):
        return {}
    lora = _lora(model.lora_near[BONE[name][0]])
    return {"compared_with": lora, "at_most": saved[lora] / 2**20}


def _ratio(case: str, name: str, other: str, seconds: dict[str, list], **target: float) -> Row:
    pairs = [(ours, theirs) for ours, theirs in zip(seconds[name], seconds[other]) if ours is not None]
    row = rows.ratio(f"{case}: {name}, time", *zip(*pairs), compared_with=other, **target)
    return row if len(pairs) > 1 else replace(row, spread=None)


def _options() -> argparse.Namespace:
    parser = rows.parser(__doc__, quick="RWKV6-1.6B in bf16 with 512 tokens, two turns: shows that it runs")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--seconds", type=float, default=45, help="for turns after the third, for each model, dtype and number of tokens")
    parser.add_argument("--turns", type=int, default=15, help="at most, for each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.model, options.dtype, options.tokens, options.turns = ["rwkv6-1.6b"], ["bf16"], [512], 2
    return options


if __name__ == "__main__":
    main()
