"""Bone beside LoRA on a really trained RWKV6 of 3M parameters, at equal budgets, each at its best of four learning rates.

The model is one of rwkv.cpp's test models, trained on UTF-16LE bytes; the text is tinyshakespeare, its first nine tenths to
train on and 64 KiB of the last tenth held out. 60 steps of 4 pieces of 256 bytes, fp32, ZeRO-2 on 2 ranks, through the
installed command line. Bone-row r=16 and LoRA r=8 both train 258,048 parameters; state tuning, shown beside them, 12,288.
What is said of samples, rates and times in gsm8k_smollm2.py holds here too.

    python benchmarks/tinyshakespeare_rwkv6.py --model rwkv6-tiny-3m.pth --text tinyshakespeare.txt --work DIR [--quick] [--json FILE]
"""

import argparse
from pathlib import Path

from held_out import Comparison, Method

METHODS = (
    Method("bone row r=16", ("adapter.grouping=row", "adapter.rank=16"), (3e-4, 1e-3, 3e-3, 1e-2)),
    Method("lora r=8", ("adapter.method=lora", "adapter.rank=8"), (1e-3, 3e-3, 1e-2, 3e-2)),
    Method("state", ("adapter.method=state",), (3e-2, 1e-1, 3e-1, 1.0)))
HELD_OUT_CHARACTERS = 32 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 steps of one rate each: shows that it runs, compares nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, held_out = _split(options.text, options.work, 1024 if options.quick else HELD_OUT_CHARACTERS)
    steps = 4 if options.quick else 60
    config = {
        "model": {"path": str(options.model), "tokenizer": "utf-16le", "dtype": "fp32"},
        "data": {"train": str(train), "eval": str(held_out), "prompt": "text", "overlong": "split", "max_length": 256},
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": steps // 15, "eval_every": steps // 2,
                  "save_every": 0},
    }
    Comparison(config, METHODS, ranks=2, work=options.work, json=options.json, fall=0.2, margin=0.03).run(1 if options.quick else 4)


def _split(text: Path, work: Path, held_out_characters: int) -> tuple[Path, Path]:
    work.mkdir(parents=True, exist_ok=True)
    whole = text.read_text(encoding="utf-8")
    cut = len(whole) * 9 // 10
    train, held_out = work / "train.txt", work / "held_out.txt"
    train.write_text(whole[:cut], encoding="utf-8")
    held_out.write_text(whole[cut:cut + held_out_characters], encoding="utf-8")
    return train, held_out


if __name__ == "__main__":
    main()
