"""What the engine costs: a training step at ZeRO stages 0, 1 and 2 against a plain loop in torch, on one rank.

Model, loss, samples and optimizer (torch.optim.AdamW) are the same; in bf16 the plain loop keeps fp32 masters as DeepSpeed does. All four
train side by side in one process, a step each in turn, and the ratio is that of the steps of one turn. Before anything is timed, the
losses of the first steps have to agree. Where a stage is above the target, a profile says which operations it spends more on.

    python benchmarks/engine_cost.py --smollm2 DIR --data DIR [--threads N] [--turns N] [--quick] [--json FILE]

A step has 2 packs of 256 tokens: SmolLM2-135M on GSM8K's answers, in bf16 and fp32, Bone row r=64; the demonstration's RWKV6 of 1.7M
parameters on tinyshakespeare, in fp32, Bone row r=16.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rows import Results, Row, parser, ratio
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bone_ds import arch, ds_json
from bone_ds import demo as demonstration
from bone_ds import engine as engines
from bone_ds.arch import Batch
from bone_ds.config import RunConfig, validate
from bone_ds.data import GlobalOrder, collate, load_samples
from bone_ds.inject import inject
from bone_ds.launch import Ranks
from bone_ds.objective import Objective
from bone_ds.resolution import DTYPES
from bone_ds.step import optimizer_step
from bone_ds.train import build_engine

STAGES = ("zero0", "zero1", "zero2")
PLAIN = "plain torch"
MOST = 1.10
PARITY_STEPS = 3
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-4}
"""Largest relative difference in loss over the first steps."""
LEARNING_RATE = 1e-4


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    _be_one_rank()
    with engines.distributed(Ranks(0, 0, 1, 1)), tempfile.TemporaryDirectory() as work:
        cases = _cases(options, Path(work))
        settings = {"threads": options.threads, "turns": options.turns, "cases": list(cases)}
        results = Results(options.json, settings, ("torch", "deepspeed", "transformers"), options.fresh, options.quick)
        for name, config in cases.items():
            results.once(name, partial(_measure, config, options.turns))
            results.write(_rows(results))
        results.finish(_rows(results))
    _print_profiles(results)


def _cases(options: argparse.Namespace, work: Path) -> dict[str, RunConfig]:
    smollm2 = {"model": {"path": str(options.smollm2)}, "adapter": {"grouping": "row", "rank": 64},
               "data": {"train": str(options.data / "gsm8k_train.jsonl"), "prompt": "text", "fields": {"text": "answer"}}}
    rwkv6 = {"model": {"path": str(Path(demonstration.__file__).with_name("rwkv6-small.pth"))}, "adapter": {"grouping": "row", "rank": 16},
             "data": {"train": str(options.data / "tinyshakespeare.txt"), "prompt": "text"}}
    chosen = {"RWKV6-1.7M fp32": (rwkv6, "fp32")}
    if not options.quick:
        chosen |= {"SmolLM2-135M bf16": (smollm2, "bf16"), "SmolLM2-135M fp32": (smollm2, "fp32")}
    return {name: validate({
        "model": tree["model"] | {"dtype": dtype}, "adapter": tree["adapter"],
        "data": tree["data"] | {"max_length": 256, "packing": True},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": LEARNING_RATE, "schedule": "constant"},
        "output": {"directory": str(work)}}, name) for name, (tree, dtype) in chosen.items()}


def _measure(config: RunConfig, turns: int) -> dict:
    """Seconds of every turn's steps; every trainer runs the same steps, the first few of them untimed."""
    architecture = arch.resolve(config.model)
    source = architecture.open(config.model)
    samples = load_samples(config.data, architecture.tokenizer(source))
    order = GlobalOrder(samples, config.data.packing, config.data.max_length, config.train.global_batch_size, config.train.seed)
    trainers = {PLAIN: _Plain(config, architecture, source).step}
    for stage in STAGES:
        ds = ds_json.resolve(config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": stage})}), 1)
        trainers[stage] = _engine_step(build_engine(config, architecture, source, ds, torch.device("cpu")))
    window = lambda step: _window(samples, order, step)
    _check_parity(config.model.dtype, trainers, window)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    gc.disable()
    for turn in range(turns):
        batch, label_tokens = window(PARITY_STEPS + turn)
        names = list(trainers)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            gc.collect()
            started = time.perf_counter()
            trainers[name](batch, label_tokens)
            seconds[name].append(time.perf_counter() - started)
    gc.enable()
    above = [stage for stage in STAGES if statistics.median(map(_divide, seconds[stage], seconds[PLAIN])) > MOST]
    profiles = {stage: _difference(trainers[stage], trainers[PLAIN], *window(PARITY_STEPS)) for stage in above}
    return {"step_s": seconds, "profiles": profiles}


@dataclass
class _Plain:
    """What one would write without an engine."""

    config: RunConfig
    architecture: arch.Architecture
    source: arch.Source

    def __post_init__(self) -> None:
        train = self.config.train
        placement = engines.placement.choose({"zero_optimization": {"stage": 0}}, torch.device("cpu"))
        with placement.empty():
            model = self.architecture.build(self.source, DTYPES[self.config.model.dtype])
        self.architecture.load(model, self.source, placement)
        self.parameters = list(inject(model, self.architecture, self.config.adapter).values())
        self.objective = Objective(model, self.architecture, train.loss_chunk, train.l2wrap)
        self.low_precision = self.config.model.dtype == "bf16"
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.parameters] if self.low_precision else self.parameters
        self.optimizer = torch.optim.AdamW(self.masters, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.eps,
                                           weight_decay=train.weight_decay)

    def step(self, batch: Batch, label_tokens: int) -> float:
        loss, _ = self.objective(batch)
        (loss / label_tokens).backward()
        if self.low_precision:
            for master, parameter in zip(self.masters, self.parameters):
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.low_precision:
            with torch.no_grad():
                for master, parameter in zip(self.masters, self.parameters):
                    parameter.copy_(master)
        return float(loss.detach()) / label_tokens


