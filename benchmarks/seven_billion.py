"""Models of 7 billion parameters at true size on this machine: two training steps each, high-water memory beside the plan.

LLaMA2-7B and RWKV6-7B with random bf16 weights, Bone row r=64, every layer recomputed, one sequence of 512 tokens a step, ZeRO-2 on one
rank, through the installed command line. One model at a time is on the disk; its file is deleted after it. High-water memory is the
process's resident set, loading included.

    python benchmarks/seven_billion.py --text FILE --work DIR [--models llama rwkv6] [--tokens N] [--keep] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from random_models import write_llama, write_rwkv6
from rows import Results, Row, parser
from training_run import train

GIB = 1024**3
STEPS = 2
NEEDED_DISK_GIB, NEEDED_MEMORY_GIB = 17, 18  # 15.3 GB of weights; 14.2 GiB of them in memory beside adapter, gradient and optimizer
MODELS = {"llama": "LLaMA2-7B", "rwkv6": "RWKV6-7B"}


def main() -> None:
    options = _options()
    size = "tiny" if options.quick else "7b"
    settings = {"size": size, "tokens": options.tokens, "steps": STEPS}
    results = Results(options.json, settings, ("torch", "deepspeed", "transformers"), options.fresh, options.quick)
    for name in options.models:
        results.once(name, partial(_measure, name, size, options))
        results.write(_rows(results))
    results.finish(_rows(results))


def _measure(name: str, size: str, options: argparse.Namespace) -> dict:
    _check_room(options)
    model = write_llama(size, options.work, options.text) if name == "llama" else write_rwkv6(size, options.work)
    config = {
        "model": {"path": str(model)},
        "adapter": {"grouping": "row", "rank": 64},
        "data": {"train": str(options.text), "prompt": "text", "max_length": options.tokens, "packing": False},
        "train": {"steps": STEPS, "global_batch_size": 1, "save_every": 0, "activation_checkpointing": "layer"},
        "deepspeed": {"config": "zero2"},
    }
    try:
        planned_gib = _planned_gib(config, options.work)
        run = train(config, options.work / "run", may_be_killed=True)
    finally:
        shutil.rmtree(options.work / "run", ignore_errors=True)
        if not options.keep:
            shutil.rmtree(model) if model.is_dir() else model.unlink()
    if run.killed:
        return {"killed": True, "planned_gib": planned_gib}
    return {
        "trainable_parameters": run.start["trainable_parameters"], "tokens": [step["tokens"] for step in run.steps],
        "loss": [step["loss"] for step in run.steps], "step_s": [step["step_s"] for step in run.steps],
        "memory_gib": max(step["memory_gib"] for step in run.steps), "planned_gib": planned_gib}


def _planned_gib(config: dict, work: Path) -> float:
    """The resident set that `bone-ds plan` foresees."""
    path = work / "plan.yaml"
    path.write_text(json.dumps(config | {"output": {"directory": str(work / "planned")}}))
    command = [sys.executable, "-m", "bone_ds", "plan", str(path), "--ranks", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["peak_bytes"] / GIB


def _check_room(options: argparse.Namespace) -> None:
    """Raises SystemExit where a model would not fit, before it is written."""
    if options.quick:
        return
    options.work.mkdir(parents=True, exist_ok=True)
    disk_gib = shutil.disk_usage(options.work).free / GIB
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory_gib = int(meminfo["MemAvailable"].split()[0]) * 1024 / GIB
    if disk_gib < NEEDED_DISK_GIB or memory_gib < NEEDED_MEMORY_GIB:
        raise SystemExit(f"{disk_gib:.0f} GiB of disk in {options.work} and {memory_gib:.0f} GiB of memory are free; a model needs "
                         f"{NEEDED_DISK_GIB} and {NEEDED_MEMORY_GIB}")


def _rows(results: Results) -> list[Row]:
    rows = []
    for name, run in results.measured.items():
        model = f"tiny {name}" if results.quick else MODELS[name]
        rows.append(Row(f"{model}: memory planned", run["planned_gib"], "GiB"))
        if run.get("killed"):
            rows.append(Row(f"{model}: steps before the system ended it for want of memory", 0, "steps", at_least=STEPS))
            continue
        memory_gib = run["memory_gib"]
        rows += [Row(f"{model}: high-water memory", memory_gib, "GiB"),
                 Row(f"{model}: high-water memory ratio", memory_gib / run["planned_gib"], "ratio", "plan", at_least=0.9, at_most=1.1),
                 Row(f"{model}: steps", len(run["step_s"]), "steps", at_least=STEPS),
                 Row(f"{model}: trainable parameters", run["trainable_parameters"], "parameters"),
                 Row(f"{model}: throughput of the last step", run["tokens"][-1] / run["step_s"][-1], "tokens/s")]
    return rows


def _options() -> argparse.Namespace:
    options = parser(__doc__, "tiny models in the same way: shows that it runs")
    options.add_argument("--text", type=Path, required=True, help="tokens to train on, and the words of the Llama's tokenizer")
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--keep", action="store_true", help="do not delete the models' files")
    return options.parse_args()


if __name__ == "__main__":
    main()
