"""Bone's groupings and LoRA by held-out loss, each at its own best rate: left against col, row and LoRA.

Every method trains 40 steps at three rates on one seed; the best is the lowest loss on a validation split, and where that is the
highest or lowest rate tried, the next one is tried too, twice at most. At its best rate every method then trains 80 steps on two other
seeds, and is judged on a test split that no rate was chosen on. A seed is the order of the data and LoRA's first matrix: all methods have
the same samples in the same order. Budgets are as near as ranks allow and printed. Times are not compared, so that a study may go on
at another time or on another machine. A rate at which the loss is no longer finite counts as one of infinite loss.

    python benchmarks/groupings.py smollm2 --model DIR --data DIR --work DIR [--quick] [--json FILE]
    python benchmarks/groupings.py rwkv6 --model rwkv6-tiny-3m.pth --data DIR --work DIR [--quick] [--json FILE]

smollm2: SmolLM2-135M-Instruct on GSM8K (gsm8k_train.jsonl, gsm8k_test.jsonl), bf16. rwkv6: rwkv.cpp's test model of 3M parameters, which
reads UTF-16LE bytes, on tinyshakespeare.txt, fp32. Both through the installed command line, ZeRO-2, one rank.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from rows import Results, Row, parser
from training_run import train, without_paths

from bone_ds import arch
from bone_ds.config import ModelConfig

TUNING_SEED, SEEDS = 0, (1, 2)
MOST_EXTENSIONS = 2
MARGIN_NATS = 0.03


@dataclass(frozen=True)
class Method:
    name: str
    overrides: tuple[str, ...]
    first_rate: int
    """Lowest of the first three rates, as an index for `rate`."""


def rate(index: int) -> float:
    """..., 1e-4 (-8), 3e-4 (-7), 1e-3 (-6), ..."""
    return float(f"{(1, 3)[index % 2]}e{index // 2}")


@dataclass(frozen=True)
class Study:
    config: dict
    """A run's config without seed, steps, rate and held-out file."""
    methods: tuple[Method, ...]
    """The one that is judged first."""
    validation: Path
    test: Path


def main() -> None:
    options = _options()
    study = STUDIES[options.study](options)
    methods = study.methods[::3] if options.quick else study.methods
    steps = (2, 3) if options.quick else (40, 80)
    settings = {"study": options.study, "steps": steps, "config": _recorded(study.config), "seeds": [TUNING_SEED, *SEEDS]}
    results = Results(options.json, settings, ("torch", "deepspeed", "transformers", "peft"), options.fresh, options.quick, timed=False)
    best = {method: _best_rate(study, method, steps[0], options, results) for method in methods}
    for seed in SEEDS[:1] if options.quick else SEEDS:
        for method in methods:
            _loss(study, method, best[method], steps[1], seed, study.test, options, results)
            results.write(_rows(best, steps, results))
    results.finish(_rows(best, steps, results))


def _recorded(config: dict) -> dict:
    """The config with the model's fingerprint for its name, which may be another one elsewhere."""
    model = ModelConfig(**config["model"])
    return without_paths(config) | {"model": config["model"] | {"path": arch.resolve(model).open(model).fingerprint}}


def _best_rate(study: Study, method: Method, steps: int, options: argparse.Namespace, results: Results) -> int:
    """The rate's index; one at the edge of those tried only after the extensions are used up."""
    tried = range(method.first_rate, method.first_rate + (1 if options.quick else 3))
    for extension in itertools.count():
        losses = {index: _loss(study, method, index, steps, TUNING_SEED, study.validation, options, results) for index in tried}
        best = min(losses, key=losses.get)
        if options.quick or extension == MOST_EXTENSIONS or best not in (tried[0], tried[-1]):
            return best
        tried = range(tried.start - (best == tried[0]), tried.stop + (best == tried[-1]))


def _loss(study: Study, method: Method, index: int, steps: int, seed: int, held_out: Path, options: argparse.Namespace,
          results: Results) -> float:
    """Held-out loss after training, in nats a token."""
    name = _name(method, index, steps, seed)
    return _held_out_loss(results.once(name, lambda: _train(study, method, index, steps, seed, held_out, options.work / "run")))


def _held_out_loss(measured: dict) -> float:
    return math.inf if measured["held_out_loss"] is None else measured["held_out_loss"]


def _name(method: Method, index: int, steps: int, seed: int) -> str:
    return f"{method.name}, rate {rate(index):g}, {steps} steps, seed {seed}"