def _engine_step(engine: engines.Engine) -> Callable[[Batch, int], float]:
    return lambda batch, label_tokens: optimizer_step(engine, [batch], label_tokens, LEARNING_RATE).loss


def _window(samples, order: GlobalOrder, step: int) -> tuple[Batch, int]:
    window = order.window(step)
    return collate(samples, window.units, "cpu"), window.label_tokens


def _check_parity(dtype: str, trainers: dict, window: Callable) -> None:
    for step in range(PARITY_STEPS):
        losses = {name: train(*window(step)) for name, train in trainers.items()}
        for name, loss in losses.items():
            if not abs(loss - losses[PLAIN]) <= TOLERANCE[dtype] * losses[PLAIN]:
                raise SystemExit(f"{name}: loss {loss} at step {step + 1}, {PLAIN} has {losses[PLAIN]}; it is not timed")


def _difference(ours: Callable, theirs: Callable, batch: Batch, label_tokens: int, repeats: int = 3, most: int = 10) -> list[dict]:
    """The operations that a step spends more on, in ms of their own time, most first; each the least of the repeats, taken in turns."""
    runs = [[_own_ms(step, batch, label_tokens) for step in (ours, theirs)] for _ in range(repeats)]
    own_ms = [{name: min(run.get(name, 0.0) for run in of_one) for name in of_one[0]} for of_one in zip(*runs)]
    extra = {name: own_ms[0].get(name, 0.0) - own_ms[1].get(name, 0.0) for name in own_ms[0]}
    return [{"operation": name, "more_ms": round(extra[name], 2), "ms": round(own_ms[0][name], 2)}
            for name in sorted(extra, key=extra.get, reverse=True)[:most]]


def _own_ms(step: Callable, batch: Batch, label_tokens: int) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(batch, label_tokens)
    return {event.key: event.self_cpu_time_total / 1e3 for event in profiled.key_averages()}


def _rows(results: Results) -> list[Row]:
    rows = []
    for name, measured in results.measured.items():
        seconds = measured["step_s"]
        rows += [Row(f"{name}, {PLAIN}: step", statistics.median(seconds[PLAIN]), "s", spread=(min(seconds[PLAIN]), max(seconds[PLAIN])))]
        rows += [ratio(f"{name}, {stage}: step", seconds[stage], seconds[PLAIN], PLAIN, at_most=MOST) for stage in STAGES]
    return rows


def _print_profiles(results: Results) -> None:
    for name, measured in results.measured.items():
        for stage, operations in measured["profiles"].items():
            print(f"\n{name}, {stage}: where a step spends more than {PLAIN}")
            for operation in operations:
                print(f"  {operation['more_ms']:>9.2f} ms more of {operation['ms']:>9.2f}  {operation['operation']}")


def _divide(one: float, other: float) -> float:
    return one / other


def _be_one_rank() -> None:
    """What a launcher would have said to torch."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _options() -> argparse.Namespace:
    options = parser(__doc__, "3 turns of the small RWKV6: shows that it runs")
    options.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M; --quick does without")
    options.add_argument("--data", type=Path, required=True, help="directory with gsm8k_train.jsonl and tinyshakespeare.txt")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--turns", type=int, default=12)
    given = options.parse_args()
    if given.smollm2 is None and not given.quick:
        options.error("--smollm2: is missing")
    given.turns = 3 if given.quick else given.turns
    return given


if __name__ == "__main__":
    main()
