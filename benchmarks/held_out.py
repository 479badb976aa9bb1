"""Methods compared by their held-out loss on one model and data set, each at several learning rates.

All have the same samples in the same order and the same number of steps, through the installed command line. Rates run in
the outer loop: a comparison that is cut short has still compared the methods. Finished runs are kept in the work directory.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from provenance import commit, provenance
from training_run import recorded, train


@dataclass(frozen=True)
class Method:
    name: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    config: dict
    """A run's config without learning rate and output directory."""
    methods: tuple[Method, ...]
    """The one that is measured, the one it is measured against, and others that are shown beside them."""
    ranks: int
    work: Path
    json: Path | None
    fall: float
    """Least fall in held-out loss, in nats, of the first method's best run."""
    margin: float
    """Most that the first method's best may lie above the second's, in nats."""

    def run(self, rates: int) -> None:
        """Trains every method at its first so many rates; reports where all rates ran."""
        self.work.mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(rates):
            for method in self.methods:
                rows.append(self._row(method, method.rates[index]))
                print(json.dumps(rows[-1]), flush=True)
                if self.json:
                    recorded = {"provenance": provenance("torch", "deepspeed", "transformers", "peft"), "rows": rows}
                    self.json.write_text(json.dumps(recorded, indent=1) + "\n")
        if rates == len(self.methods[0].rates):
            self._report(rows)

    def _row(self, method: Method, rate: float) -> dict:
        steps = self.config["train"]["steps"]
        directory = self.work / f"{method.name.replace(' ', '-').replace('=', '')}-{rate:g}-{steps}"
        finished = directory / "commit"
        if not finished.exists():
            train(self.config, directory, (f"train.learning_rate={rate:g}", *method.overrides), self.ranks)
            finished.write_text(commit())
        run = recorded(directory)
        last = [step["loss"] for step in run.steps[-20:]]
        return {
            "name": method.name, "commit": finished.read_text(), "learning_rate": rate, "steps": len(run.steps),
            "trainable_parameters": run.start["trainable_parameters"],
            "held_out_loss": [round(loss, 4) for loss in run.held_out_losses],
            "train_loss_last_20": round(sum(last) / len(last), 4),
            "memory_gib_rank0": max(step["memory_gib"] for step in run.steps),
        }

    def _report(self, rows: list[dict]) -> None:
        print(f"\n{'method':<16}{'rate':>8}{'before':>9}{'after':>9}{'GiB':>7}")
        for row in sorted(rows, key=_after):
            before, after = row["held_out_loss"][0], row["held_out_loss"][-1]
            print(f"{row['name']:<16}{row['learning_rate']:>8g}{before:>9.4f}{after:>9.4f}{row['memory_gib_rank0']:>7.2f}")
        ours, theirs = (min((row for row in rows if row["name"] == method.name), key=_after) for method in self.methods[:2])
        fall, excess = ours["held_out_loss"][0] - _after(ours), _after(ours) - _after(theirs)
        print(f"{ours['name']}: held-out loss falls by {fall:.4f} nats (target at least {self.fall}): "
              f"{'met' if fall >= self.fall else 'MISSED'}")
        print(f"its best minus the best of {theirs['name']}: {excess:+.4f} nats (target at most +{self.margin}): "
              f"{'met' if excess <= self.margin else 'MISSED'}")


def _after(row: dict) -> float:
    return row["held_out_loss"][-1]