def _train(study: Study, method: Method, index: int, steps: int, seed: int, held_out: Path, directory: Path) -> dict:
    config = study.config | {
        "data": study.config["data"] | {"eval": str(held_out)},
        "train": study.config["train"] | {"steps": steps, "warmup_steps": steps // 15, "eval_every": steps, "seed": seed,
                                          "learning_rate": rate(index), "save_every": 0}}
    run = train(config, directory, method.overrides, may_diverge=True)
    shutil.rmtree(directory)
    measured = {"trainable_parameters": run.start["trainable_parameters"], "held_out_loss_before": run.held_out_losses[0]}
    if run.diverged or not math.isfinite(run.held_out_losses[-1]):
        return measured | {"held_out_loss": None, "diverged_at_step": len(run.steps)}
    return measured | {"held_out_loss": run.held_out_losses[-1],
                       "train_loss_last_20": statistics.mean(step["loss"] for step in run.steps[-20:])}


def _rows(best: dict[Method, int], steps: tuple[int, int], results: Results) -> list[Row]:
    """best: each method's rate, the method that is judged first."""
    rows, losses = [], {}
    for method, index in best.items():
        at_best = [results.measured.get(_name(method, index, steps[1], seed)) for seed in SEEDS]
        tuned = results.measured[_name(method, index, steps[0], TUNING_SEED)]
        losses[method.name] = [_held_out_loss(run) for run in at_best if run]
        rows += [Row(f"{method.name}: trainable parameters", tuned["trainable_parameters"], "parameters"),
                 Row(f"{method.name}: best rate{_at_the_edge(method, index, steps[0], results)}", rate(index), "learning rate"),
                 Row(f"{method.name}: validation loss, {steps[0]} steps", _held_out_loss(tuned), "nats a token"),
                 *_over_seeds(f"{method.name}: test loss, {steps[1]} steps", losses[method.name])]
    ours, *others = best
    for other in others:
        differences = [one - theirs for one, theirs in zip(losses[ours.name], losses[other.name])]
        rows += _over_seeds(f"{ours.name}: test loss less that of {other.name}", differences, other.name, at_most=MARGIN_NATS)
    return rows


def _at_the_edge(method: Method, index: int, steps: int, results: Results) -> str:
    neighbours = (_name(method, index + step, steps, TUNING_SEED) for step in (-1, 1))
    return "" if all(name in results.measured for name in neighbours) else ", at the edge of those tried"


def _over_seeds(name: str, values: list[float], compared_with: str | None = None, **target: float) -> list[Row]:
    if not values:
        return []
    return [Row(name, statistics.mean(values), "nats a token", compared_with, spread=(min(values), max(values)), **target)]


def _smollm2(options: argparse.Namespace) -> Study:
    """No padding and no packs: a step's 2 samples lie end to end."""
    samples = 4 if options.quick else 32
    rows = (options.data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    validation = _written(options.work / "validation.jsonl", "".join(rows[:samples]))
    test = _written(options.work / "test.jsonl", "".join(rows[samples:samples + 2 * samples]))
    config = {
        "model": {"path": str(options.model)},
        "data": {"train": str(options.data / "gsm8k_train.jsonl"), "max_length": 384, "packing": False,
                 "fields": {"query": "question", "response": "answer"}},
        "train": {"global_batch_size": 2, "micro_batch_size": 2},
    }
    return Study(config, _methods(64, 32, bone_rate=-8, lora_rate=-7), validation, test)


def _rwkv6(options: argparse.Namespace) -> Study:
    """Eight tenths of the text to train on; 32 KiB of each of the other two."""
    characters = 1024 if options.quick else 16 * 1024
    text = (options.data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tenth = len(text) // 10
    config = {
        "model": {"path": str(options.model), "tokenizer": "utf-16le", "dtype": "fp32"},
        "data": {"train": str(_written(options.work / "train.txt", text[:8 * tenth])), "prompt": "text", "max_length": 256},
        "train": {"global_batch_size": 4, "micro_batch_size": 4},
    }
    validation, test = (_written(options.work / f"{name}.txt", text[start:start + characters])
                        for name, start in (("validation", 8 * tenth), ("test", 9 * tenth)))
    return Study(config, _methods(16, 8, bone_rate=-7, lora_rate=-5), validation, test)


STUDIES = {"smollm2": _smollm2, "rwkv6": _rwkv6}


def _methods(block: int, lora_rank: int, bone_rate: int, lora_rate: int) -> tuple[Method, ...]:
    bone = [Method(f"{grouping} r={block}", (f"adapter.grouping={grouping}", f"adapter.rank={block}"), bone_rate)
            for grouping in ("left", "col", "row")]
    return (*bone, Method(f"lora r={lora_rank}", ("adapter.method=lora", f"adapter.rank={lora_rank}"), lora_rate))


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _options() -> argparse.Namespace:
    options = parser(__doc__, "2 and 3 steps of left and LoRA at one rate and seed: shows that it runs, compares nothing")
    options.add_argument("study", choices=STUDIES)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--work", type=Path, required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
