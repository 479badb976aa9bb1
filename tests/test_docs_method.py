"""The losses by learning rate in docs/method.md are those that the benchmarks recorded."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [line.split("|")[1:4] for line in (ROOT / "docs/method.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("column, name", [(1, "gsm8k_smollm2"), (2, "tinyshakespeare_rwkv6")])
@pytest.mark.parametrize("method, row", [("bone row", "`row`, r = 64 and 16"), ("lora", "LoRA, r = 32 and 8"), ("state", "`state`")])
def test_every_rate_with_its_loss(column, name, method, row):
    recorded = json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))["rows"]
    last = {row["learning_rate"]: row["held_out_loss"][-1] for row in recorded if row["name"].startswith(method)}
    best = min(last.values(), default=None)
    expected = [f"{rate:.0e}".replace("e-0", "e-").replace("e+00", "") + (f": **{loss:.4f}**" if loss == best else f": {loss:.4f}")
                for rate, loss in sorted(last.items())]
    shown = next(cells[column].strip() for cells in ROWS if cells[0].strip() == row)
    assert shown == ", ".join(expected)
