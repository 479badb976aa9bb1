"""Bone beside LoRA on a real model and real data, each at its best of three learning rates.

SmolLM2-135M-Instruct, GSM8K's train split as query/response, bf16, ZeRO-2 on 2 ranks, through the installed command line.
Both methods have the same samples in the same order, the same number of steps and nearly equal budgets (Bone-row r=64:
9,584,640 parameters; LoRA r=32: 9,768,960). Every rate runs the full number of steps; the best is the lowest held-out
loss at the end. Times are not compared: the runs follow one another, and speed is a ratio taken side by side.

    python benchmarks/gsm8k_smollm2.py --model DIR --data DIR --work DIR [--quick] [--json FILE]

DIR of --data holds gsm8k_train.jsonl and gsm8k_test.jsonl. Finished runs in --work are kept, so it can be interrupted.
"""

import argparse
from pathlib import Path

from held_out import Comparison, Method

METHODS = (
    Method("bone row r=64", ("adapter.grouping=row", "adapter.rank=64"), (5e-5, 1e-4, 3e-4)),
    Method("lora r=32", ("adapter.method=lora", "adapter.rank=32"), (3e-4, 1e-3, 3e-3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 steps of one rate each: shows that it runs, compares nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    steps = 4 if options.quick else 150
    config = {
        "model": {"path": str(options.model)},
        "data": {"train": str(options.data / "gsm8k_train.jsonl"), "eval": str(options.data / "gsm8k_test.jsonl"),
                 "eval_samples": 8 if options.quick else 64, "max_length": 384, "fields": {"query": "question", "response": "answer"}},
        "train": {"steps": steps, "global_batch_size": 2, "warmup_steps": steps // 15, "eval_every": steps // 2, "save_every": 0},
    }
    Comparison(config, METHODS, ranks=2, work=options.work, json=options.json, fall=0.10, margin=0.03).run(1 if options.quick else 3)


if __name__ == "__main__":
    main()
