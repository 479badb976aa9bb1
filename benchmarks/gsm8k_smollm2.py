"""Bone beside LoRA on a real model and real data, each at its best of three learning rates.

SmolLM2-135M-Instruct, GSM8K's train split as query/response, bf16, ZeRO-2 on 2 ranks, through the installed command line.
Both methods have the same samples in the same order, the same number of steps and nearly equal budgets (Bone-row r=64:
9,584,640 parameters; LoRA r=32: 9,768,960). Every rate runs the full number of steps; the best is the lowest held-out
loss at the end. Times are not compared: the runs follow one another, and speed is a ratio taken side by side.

    python benchmarks/gsm8k_smollm2.py --model DIR --data DIR --work DIR [--quick] [--json FILE]

DIR of --data holds gsm8k_train.jsonl and gsm8k_test.jsonl. Finished runs in --work are kept, so it can be interrupted.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

METHODS = {
    "bone row r=64": (["adapter.grouping=row", "adapter.rank=64"], (5e-5, 1e-4, 3e-4)),
    "lora r=32": (["adapter.method=lora", "adapter.rank=32"], (3e-4, 1e-3, 3e-3)),
}
FALL, MARGIN = 0.10, 0.03


def main() -> None:
    options = _options()
    steps = 4 if options.quick else 150
    rows = []
    # Rates in the outer loop: a run that is cut short has still compared the methods.
    for index in range(1 if options.quick else 3):
        for name, (overrides, rates) in METHODS.items():
            rows.append(_row(name, rates[index], overrides, steps, options))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"provenance": _provenance(), "rows": rows}, indent=1) + "\n")
    if not options.quick:
        _report(rows)


def _row(name: str, rate: float, overrides: list[str], steps: int, options: argparse.Namespace) -> dict:
    directory = options.work / f"{name.replace(' ', '-').replace('=', '')}-{rate:g}-{steps}"
    if not _finished(directory):
        shutil.rmtree(directory, ignore_errors=True)
        config = options.work / "gsm8k.yaml"
        config.write_text(json.dumps({
            "model": {"path": str(options.model)},
            "data": {"train": str(options.data / "gsm8k_train.jsonl"), "eval": str(options.data / "gsm8k_test.jsonl"),
                     "eval_samples": 8 if options.quick else 64, "max_length": 384, "fields": {"query": "question", "response": "answer"}},
            "train": {"steps": steps, "global_batch_size": 2, "warmup_steps": steps // 15, "eval_every": steps // 2, "save_every": 0},
            "output": {"directory": "unset"},
        }))
        subprocess.run([sys.executable, "-m", "bone_ds", "train", str(config), "--ranks", "2", f"train.learning_rate={rate:g}",
                        f"output.directory={directory}", *overrides], check=True)
        (directory / "commit").write_text(_commit())
    events = _events(directory)
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    trained = [event for event in events if event["event"] == "step"]
    return {
        "name": name, "commit": (directory / "commit").read_text(), "learning_rate": rate, "steps": len(trained),
        "trainable_parameters": next(event["trainable_parameters"] for event in events if event["event"] == "start"),
        "held_out_loss": [round(loss, 4) for loss in losses],
        "train_loss_last_20": round(sum(event["loss"] for event in trained[-20:]) / len(trained[-20:]), 4),
        "memory_gib_rank0": max(event["memory_gib"] for event in trained),
    }


def _finished(directory: Path) -> bool:
    return (directory / "commit").exists()


def _events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def _report(rows: list[dict]) -> None:
    print(f"\n{'method':<16}{'rate':>8}{'before':>9}{'after':>9}{'GiB':>7}")
    for row in sorted(rows, key=lambda row: row["held_out_loss"][-1]):
        before, after = row["held_out_loss"][0], row["held_out_loss"][-1]
        print(f"{row['name']:<16}{row['learning_rate']:>8g}{before:>9.4f}{after:>9.4f}{row['memory_gib_rank0']:>7.2f}")
    bone, lora = (min((row for row in rows if row["name"] == name), key=lambda row: row["held_out_loss"][-1]) for name in METHODS)
    fall = bone["held_out_loss"][0] - bone["held_out_loss"][-1]
    excess = bone["held_out_loss"][-1] - lora["held_out_loss"][-1]
    print(f"Bone's held-out loss falls by {fall:.4f} nats (target at least {FALL}): {'met' if fall >= FALL else 'MISSED'}")
    print(f"Bone's best minus LoRA's best: {excess:+.4f} nats (target at most +{MARGIN}): {'met' if excess <= MARGIN else 'MISSED'}")


def _provenance() -> dict:
    return {
        "commit": _commit(), "python": platform.python_version(), "machine": platform.machine(),
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }


def _commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return described.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 steps of one rate each: shows that it runs, compares nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
