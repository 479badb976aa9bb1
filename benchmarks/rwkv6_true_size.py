"""One optimizer step of a true-size RWKV6-1.6B on this machine: time and high-water memory of Bone and LoRA.

Random bf16 weights of the official shapes (24 layers x 2048, 3.2 GB, written once), one sequence of 512 tokens a step, one
rank, through the installed command line. Every run is a process of its own, since the allocator gives nothing back; the methods
take turns, so that a slow minute of the machine meets them all. A step's time is the least of a method's steps but the first of
each process; memory is the process's resident set at its highest, loading included.

    python benchmarks/rwkv6_true_size.py --text FILE --work DIR [--quick] [--json FILE]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from provenance import provenance

from rwkv_adapters.model import Sizes, parameter_shapes

SIZES = Sizes(layers=24, width=2048, attention_width=2048, heads=32, ffn_width=7168, vocabulary=65536, mix_rank=32, decay_rank=64)
METHODS = {
    "bone row r=64": ("adapter.grouping=row", "adapter.rank=64"),
    "lora r=32": ("adapter.method=lora", "adapter.rank=32"),
    "bone col r=64": ("adapter.grouping=col", "adapter.rank=64"),
    "bone row r=64, layers recomputed": ("adapter.grouping=row", "adapter.rank=64", "train.activation_checkpointing=layer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 steps of the first two methods, once: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = _random_model(options.work)
    runs: dict[str, list[dict]] = {}
    for turn in range(1 if options.quick else 2):
        for name in list(METHODS)[:2] if options.quick else METHODS:
            runs.setdefault(name, []).append(_run(name, turn, model, options))
            rows = [_row(name, results) for name, results in runs.items()]
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"provenance": provenance("torch", "deepspeed", "peft"), "rows": rows}, indent=1) + "\n")
    _report([_row(name, results) for name, results in runs.items()])


def _random_model(work: Path) -> Path:
    """Small values, so that no hidden state overflows; what they are does not change the work."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "random-1b6.pth"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        tensors = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in parameter_shapes(SIZES).items()}
        torch.save(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path


def _run(name: str, turn: int, model: Path, options: argparse.Namespace) -> dict:
    directory = options.work / f"{name.replace(' ', '-').replace('=', '').replace(',', '')}-{turn}"
    shutil.rmtree(directory, ignore_errors=True)
    config = options.work / "config.yaml"
    config.write_text(json.dumps({
        "model": {"path": str(model)},
        "data": {"train": str(options.text), "prompt": "text", "overlong": "split", "max_length": 512, "packing": False},
        "train": {"steps": 2 if options.quick else 5, "global_batch_size": 1, "save_every": 0},
        "deepspeed": {"config": "zero2"},
        "output": {"directory": str(directory)},
    }))
    subprocess.run([sys.executable, "-m", "bone_ds", "train", str(config), "--ranks", "1", *METHODS[name]], check=True)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(directory)
    steps = [event for event in events if event["event"] == "step"]
    return {
        "trainable_parameters": next(event["trainable_parameters"] for event in events if event["event"] == "start"),
        "step_s": [event["step_s"] for event in steps], "tokens": [event["tokens"] for event in steps],
        "memory_gib": max(event["memory_gib"] for event in steps),
    }


def _row(name: str, results: list[dict]) -> dict:
    return {
        "name": name, "trainable_parameters": results[0]["trainable_parameters"],
        "step_s": [result["step_s"] for result in results],
        "best_step_s": min(seconds for result in results for seconds in result["step_s"][1:]),
        "tokens_a_step": results[0]["tokens"][0], "memory_gib": max(result["memory_gib"] for result in results),
    }


def _report(rows: list[dict]) -> None:
    lora = next(row for row in rows if row["name"].startswith("lora"))
    print(f"\n{'method':<36}{'s a step':>10}{'to LoRA':>9}{'GiB':>7}")
    for row in rows:
        ratio = row["best_step_s"] / lora["best_step_s"]
        print(f"{row['name']:<36}{row['best_step_s']:>10.2f}{ratio:>9.2f}{row['memory_gib']:>7.2f}")


if __name__ == "__main__":
    main()
