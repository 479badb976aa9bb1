"""The report as one HTML page that needs nothing from outside."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import jinja2

from bone_ds.profile import summary as figures
from bone_ds.profile.measurement import COMPONENTS
from bone_ds.profile.summary import GIB, LABEL_TOKENS, LIVE, STEP, Quantity, Summary, ratio
from bone_ds.profile.turns import Result

CAPTIONS = {
    "throughput_and_memory": ("Throughput against memory", "Up and to the left is better. The lines span the turns."),
    "memory_over_time": ("Memory through one step", "Every tensor storage, from the moment it is made until it is freed: the weights stay, "
                         "forward adds what backward will need, backward uses it up."),
    "memory_by_component": ("Where the peak comes from", "What lives at the highest moment of the step; predicted is what bone-ds plan "
                            "says, measured is this run."),
    "time_by_part": ("Where the time goes", "Above, a timed step from start to end. Below, the same time by kind of work: adapted layers "
                     "include the product with the frozen weight."),
}
"""Title and explanation, in the order of the page."""


_WORK = {"adapted layers": "the adapted layers", "other": "everything else, such as norms and activations"}


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    title: str
    figure: str
    unit: str
    note: str


def page(summaries: list[Summary], failed: list[Result], reference: Summary, plots: dict[str, str], configs: dict[str, str],
         provenance: dict) -> str:
    """plots: SVG by name. configs: YAML by variant."""
    template = files("bone_ds.profile").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=_title(summaries), subtitle=_subtitle(reference, provenance), sentence=_sentence(reference), cards=_cards(reference),
        compared=len(summaries) > 1, reference=reference.name, comparison=[_comparison(summary, reference) for summary in summaries],
        memory_name=reference.memory.name, failed=[(result.variant.name, result.failure.reason) for result in failed],
        plots=[(name, *CAPTIONS[name], plots[name]) for name in CAPTIONS if name in plots],
        figures=[(summary.name, _figures(summary)) for summary in summaries], configs=configs, provenance=_flat(provenance))


def _title(summaries: list[Summary]) -> str:
    if len(summaries) > 1:
        return ", ".join(summary.name for summary in summaries)
    adapter = summaries[0].result.variant.config.adapter
    size = f"r = {adapter.rank}" if adapter.has_rank else f"{summaries[0].first.trainable_parameters:,} parameters"
    if adapter.method == "bone":
        groups, form = f" of {adapter.groups}" if adapter.groups else "", "" if adapter.form == "affine" else f", {adapter.form}"
        return f"Bone {adapter.grouping}{groups}{form}, {size}"
    return {"lora": f"LoRA, {size}", "state": "State tuning", "full": "Full training"}.get(adapter.method, adapter.method)


def _sentence(summary: Summary) -> str:
    """What the figures come to, in words."""
    part, share = max(summary.part_shares.items(), key=lambda pair: pair[1])
    said = [f"A step takes {number(summary.spread(STEP).median)} s, {share:.0%} of it {part}."]
    if summary.first.kinds:
        kind, cost_s = max(summary.first.kinds.by_kind_s.items(), key=lambda pair: pair[1])
        said.append(f"The largest kind of work is {_WORK.get(kind, kind)}, {cost_s / summary.first.kinds.step_s:.0%} of the time.")
    if summary.first.memory:
        memory = summary.first.memory
        component, size = max(memory.at_peak.items(), key=lambda pair: pair[1])
        at_s = max(range(len(memory.time_s)), key=lambda index: sum(sizes[index] for sizes in memory.by_component.values()))
        during = next((part for part, start_s, end_s in memory.phases if start_s <= memory.time_s[at_s] <= end_s), "the step")
        said.append(f"Tensors peak at {memory.peak_bytes / GIB:.2f} GiB during {during}, {size / memory.peak_bytes:.0%} of it {component}.")
    return " ".join(said)


def _subtitle(reference: Summary, provenance: dict) -> str:
    config, first = reference.result.variant.config, reference.first
    ranks = "1 rank" if first.world_size == 1 else f"{first.world_size} ranks"
    machine = first.device if first.device != "cpu" else f"{provenance['processor']}, {provenance['cores']} cores"
    return f"{config.model.path.rstrip('/').rpartition('/')[2]} · {config.model.dtype} · {config.deepspeed.config} · {ranks} · {machine}"


def _cards(summary: Summary) -> list[Card]:
    step, rate, memory = summary.spread(STEP), summary.spread(LABEL_TOKENS), summary.spread(summary.memory)
    rates = [summary.spread(quantity).median for quantity in figures.QUANTITIES[1:3]]
    cards = [
        Card("Throughput", number(rate.median), "loss-bearing tokens/s", f"{number(rates[0])} real, {number(rates[1])} all positions"),
        Card("A step", number(step.median), "s", "fastest {}, slowest {}".format(*map(number, _range(summary)))),
        Card(f"Peak {summary.memory.name}", f"{memory.median:.2f}", "GiB a rank", _against(summary, summary.memory))]
    if summary.first.memory:
        cards.append(Card("Peak of live tensors", f"{summary.spread(LIVE).median:.2f}", "GiB a rank", _against(summary, LIVE)))
    if summary.flops:
        peak = summary.matrix_peak_flops / 1e9
        cards.append(Card("Arithmetic", f"{summary.share_of_matrix_peak:.0%}", "of the machine's peak",
                          f"{summary.flops / 1e9:,.0f} of {peak:,.0f} GFLOP/s in a matrix product"
                          + (", recomputation included" if summary.recomputes else "")))
    cards.append(Card("Trainable", _millions(summary.first.trainable_parameters), "parameters", f"{summary.first.trainable_parameters:,}"))
    return cards


def _range(summary: Summary) -> tuple[float, float]:
    times_s = [step.total_s for turn in summary.result.turns for step in turn.steps]
    return min(times_s), max(times_s)


def _against(summary: Summary, quantity: Quantity) -> str:
    predicted = summary.predicted(quantity)
    if predicted is None:
        return "not predicted"
    return f"predicted {predicted:.2f} GiB ({predicted / summary.spread(quantity).median - 1:+.1%})"


def _comparison(summary: Summary, reference: Summary) -> dict:
    """A row of the table of variants."""
    quantities = (LABEL_TOKENS, summary.memory, LIVE)
    values = [summary.spread(quantity) for quantity in quantities]
    return {
        "name": summary.name, "trainable": _millions(summary.first.trainable_parameters), "step": number(summary.spread(STEP).median),
        "cells": [(number(value.median) if value else "–", _ratio(summary, reference, quantity))
                  for quantity, value in zip(quantities, values, strict=True)]}


def _ratio(summary: Summary, reference: Summary, quantity: Quantity) -> tuple[str, str]:
    """The median, and from where to where the turns go."""
    spread = None if summary is reference else ratio(summary, reference, quantity)
    if spread is None:
        return "1.00" if summary is reference else "–", ""
    lowest, highest = f"{spread.lowest:.2f}", f"{spread.highest:.2f}"
    return f"{spread.median:.2f}", f"{lowest} to {highest}" if lowest != highest else ""


def _figures(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Name, figure with unit, predicted, spread over turns."""
    lines = []
    for quantity in figures.QUANTITIES:
        spread = summary.spread(quantity)
        if spread:
            predicted = summary.predicted(quantity)
            lines.append((quantity.name, f"{number(spread.median)} {_unit(quantity.unit)}", "" if predicted is None else number(predicted),
                          f"{number(spread.lowest)}–{number(spread.highest)}" if spread.lowest != spread.highest else ""))
    if summary.first.memory:
        for component in COMPONENTS:
            predicted = number(summary.predicted_live[component] / GIB) if summary.plan else ""
            lines.append((f"{component} at the peak", f"{number(summary.first.memory.at_peak[component] / GIB)} GiB", predicted, ""))
    if summary.first.kinds:
        whole_s = summary.first.kinds.step_s
        shares_s = summary.first.kinds.by_kind_s | {"matrix products": summary.first.kinds.matrix_products_s}
        lines += [(f"{kind} in a profiled step", f"{cost_s / whole_s:.1%}", "", "") for kind, cost_s in shares_s.items()]
    return lines


def _flat(tree: dict) -> list[tuple[str, str]]:
    return [(name, ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value))
            for name, value in tree.items()]


def _unit(unit: str) -> str:
    return "/s" if unit == "1/s" else unit


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k" if count >= 1e4 else str(count)


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 0.1 else f"{value:.2g}"
