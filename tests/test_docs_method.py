"""The losses by learning rate in docs/method.md are those that the benchmarks recorded."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [line.split("|")[1:4] for line in (ROOT / "docs/method.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("column, name", [(1, "gsm8k_smollm2"), (2, "tinyshakespeare_rwkv6")])
@pytest.mark.parametrize("method, row", [("bone row", "`row`, r = 64 and 16"), ("lora", "LoRA, r = 32 and 8"), ("state", "`state`")])
def test_every_rate_with_its_loss(column, name, method, row):
    recorded = json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))["rows"]
    last = {row["learning_rate"]: row["held_out_loss"][-1] for row in recorded if row["name"].startswith(method)}
    shown = next(cells[column].strip() for cells in ROWS if cells[0].strip() == row)
    assert shown == (_rates(last) if last else "")


@pytest.mark.parametrize("column, name", [(1, "groupings_smollm2"), (2, "groupings_rwkv6")])
@pytest.mark.parametrize("method, row", [("left", "`left`"), ("col", "`col`"), ("row", "`row`"), ("lora", "LoRA")])
def test_groupings(column, name, method, row):
    measured = json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))["measured"]
    losses = {40: {}, 80: {}}
    for run, figures in measured.items():
        if of_method := re.fullmatch(rf"{method} r=\d+, rate (\S+), (\d+) steps, seed (\d)", run):
            rate, steps, seed = map(float, of_method.groups())
            losses[steps][rate if steps == 40 else seed] = figures["held_out_loss"]
    last = losses[80].values()
    shown = {cells[0].strip(): cells[column].strip() for cells in ROWS}
    assert shown[f"{row}, 40 steps"] == _rates(losses[40])
    assert shown[f"{row}, 80 steps"] == f"{sum(last) / 2:.4f} ({min(last):.4f}, {max(last):.4f})" and len(last) == 2


def _rates(losses: dict[float, float]) -> str:
    best = min(losses.values())
    return ", ".join(f"{rate:.0e}".replace("e-0", "e-").replace("e+00", "") + (f": **{loss:.4f}**" if loss == best else f": {loss:.4f}")
                     for rate, loss in sorted(losses.items()))
