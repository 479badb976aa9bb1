"""NaN in the data's path, and gradients that are infinite: the rows are named, nothing is changed, and the run ends or passes them over."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import tiny
import torch
from rows import Row
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny, tiny_tokens

from faults.harness import Harness
from faults.tiny_runs import LONGEST_S, Start, leaving_nothing

BAD = "h"
"""The letter whose path through the model holds what is not finite."""
BAD_ROWS = (5, 23)
"""In the first step and the second: the adapter is zero until then, so that nothing comes of a unit that is shut."""
QUESTIONS = [f"{first}{second}" for first in "abcdef" for second in "abcd"]
SAMPLES = 4
"""In a step."""
TRAIN = {"steps": len(QUESTIONS) // SAMPLES, "global_batch_size": SAMPLES, "micro_batch_size": 1, "eval_every": 0, "save_every": 1,
         "keep_checkpoints": 9}


def run(harness: Harness) -> list[Row]:
    for of, write in (("loss", _write_nan), ("gradient", _write_infinite_gradient)):
        for stage in (2,) if harness.quick else (0, 2, 3):
            for policy in ("stop", "skip"):
                name = f"{of} not finite, stage {stage}, {policy}"
                harness.attempt(name, leaving_nothing(partial(_tried, harness.work / name.replace(" ", "-"), of, write, stage, policy)))
    tried = [row for name, row in harness.results.measured.items() if "not finite" in name]
    return [Row("losses and gradients that are not finite, handled as configured", sum(row["ok"] for row in tried), f"of {len(tried)}",
                at_least=len(tried))]


def _tried(directory: Path, of: str, write, stage: int, policy: str) -> dict:
    directory.mkdir()
    save_tiny(directory / "model", **tiny.ODD_SIZES)
    write(directory / "model" / "model.safetensors")
    rows = [{"q": question, "a": "a"} for question in QUESTIONS]
    for row in BAD_ROWS:
        rows[row - 1]["q"] += BAD
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny.config_tree(directory / "model", directory / "rows.jsonl", Path("run"), train=TRAIN | {"on_nan": policy},
                            deepspeed={"config": f"zero{stage}"}, adapter={"targets": ["gate_proj"]})
    del tree["data"]["eval"]
    (directory / "run.yaml").write_text(json.dumps(tree))
    start = Start(directory, ["bone_ds", "train", "run.yaml", "--ranks", "2"])
    code = start.process.wait(LONGEST_S)
    problems = _problems(start, of, policy)
    bad = [{"step": event["step"], "loss": str(event["loss"]), "grad_norm": str(event["grad_norm"]),  # JSON has no NaN
            "rows": [row for _, row in event["samples"]]} for event in start.recorded("bad_step")]
    return {"code": code, "said": start.said(), "bad_steps": bad, "problems": problems, "ok": not problems}


def _write_nan(path: Path) -> None:
    """In the embedding of the letter."""
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][tiny_tokens()[BAD]] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})


def _write_infinite_gradient(path: Path) -> None:
    """A unit of the first layer's MLP that is shut, so that nothing comes of it, and that only the letter reaches, at 1e35 times 1e10."""
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][:, -1] = 0.0
    tensors["model.embed_tokens.weight"][tiny_tokens()[BAD], -1] = 1.0
    tensors["model.layers.0.self_attn.o_proj.weight"][-1] = 0.0  # attention would take it to other tokens
    tensors["model.layers.0.mlp.gate_proj.weight"][0] = 0.0
    tensors["model.layers.0.mlp.up_proj.weight"][0] = 0.0
    tensors["model.layers.0.mlp.up_proj.weight"][0, -1] = 1e35
    tensors["model.layers.0.mlp.down_proj.weight"][:, 0] = 1e10
    save_file(tensors, path, metadata={"format": "pt"})


def _problems(start: Start, of: str, policy: str) -> list[str]:
    """What is not as the documentation has it."""
    bad, steps = start.recorded("bad_step"), start.recorded("step")
    named = [row for event in bad for _, row in event["samples"]]
    expected_code = 2 if policy == "stop" else 0
    problems = [] if start.process.returncode == expected_code else [f"exit code {start.process.returncode}"]
    if of == "loss" and (not set(named) <= set(BAD_ROWS) or not all(math.isnan(event["loss"]) for event in bad)):
        problems.append(f"named rows {named}")
    if of == "gradient" and not all(math.isfinite(event["loss"]) and not math.isfinite(event["grad_norm"]) for event in bad):
        problems.append("the losses are not finite either")
    if of == "gradient" and not all(len(event["samples"]) == SAMPLES and set(BAD_ROWS) & {row for _, row in event["samples"]}
                                    for event in bad):
        problems.append(f"named rows {named}, without one that is bad")
    if policy == "skip" and not set(BAD_ROWS) <= set(named) or not bad:
        problems.append(f"named rows {named}, not all that are bad")
    if {event["step"] for event in bad} != {event["step"] for event in steps if not math.isfinite(event["loss"] + event["grad_norm"])}:
        problems.append("other steps are recorded as bad than are")
    lines = start.said()
    if policy == "stop" and not (len(lines) == 1 and "checkpoints before it are whole" in lines[0] and len(bad) == 1):
        problems.append(f"said {lines}")
    return problems + _changed_by_a_bad_step(start, {event["step"] for event in bad})


def _changed_by_a_bad_step(start: Start, bad: set[int]) -> list[str]:
    """Every step is saved: after a bad one the adapter is that of before, at first zero, and finite always."""
    problems, before = [], {}
    for path in sorted((start.run / "checkpoints").glob("step-*")):
        step, adapter = int(path.name.removeprefix("step-")), load_file(path / "adapter.safetensors")
        if not all(tensor.isfinite().all() for tensor in adapter.values()):
            problems.append(f"step {step}: the adapter is not finite")
        if step in bad and any(not tensor.equal(before.get(name, torch.zeros_like(tensor))) for name, tensor in adapter.items()):
            problems.append(f"step {step}: the adapter was changed")
        before = adapter
    return problems
