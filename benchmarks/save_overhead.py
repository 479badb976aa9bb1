"""What saving costs: the share of a run's time that goes into a checkpoint every 50 steps, waited for or written beside the steps.

The demo's small RWKV6 by its own recipe, on two ranks at ZeRO-2, without held-out losses. Training waits between two steps: what it waits
longer after a step that is saved than after the others is the save. One that is written beside the steps may slow those down too, on a
CPU where it takes their core: the first steps after a save are compared with the others.

    python benchmarks/save_overhead.py --work DIR [--steps N] [--turns N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
from functools import partial
from pathlib import Path

import yaml
from rows import Results, Row, parser
from training_run import Run, train

from bone_ds.demo import demonstration, quickstart, rwkv6

SAVE_EVERY = 50
WAYS = {"waited for": "false", "beside the steps": "true"}
"""train.async_save."""
MOST = 0.05
AFTER = 2
"""Steps after a save that may be slower for it."""


def main() -> None:
    options = _options()
    recipe = yaml.safe_load(demonstration.recipe_of(rwkv6.PART).read_text())
    settings = {"recipe": rwkv6.PART.recipe, "save_every": options.save_every, "steps": options.steps, "turns": options.turns}
    results = Results(options.json, settings, ("torch", "deepspeed"), options.fresh, options.quick)
    for turn, way in itertools.product(range(options.turns), WAYS):
        results.once(f"{way}, turn {turn}", partial(_measure, recipe, WAYS[way], options))
    results.finish([row for way in WAYS for row in _rows(way, results)])


def _measure(recipe: dict, async_save: str, options: argparse.Namespace) -> dict:
    model, questions, held_out = quickstart.write(options.work)
    config = {section: recipe[section] for section in ("adapter", "deepspeed")} | {
        "model": recipe["model"] | {"path": str(model)}, "data": recipe["data"] | {"train": str(questions), "eval": str(held_out)},
        "train": recipe["train"] | {"steps": options.steps, "save_every": options.save_every, "eval_every": 0}}
    run = train(config, options.work / "run", (f"train.async_save={async_save}",), ranks=2)
    size_bytes = sum(file.stat().st_size for file in max((options.work / "run/checkpoints").iterdir()).iterdir())
    shutil.rmtree(options.work / "run")
    return _times(run, options.save_every) | {"checkpoint_bytes": size_bytes}


def _times(run: Run, save_every: int) -> dict:
    """waits_s: from the end of each step that is saved to the begin of the next, less what that takes where nothing is saved."""
    between_s = {before["step"]: after["time"] - after["step_s"] - before["time"] for before, after in itertools.pairwise(run.steps)}
    usual_s = statistics.median(seconds for step, seconds in between_s.items() if step % save_every)
    steps_s = {step["step"]: step["step_s"] for step in run.steps[1:]}
    after = {step: 1 <= step % save_every <= AFTER and step > save_every for step in steps_s}
    return {"whole_s": run.steps[-1]["time"] - run.steps[0]["time"],
            "waits_s": [round(seconds - usual_s, 4) for step, seconds in between_s.items() if step % save_every == 0],
            "writes_s": [event["write_s"] for event in run.events if event["event"] == "checkpoint"],
            "step_s": statistics.median(seconds for step, seconds in steps_s.items() if not after[step]),
            "step_after_a_save_s": statistics.median(seconds for step, seconds in steps_s.items() if after[step])}


def _rows(way: str, results: Results) -> list[Row]:
    turns = [run for name, run in results.measured.items() if name.startswith(f"{way}, turn ")]
    shares = [sum(run["waits_s"]) / run["whole_s"] for run in turns]
    slower = [run["step_after_a_save_s"] / run["step_s"] for run in turns]
    writes_s = [seconds for run in turns for seconds in run["writes_s"]]
    return [
        Row(f"{way}: share of the time", statistics.median(shares), "share", spread=(min(shares), max(shares)), at_most=MOST),
        Row(f"{way}: writing and verifying one", statistics.median(writes_s), "s", spread=(min(writes_s), max(writes_s))),
        Row(f"{way}: the {AFTER} steps after a save", statistics.median(slower), "ratio", "the others", spread=(min(slower), max(slower))),
        Row(f"{way}: a step", statistics.median(run["step_s"] for run in turns), "s"),
        Row(f"{way}: size of a checkpoint", turns[0]["checkpoint_bytes"], "bytes")]


def _options() -> argparse.Namespace:
    options = parser(__doc__, "12 steps with a checkpoint every 4, once: shows that it runs")
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--steps", type=int, default=3 * SAVE_EVERY + AFTER, help=f"of each run; each {SAVE_EVERY}th is saved")
    options.add_argument("--turns", type=int, default=2)
    given = options.parse_args()
    given.save_every = 4 if given.quick else SAVE_EVERY
    given.steps, given.turns = (3 * 4 + AFTER, 1) if given.quick else (given.steps, given.turns)
    return given


if __name__ == "__main__":
    main()
