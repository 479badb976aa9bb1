"""The losses of a run that goes on with other ranks and at other ZeRO stages, laid over those of one that was left alone.

SmolLM2-135M-Instruct, GSM8K, Bone row, in fp32 and bf16. The run left alone has two ranks at ZeRO-2. The others are asked to stop
(SIGTERM) after a third and two thirds of their steps, as a scheduler does, and go on by --resume: on 2, 1 and 2 ranks at ZeRO-2, and on
2, 1 and 2 ranks at ZeRO-2, 3 and 0. Beside them one rank from first to last, left alone: what another order of sums makes by itself.

    python benchmarks/resume_curve.py --model DIR --data DIR --work DIR [--steps N] [--plot FILE] [--quick] [--json FILE]

DIR of --data holds gsm8k_train.jsonl and gsm8k_test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rows import Results, Row, parser
from training_run import Run, recorded, without_paths

from bone_ds.stopping import STOPPED


@dataclass(frozen=True)
class Leg:
    ranks: int
    stage: int


ALONE = "2 ranks, left alone"
RUNS = {
    ALONE: (Leg(2, 2),),
    "1 rank, left alone": (Leg(1, 2),),
    "2, 1 and 2 ranks": (Leg(2, 2), Leg(1, 2), Leg(2, 2)),
    "2, 1 and 2 ranks at ZeRO-2, 3 and 0": (Leg(2, 2), Leg(1, 3), Leg(2, 0))}
"""By name; each leg goes on from the one before."""
MOST_APART = {"bf16": None, "fp32": 1e-5}
"""Nats, between the losses of a step."""


def main() -> None:
    options = _options()
    names = list(RUNS)[::2] if options.quick else list(RUNS)
    dtypes = ("bf16",) if options.quick else tuple(MOST_APART)
    config = {
        "model": {"path": str(options.model)},
        "data": {"train": str(options.data / "gsm8k_train.jsonl"), "eval": str(options.data / "gsm8k_test.jsonl"), "eval_samples": 8,
                 "max_length": 256, "fields": {"query": "question", "response": "answer"}},
        "train": {"steps": options.steps, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-4,
                  "warmup_steps": options.steps // 6, "eval_every": options.steps, "save_every": 0},
    }
    settings = {"config": without_paths(config), "runs": names, "dtypes": dtypes}
    results = Results(options.json, settings, ("torch", "deepspeed", "transformers"), options.fresh, options.quick, timed=False)
    for dtype in dtypes:
        in_dtype = config | {"model": config["model"] | {"dtype": dtype}}
        for name in names:
            results.once(f"{dtype}: {name}", partial(_measure, in_dtype, RUNS[name], options.work))
    if options.plot:
        _plot(results, dtypes, names, options.plot)
    results.finish(_rows(results, dtypes, names))


def _measure(config: dict, legs: tuple[Leg, ...], work: Path) -> dict:
    directory, path = work / "run", work / "run.yaml"
    shutil.rmtree(directory, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config | {"output": {"directory": str(directory)}}))
    steps = config["train"]["steps"]
    for number, leg in enumerate(legs, start=1):
        _train(path, directory, leg, resumes=number > 1, until=steps * number // len(legs) if number < len(legs) else None)
    run = recorded(directory)
    shutil.rmtree(directory)
    last = {step["step"]: step for step in run.steps}
    if sorted(last) != list(range(1, steps + 1)):
        raise SystemExit(f"{path}: steps {sorted(last)} were done, not all of {steps}")
    return {"went_on_after": [event["step"] for event in run.events if event["event"] == "start"][1:],
            "held_out_loss": run.held_out_losses[-1],
            **{field: [last[step][field] for step in sorted(last)] for field in ("loss", "epoch", "tokens", "label_tokens")}}


def _train(path: Path, directory: Path, leg: Leg, resumes: bool, until: int | None) -> None:
    """To the end, or until it is asked to stop, in the step after the given one."""
    command = [sys.executable, "-m", "bone_ds", "train", str(path), "--ranks", str(leg.ranks), f"deepspeed.config=zero{leg.stage}",
               *["--resume"] * resumes]
    process = subprocess.Popen(command)
    while until is not None and process.poll() is None and _steps_done(recorded(directory)) < until:
        time.sleep(0.1)
    if until is not None:
        process.terminate()
    if (code := process.wait()) != (STOPPED if until is not None else 0):
        raise SystemExit(f"{' '.join(command)}: ended with exit code {code}")


def _steps_done(run: Run) -> int:
    return run.steps[-1]["step"] if run.steps else 0


def _rows(results: Results, dtypes: tuple[str, ...], names: list[str]) -> list[Row]:
    rows = []
    for dtype in dtypes:
        alone = results.measured[f"{dtype}: {ALONE}"]
        for name in (name for name in names if name != ALONE):
            run = results.measured[f"{dtype}: {name}"]
            apart = [abs(ours - theirs) for ours, theirs in zip(run["loss"], alone["loss"], strict=True)]
            others = sum(samples != expected for samples, expected in zip(_samples(run), _samples(alone), strict=True))
            bound = MOST_APART[dtype] if len(RUNS[name]) > 1 else None
            rows += [Row(f"{dtype}: {name}: losses of a step, furthest apart", max(apart), "nats", ALONE, at_most=bound),
                     Row(f"{dtype}: {name}: held-out loss, apart", abs(run["held_out_loss"] - alone["held_out_loss"]), "nats", ALONE),
                     Row(f"{dtype}: {name}: steps with other samples", others, "steps", ALONE, at_most=0)]
    return rows


def _samples(run: dict) -> list[tuple[int, int, int]]:
    """What tells the samples of each step."""
    return list(zip(run["epoch"], run["tokens"], run["label_tokens"], strict=True))


def _plot(results: Results, dtypes: tuple[str, ...], names: list[str], path: Path) -> None:
    """Above the losses, below how far each lies from the run left alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(dtypes), 6), layout="constrained")
    panels = figure.subplots(2, len(dtypes), sharex=True, squeeze=False)
    for column, dtype in enumerate(dtypes):
        alone = results.measured[f"{dtype}: {ALONE}"]["loss"]
        steps = range(1, len(alone) + 1)
        losses, apart = panels[:, column]
        for width, name in zip(range(2 * len(names), 0, -2), names):
            run = results.measured[f"{dtype}: {name}"]
            line, = losses.plot(steps, run["loss"], linewidth=width, label=name)
            for step in run["went_on_after"]:
                losses.axvline(step + 0.5, color=line.get_color(), linewidth=0.5)
            if name != ALONE:
                apart.plot(steps, [abs(ours - theirs) for ours, theirs in zip(run["loss"], alone)], color=line.get_color(), marker=".")
        losses.set(title=dtype, ylabel="loss, nats")
        losses.legend()
        apart.set(xlabel="step", ylabel=f"apart from {ALONE}, nats")
        apart.set_yscale("symlog", linthresh=1e-8)
        apart.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def _options() -> argparse.Namespace:
    options = parser(__doc__, "6 steps in bf16, of the run left alone and that on 2, 1 and 2 ranks: shows that it runs")
    options.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--steps", type=int, default=12, help="of each run")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves, as .png or .svg")
    given = options.parse_args()
    given.steps = 6 if given.quick else given.steps
    return given


if __name__ == "__main__":
    main()
