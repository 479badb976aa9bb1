"""The paper's Table 7 on this machine: memory and throughput of a true-size RWKV6 under LoRA and Bone, in every way of computing it.

RWKV6-1.6B (24 layers x 2048) or 3B (32 x 2560), random bf16 weights, batch 1, 512 tokens, through the installed command line at ZeRO-2 on
one rank. Every run is a process of its own, since the allocator gives nothing back, and methods take turns, so that a slow minute of
the machine meets them all. Throughput follows from the median of a turn's steps but the first, and is set against LoRA's of the same turn;
memory is the process's resident set at its highest, loading included, and the peak of live tensor bytes, counted in a run of its own. A
method whose process the system ends for want of memory is recorded as such. Beside the ratios stand the paper's, from its Table 7.

    python benchmarks/table7.py --text FILE --work DIR [--model 1.6b|3b] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from random_models import RWKV6, write_rwkv6
from rows import Results, Row, parser, ratio
from training_run import KILLED, Run, train

GIB = 1024**3
LORA = "lora r=32"
ROW = ("adapter.grouping=row", "adapter.rank=64")
METHODS = {  # those that take least memory first
    LORA: ("adapter.method=lora", "adapter.rank=32"),
    "bone row, factored": (*ROW, "adapter.strategy=factored"),
    "bone row, factored, layers recomputed": (*ROW, "adapter.strategy=factored", "train.activation_checkpointing=layer"),
    "bone left, factored": ("adapter.grouping=left", "adapter.rank=64"),
    "bone col, fused": ("adapter.grouping=col", "adapter.rank=64"),
    "bone row, materialized, layers recomputed": (*ROW, "adapter.strategy=materialized", "train.activation_checkpointing=layer"),
    "bone row, materialized, bone recomputed": (*ROW, "adapter.strategy=materialized", "train.activation_checkpointing=bone"),
    "bone row, materialized": (*ROW, "adapter.strategy=materialized"),
}
TARGETS = {"bone row, factored": {"throughput": {"at_least": 0.95}, "memory": {"at_most": 1.02}, "live": {"at_most": 1.02}}}
PAPER = {  # MB, thousand tokens a second
    "1.6b": {LORA: (7314, 5.86), "bone row, materialized": (12276, 4.11), "bone row, materialized, bone recomputed": (7398, 3.46),
             "bone row, materialized, layers recomputed": (7398, 1.59)},
    "3b": {LORA: (12074, 3.62), "bone row, materialized": (22978, 2.16), "bone row, materialized, bone recomputed": (12168, 1.72)},
    "tiny": {},
}


def main() -> None:
    options = _options()
    turns, steps = (1, 2) if options.quick else (options.turns, options.steps)
    methods = {name: METHODS[name] for name in list(METHODS)[:2 if options.quick else None]}
    model = write_rwkv6(options.model, options.work)
    config = {
        "model": {"path": str(model)},
        "data": {"train": str(options.text), "prompt": "text", "overlong": "split", "max_length": 512, "packing": False},
        "train": {"steps": steps, "global_batch_size": 1, "save_every": 0},
        "deepspeed": {"config": "zero2"},
    }
    settings = {"model": options.model, "turns": turns, "steps": steps, "methods": methods}
    results = Results(options.json, settings, ("torch", "deepspeed", "peft"), options.fresh, options.quick)
    for turn, name in itertools.product(range(turns), methods):
        if not _killed(results, name):
            results.once(f"{name}, turn {turn}", partial(_measure, config, options.work, methods[name]))
            results.write(_rows(options.model, methods, results))
    for name in methods:
        if not _killed(results, name):
            results.once(f"{name}, live", partial(_live_peak, config, options.work, methods[name]))
            results.write(_rows(options.model, methods, results))
    results.finish(_rows(options.model, methods, results))
    if not options.keep:
        model.unlink()


def _measure(config: dict, work: Path, overrides: tuple[str, ...]) -> dict:
    run = train(config, work / "run", overrides, may_be_killed=True)
    shutil.rmtree(work / "run", ignore_errors=True)
    return {"killed": True} if run.killed else _figures(run)


def _figures(run: Run) -> dict:
    return {"trainable_parameters": run.start["trainable_parameters"], "step_s": [step["step_s"] for step in run.steps],
            "tokens": run.steps[0]["tokens"], "memory_gib": max(step["memory_gib"] for step in run.steps)}


def _live_peak(config: dict, work: Path, overrides: tuple[str, ...]) -> dict:
    path, out, directory = work / "live.yaml", work / "live.json", work / "live"
    shutil.rmtree(directory, ignore_errors=True)
    path.write_text(json.dumps(config | {"output": {"directory": str(directory)}}))
    script = Path(__file__).with_name("live_peak.py")
    code = subprocess.run([sys.executable, str(script), str(path), str(out), "train.steps=2", *overrides]).returncode
    shutil.rmtree(directory, ignore_errors=True)
    if code in (-signal.SIGKILL, KILLED):
        return {"killed": True}
    if code:
        raise SystemExit(f"{script.name} {' '.join(overrides)}: ended with exit code {code}")
    return json.loads(out.read_text())


def _rows(model: str, methods: dict, results: Results) -> list[Row]:
    """Of the methods and turns measured so far."""
    rows = []
    lora = [] if _killed(results, LORA) else _turns(results, LORA)
    for name in methods:
        if _killed(results, name):
            rows.append(Row(f"{name}: does not fit into this machine's memory", round(_machine_gib(), 1), "GiB"))
            continue
        turns, live = _turns(results, name), results.measured.get(f"{name}, live")
        if not turns:
            continue
        speeds, memory = [turn["tokens"] / _median_step_s(turn) for turn in turns], [turn["memory_gib"] for turn in turns]
        rows += [Row(f"{name}: throughput", statistics.median(speeds), "tokens/s", spread=(min(speeds), max(speeds))),
                 Row(f"{name}: high-water memory", statistics.median(memory), "GiB", spread=(min(memory), max(memory)))]
        if live and live.get("killed"):
            rows.append(Row(f"{name}: does not fit while its tensors are counted", round(_machine_gib(), 1), "GiB"))
        elif live:
            rows += _live(name, live, results.measured[f"{LORA}, live"] if lora else {"killed": True})
        if name != LORA and lora:
            rows += _ratios(model, name, turns, lora)
    return rows


def _live(name: str, live: dict, lora: dict) -> list[Row]:
    rows = [Row(f"{name}: peak of live tensors", live["live_peak_bytes"] / GIB, "GiB")]
    if name != LORA and not lora.get("killed"):
        figures = [live["live_peak_bytes"]], [lora["live_peak_bytes"]]
        row = ratio(f"{name}: live peak ratio", *figures, LORA, **TARGETS.get(name, {}).get("live", {}))
        rows.append(replace(row, spread=None))  # counted once, and every time the same
    return rows


def _ratios(model: str, name: str, turns: list[dict], lora: list[dict]) -> list[Row]:
    targets = TARGETS.get(name, {})
    published_memory, published_speed = PAPER[model].get(name, (None, None))
    lora_memory, lora_speed = PAPER[model].get(LORA, (None, None))
    return [
        # A shorter step is a higher throughput.
        ratio(f"{name}: throughput ratio", map(_median_step_s, lora), map(_median_step_s, turns), LORA,
              published=published_speed and published_speed / lora_speed, **targets.get("throughput", {})),
        ratio(f"{name}: memory ratio", [turn["memory_gib"] for turn in turns], [turn["memory_gib"] for turn in lora], LORA,
              published=published_memory and published_memory / lora_memory, **targets.get("memory", {}))]


def _turns(results: Results, name: str) -> list[dict]:
    return [measured for key, measured in results.measured.items() if key.startswith(f"{name}, turn ")]


def _killed(results: Results, name: str) -> bool:
    return any(turn.get("killed") for turn in _turns(results, name))


def _median_step_s(turn: dict) -> float:
    return statistics.median(turn["step_s"][1:])


def _machine_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _options() -> argparse.Namespace:
    options = parser(__doc__, "2 steps of LoRA and factored row, once, on a tiny model: shows that it runs, compares nothing")
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--model", choices=[size for size in PAPER if size in RWKV6], default="1.6b")
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--steps", type=int, default=4, help="of each process; the first is not timed")
    options.add_argument("--keep", action="store_true", help="do not delete the model's file at the end")
    given = options.parse_args()
    if given.steps < 2:
        options.error("--steps: the first is not timed, give 2 or more")
    given.model = "tiny" if given.quick else given.model
    return given


if __name__ == "__main__":
    main()
