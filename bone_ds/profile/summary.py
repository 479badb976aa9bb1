"""Measurements of turns to figures: medians, ratios with their spread, and rows of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from statistics import median

from bone_ds.plan import Plan
from bone_ds.profile.measurement import COMPONENTS, PARTS, Measurement
from bone_ds.profile.turns import Result

GIB = 2**30


@dataclass(frozen=True)
class Spread:
    """A figure over turns, and how far they lie apart."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Quantity:
    name: str
    unit: str
    of_turn: Callable[[Measurement], float | None]
    """None where the machine has no such thing."""
    of_plan: Callable[[Plan], float | None] = lambda plan: None


def _per_second(what: str) -> Callable[[Measurement], float]:
    return lambda turn: sum(getattr(step, what) for step in turn.steps) / sum(step.total_s for step in turn.steps)


def _part(part: str) -> Callable[[Measurement], float]:
    return lambda turn: median(step.parts_s[part] for step in turn.steps)


def _live_gib(turn: Measurement) -> float | None:
    return turn.memory and turn.memory.peak_bytes / GIB


def step_s(turn: Measurement) -> float:
    return median(step.total_s for step in turn.steps)


LABEL_TOKENS = Quantity("loss-bearing tokens", "1/s", _per_second("label_tokens"))
TOKENS = Quantity("real tokens", "1/s", _per_second("tokens"))
STEP = Quantity("step", "s", step_s)
RESIDENT = Quantity("resident set", "GiB", lambda turn: turn.resident_bytes / GIB,
                    lambda plan: plan.peak_bytes / GIB if plan.device == "cpu" else None)
ALLOCATED = Quantity("allocated", "GiB", lambda turn: turn.allocated_bytes and turn.allocated_bytes / GIB)
RESERVED = Quantity("reserved", "GiB", lambda turn: turn.reserved_bytes and turn.reserved_bytes / GIB,
                    lambda plan: None if plan.device == "cpu" else (plan.peak_bytes - plan.by_component["context"]) / GIB)
LIVE = Quantity("live tensors", "GiB", _live_gib, lambda plan: plan.live_peak_bytes / GIB)
QUANTITIES = (
    LABEL_TOKENS, TOKENS, Quantity("all positions", "1/s", _per_second("positions")), STEP,
    *(Quantity(part, "s", _part(part)) for part in PARTS), RESIDENT, ALLOCATED, RESERVED, LIVE)


@dataclass(frozen=True)
class Summary:
    """One variant that could be measured."""

    result: Result
    plan: Plan | None
    """What was predicted; None where no plan could be made."""

    @property
    def name(self) -> str:
        return self.result.variant.name

    @property
    def first(self) -> Measurement:
        """The turn with instruments."""
        return self.result.turns[0]

    def spread(self, quantity: Quantity) -> Spread | None:
        values = [value for value in map(quantity.of_turn, self.result.turns) if value is not None]
        return Spread.of(values) if values else None

    def predicted(self, quantity: Quantity) -> float | None:
        return self.plan and quantity.of_plan(self.plan)

    @property
    def part_shares(self) -> dict[str, float]:
        """By `PARTS`, of all timed steps together; they sum to 1."""
        steps = [step for turn in self.result.turns for step in turn.steps]
        whole_s = sum(step.total_s for step in steps)
        return {part: sum(step.parts_s[part] for step in steps) / whole_s for part in PARTS}

    @property
    def memory(self) -> Quantity:
        """The figure that decides whether a run fits: what the allocator held on a GPU, the resident set on a CPU."""
        return RESIDENT if self.first.reserved_bytes is None else RESERVED

    @property
    def predicted_live(self) -> dict[str, int] | None:
        """By `COMPONENTS`, at the predicted peak of live tensors."""
        return self.plan and {component: self.plan.live_by_component.get(component, 0) for component in COMPONENTS}

    @property
    def flops(self) -> float | None:
        """Floating-point operations per second of one rank, recomputed ones included.

        The plan counts the operations of a mean step; the timed steps may have more tokens or fewer, and all ranks' are counted in both.
        """
        return self.plan and self.plan.flops.total * self.spread(TOKENS).median / self.plan.workload.tokens_per_step

    @property
    def recomputes(self) -> bool:
        return bool(self.plan and self.plan.flops.recomputed)

    @property
    def matrix_peak_flops(self) -> float:
        return median(turn.matrix_peak_flops for turn in self.result.turns)

    @property
    def share_of_matrix_peak(self) -> float | None:
        return self.flops and self.flops / self.matrix_peak_flops


def ratio(summary: Summary, reference: Summary, quantity: Quantity) -> Spread | None:
    """To the reference, turn by turn: what slows the machine down for a while slows both."""
    pairs = [(quantity.of_turn(ours), quantity.of_turn(theirs))
             for ours, theirs in zip(summary.result.turns, reference.result.turns, strict=False)]
    values = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    return Spread.of(values) if values else None


def rows(summaries: list[Summary], reference: Summary) -> list[dict]:
    """One for each variant and quantity."""
    made = []
    for summary in summaries:
        for quantity in QUANTITIES:
            spread = summary.spread(quantity)
            if spread is not None:
                made.append(_row(summary, reference, quantity, spread))
        for name, cost_s in (summary.first.kinds.by_kind_s if summary.first.kinds else {}).items():
            made.append(_plain(summary, f"profiled step: {name}", cost_s, "s"))
        if summary.first.kinds:
            made.append(_plain(summary, "profiled step: matrix products", summary.first.kinds.matrix_products_s, "s"))
        for name, size in (summary.first.memory.at_peak if summary.first.memory else {}).items():
            predicted = summary.predicted_live and summary.predicted_live[name] / GIB
            made.append(_plain(summary, f"live at the peak: {name}", size / GIB, "GiB") | {"predicted": predicted})
        made.append(_plain(summary, "matrix product peak", summary.matrix_peak_flops / 1e9, "GFLOP/s"))
        if summary.flops:
            made.append(_plain(summary, "achieved", summary.flops / 1e9, "GFLOP/s"))
    return made


def _row(summary: Summary, reference: Summary, quantity: Quantity, spread: Spread) -> dict:
    row = _plain(summary, quantity.name, spread.median, quantity.unit)
    row |= {"lowest": spread.lowest, "highest": spread.highest, "predicted": summary.predicted(quantity)}
    against = None if summary is reference else ratio(summary, reference, quantity)
    if against:
        row |= {"compared with": reference.name, "ratio": against.median, "ratio lowest": against.lowest, "ratio highest": against.highest}
    return row


def _plain(summary: Summary, name: str, figure: float, unit: str) -> dict:
    return {"variant": summary.name, "name": name, "figure": figure, "unit": unit, "lowest": None, "highest": None, "predicted": None,
            "compared with": None, "ratio": None, "ratio lowest": None, "ratio highest": None}


def as_json(rows: list[dict], provenance: dict) -> str:
    return json.dumps({"provenance": provenance, "rows": rows}, indent=1) + "\n"


def as_csv(rows: list[dict], provenance: dict) -> str:
    """The provenance stands in every row, in one column of JSON."""
    text = StringIO()
    writer = csv.DictWriter(text, [*rows[0], "provenance"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"provenance": json.dumps(provenance)})
    return text.getvalue()
