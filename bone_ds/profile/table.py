"""The report as text."""

from __future__ import annotations

from bone_ds.profile import summary as figures
from bone_ds.profile.measurement import COMPONENTS
from bone_ds.profile.summary import GIB, LABEL_TOKENS, LIVE, QUANTITIES, STEP, Quantity, Spread, Summary, ratio
from bone_ds.profile.turns import Result

_RATES = QUANTITIES[:3]
_MEMORY = (figures.RESIDENT, figures.ALLOCATED, figures.RESERVED, LIVE)
_COMPARED = (LABEL_TOKENS, STEP)


def table(summaries: list[Summary], failed: list[Result], reference: Summary | None) -> str:
    blocks = [_one(summary) for summary in summaries]
    if len(summaries) > 1 and reference:
        blocks.append(_comparison(summaries, reference))
    blocks += [f"{result.variant.name}: {result.failure.reason}" for result in failed]
    return "\n\n".join(blocks)


def _one(summary: Summary) -> str:
    first = summary.first
    lines = [f"{summary.name}: {first.trainable_parameters:,} trainable parameters, {first.world_size} "
             f"{'rank' if first.world_size == 1 else 'ranks'}, {first.device}"]
    step = summary.spread(STEP)
    lines.append(_line("a step", f"{step.median:.3g} s", "  ".join(
        f"{part} {_share(share)}" for part, share in summary.part_shares.items() if share > 0.001)))
    if first.kinds:
        shares = sorted(first.kinds.by_kind_s.items(), key=lambda pair: -pair[1])
        lines.append(_line("by kind of work", "", "  ".join(
            f"{kind} {_share(cost_s / first.kinds.step_s)}" for kind, cost_s in shares if cost_s > 0.001 * first.kinds.step_s)))
        lines.append(_line("matrix products", _share(first.kinds.matrix_products_s / first.kinds.step_s), "of the step, in all kinds"))
    lines += [_line(quantity.name, f"{_figure(summary.spread(quantity).median)} /s") for quantity in _RATES]
    if summary.flops:
        share = f"{summary.share_of_matrix_peak:.0%} of this machine's {summary.matrix_peak_flops / 1e9:.0f} in a matrix product"
        recomputed = ", counting what is computed again" if summary.recomputes else ""
        lines.append(_line("achieved", f"{summary.flops / 1e9:.0f} GFLOP/s", share + recomputed))
    for quantity in _MEMORY:
        spread = summary.spread(quantity)
        if spread:
            predicted = summary.predicted(quantity)
            against = "" if predicted is None else f"predicted {predicted:.2f} ({predicted / spread.median - 1:+.1%})"
            lines.append(_line(quantity.name, f"{spread.median:.2f} GiB", against))
    if first.memory:
        lines.append(f"  {'live at the peak':<22}{'measured':>10}{'predicted' if summary.plan else '':>12}   GiB")
        for component in COMPONENTS:
            lines.append(_component_line(summary, component))
    return "\n".join(lines)


def _component_line(summary: Summary, component: str) -> str:
    measured = summary.first.memory.at_peak[component] / GIB
    predicted = f"{summary.predicted_live[component] / GIB:12.3f}" if summary.plan else ""
    return f"    {component:<20}{measured:10.3f}{predicted}"


def _comparison(summaries: list[Summary], reference: Summary) -> str:
    """Ratios to the reference, the median of the turns with the lowest and the highest."""
    quantities = (*_COMPARED, reference.memory, LIVE)
    width = max(len(summary.name) for summary in summaries) + 2
    lines = [f"against {reference.name}, over {len(reference.result.turns)} turns",
             f"  {'':<{width}}" + "".join(f"{quantity.name:>26}" for quantity in quantities)]
    for summary in summaries:
        cells = [_ratio(ratio(summary, reference, quantity), quantity) for quantity in quantities]
        lines.append(f"  {summary.name:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _ratio(spread: Spread | None, quantity: Quantity) -> str:
    if spread is None:
        return "-"
    lone = quantity is LIVE or spread.lowest == spread.highest
    return f"{spread.median:.3f}" + ("" if lone else f" ({spread.lowest:.3f}-{spread.highest:.3f})")


def _line(name: str, figure: str, rest: str = "") -> str:
    return f"  {name:<22}{figure:>14}   {rest}".rstrip()


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
