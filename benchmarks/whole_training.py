"""A whole training against what a user would pick otherwise: throughput and memory of six ways to fine-tune the same model.

SmolLM2-135M on GSM8K, bf16, the same samples in every step, the same batch of 8, rate and AdamW: (a) Hugging Face's Trainer with peft's
LoRA r=32, batches padded to their longest; (b) the same without padding (DataCollatorWithFlattening); (c) LoRA r=32 under our engine;
(d) Bone row, (e) col and (f) left, r=64. Each run is a process of its own, and the six take turns. Time is that from the end of the first
step to the end of the last, and throughput is set against that of the same turn; memory is the resident set at its highest, loading
included. The losses of (a) and (c) have to agree: they are the same training.

    python benchmarks/whole_training.py --model DIR --data DIR --work DIR [--steps N] [--turns N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from rows import Results, Row, parser, ratio
from training_run import train, without_paths

A, B = "a: Trainer, peft LoRA, padded", "b: Trainer, peft LoRA, flattened"
C, D, E, F = "c: our engine, peft LoRA", "d: our engine, Bone row", "e: our engine, Bone col", "f: our engine, Bone left"
LORA = ("adapter.method=lora", "adapter.rank=32")
TRAINER = {A: "padded", B: "flattened"}
OURS = {C: LORA, **{name: (f"adapter.grouping={grouping}", "adapter.rank=64") for name, grouping in ((D, "row"), (E, "col"), (F, "left"))}}
CLAIMS = ((D, A, 1.5), (D, C, 0.95), (F, C, 0.92), (E, C, 0.70), (B, A, None), (D, B, None), (C, A, None), (C, B, None))
"""Which throughput is set against which, and the least ratio."""
PARITY_NATS = 0.03


def main() -> None:
    options = _options()
    config = {
        "model": {"path": str(options.model), "dtype": "bf16"},
        "data": {"train": str(options.data / "gsm8k_train.jsonl"), "fields": {"query": "question", "response": "answer"},
                 "max_length": 64 if options.quick else 512, "packing": False},
        "train": {"steps": options.steps, "global_batch_size": options.batch, "micro_batch_size": options.batch, "learning_rate": 3e-4,
                  "schedule": "constant", "save_every": 0},
    }
    names = [A, C, D] if options.quick else [*TRAINER, *OURS]
    settings = {"config": without_paths(config), "turns": options.turns, "names": names}
    results = Results(options.json, settings, ("torch", "deepspeed", "transformers", "peft"), options.fresh, options.quick)
    for turn, name in itertools.product(range(options.turns), names):
        results.once(f"{name}, turn {turn}", partial(_measure, name, config, options.work))
        _check_equal_samples(results)
        results.write(_rows(names, results))
    results.finish(_rows(names, results))


def _measure(name: str, config: dict, work: Path) -> dict:
    return _measure_trainer(TRAINER[name], config, work) if name in TRAINER else _measure_ours(OURS[name], config, work)


def _measure_trainer(form: str, config: dict, work: Path) -> dict:
    work.mkdir(parents=True, exist_ok=True)
    path, out = work / "trainer.yaml", work / "trainer.json"
    tree = config | {"adapter": {"method": "lora", "rank": 32}, "output": {"directory": str(work / "unused")}}
    path.write_text(json.dumps(tree))
    subprocess.run([sys.executable, str(Path(__file__).with_name("hugging_face.py")), str(path), str(out), form], check=True)
    return json.loads(out.read_text())


def _measure_ours(overrides: tuple[str, ...], config: dict, work: Path) -> dict:
    run = train(config, work / "run", overrides)
    shutil.rmtree(work / "run")
    return {"ends_s": [step["time"] for step in run.steps], "memory_gib": max(step["memory_gib"] for step in run.steps),
            "trainable_parameters": run.start["trainable_parameters"],
            **{field: [step[field] for step in run.steps] for field in ("loss", "tokens", "label_tokens")}}


def _check_equal_samples(results: Results) -> None:
    """Every step of every run has to have the same tokens, with loss and without."""
    seen = {(tuple(run["tokens"]), tuple(run["label_tokens"])) for run in results.measured.values()}
    if len(seen) != 1:
        raise SystemExit(f"the runs had different samples, nothing is compared; tokens and loss-bearing tokens by step: {seen}")


def _rows(names: list[str], results: Results) -> list[Row]:
    turns = {name: [run for key, run in results.measured.items() if key.startswith(f"{name}, turn ")] for name in names}
    turns = {name: runs for name, runs in turns.items() if runs}
    rows = []
    for name, runs in turns.items():
        label_rates, token_rates = ([_per_s(run, field) for run in runs] for field in ("label_tokens", "tokens"))
        memory = [run["memory_gib"] for run in runs]
        rows += [Row(f"{name}: throughput", statistics.median(label_rates), "loss tokens/s", spread=(min(label_rates), max(label_rates))),
                 Row(f"{name}: without padding", statistics.median(token_rates), "tokens/s", spread=(min(token_rates), max(token_rates))),
                 Row(f"{name}: high-water memory", statistics.median(memory), "GiB", spread=(min(memory), max(memory))),
                 Row(f"{name}: parameters", runs[0]["trainable_parameters"], "parameters")]
    for ours, theirs, least in CLAIMS:
        if ours in turns and theirs in turns:
            label_rates = ([_per_s(run, "label_tokens") for run in turns[name]] for name in (ours, theirs))
            rows.append(ratio(f"{ours[0]}/{theirs[0]}: throughput ratio", *label_rates, theirs, at_least=least))
    if A in turns and D in turns:
        rows.append(ratio("d/a: memory ratio", *([run["memory_gib"] for run in turns[name]] for name in (D, A)), A, below=1))
    if A in turns and C in turns:
        apart = abs(_late_loss(turns[A][0]) - _late_loss(turns[C][0]))
        rows.append(Row("a and c: mean loss of the later half, apart", apart, "nats a token", A, at_most=PARITY_NATS))
    return rows


def _per_s(run: dict, field: str) -> float:
    """Of the steps after the first."""
    return sum(run[field][1:]) / (run["ends_s"][-1] - run["ends_s"][0])


def _late_loss(run: dict) -> float:
    return statistics.mean(run["loss"][len(run["loss"]) // 2:])


def _options() -> argparse.Namespace:
    options = parser(__doc__, "3 steps of 2 short samples for (a), (c) and (d), once: shows that it runs, compares nothing")
    options.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M")
    options.add_argument("--data", type=Path, required=True, help="directory with gsm8k_train.jsonl")
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--steps", type=int, default=8, help="of each run; the first is not timed")
    options.add_argument("--turns", type=int, default=2)
    given = options.parse_args()
    given.batch = 2 if given.quick else 8
    given.steps, given.turns = (3, 1) if given.quick else (given.steps, given.turns)
    return given


if __name__ == "__main__":
    main()
