"""The plots, drawn once and saved twice: SVG for the page, whose colours follow its theme, and PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bone_ds.profile.measurement import COMPONENTS
from bone_ds.profile.summary import GIB, LABEL_TOKENS, STEP, Spread, Summary

# Okabe and Ito's palette, which colour-blind readers tell apart.
_BLUE, _SKY, _GREEN, _ORANGE, _RED, _PINK, _YELLOW = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442"
_GREY = "#999999"
_COMPONENTS = {
    "weights": _BLUE, "adapter": _RED, "optimizer": _ORANGE, "gradients": _PINK, "buckets": _YELLOW, "gathered": _SKY,
    "activations": _GREEN, "transient": _GREY}
_PARTS = {"data": _YELLOW, "forward": _SKY, "backward": _BLUE, "optimizer": _ORANGE, "rest": _GREY}
_KINDS = {"adapted layers": _RED, "WKV": _GREEN, "attention": _PINK, "head and loss": _SKY, "optimizer": _ORANGE,
          "communication": _YELLOW, "other": _GREY}
_SHADES = {"forward": _SKY, "backward": _GREY, "optimizer": _ORANGE}
"""Behind the parts of a step."""
_DARK = {_BLUE, _RED, _GREEN}
"""Under white text; the others carry black."""
_INK, _MUTED, _RULE = "#1b1f24", "#5b6470", "#d9dde3"
_THEMED = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)"}
_STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.color": _INK, "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE, "axes.spines.top": False, "axes.spines.right": False, "xtick.color": _MUTED, "ytick.color": _MUTED,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlecolor": _INK, "axes.titleweight": "bold", "legend.frameon": False,
    "svg.fonttype": "none", "figure.constrained_layout.use": True}
_WIDTH_IN, _TITLE_IN, _DPI = 9.0, 0.4, 160


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def memory_over_time(summaries: list[Summary]) -> Figure:
    """Live bytes through a step, stacked by component; its parts are shaded. One panel a variant, of one scale."""
    measured = [summary for summary in summaries if summary.first.memory]
    columns = 1 if len(measured) == 1 else 2
    rows = -(-len(measured) // columns)
    figure, panels = _figure(rows, columns, 3.4 if columns == 1 else 2.5 * rows + 0.3, sharey=True)
    used = [component for component in COMPONENTS
            if any(max(summary.first.memory.by_component[component]) > 0.004 * summary.first.memory.peak_bytes for summary in measured)]
    highest = max(summary.first.memory.peak_bytes for summary in measured) / GIB
    for axes, summary in zip(panels, measured, strict=False):
        _draw_memory_over_time(axes, summary, used, highest)
    for axes in panels[len(measured):]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("live tensors, GiB")
    for axes in panels[max(0, len(measured) - columns):len(measured)]:
        axes.set_xlabel("seconds into a step (slowed down by the counting)")
    _legend(figure, {component: _COMPONENTS[component] for component in reversed(used)})
    return figure


def _draw_memory_over_time(axes: Axes, summary: Summary, used: list[str], highest_gib: float) -> None:
    memory = summary.first.memory
    layers = [[size / GIB for size in memory.by_component[component]] for component in used]
    whole_s, top_gib = memory.time_s[-1], highest_gib * 1.3
    labelled = set()
    for part, start_s, end_s in memory.phases:
        axes.axvspan(start_s, end_s, color=_SHADES[part], alpha=0.16, linewidth=0, zorder=0)
        if end_s - start_s > 0.085 * whole_s * axes.get_gridspec().ncols and part not in labelled:
            axes.text((start_s + end_s) / 2, top_gib * 0.985, part, ha="center", va="top", color=_MUTED, fontsize=9)
            labelled.add(part)
    axes.stackplot(memory.time_s, layers, colors=[_COMPONENTS[component] for component in used], step="post", linewidth=0)
    totals = [sum(values) for values in zip(*layers, strict=True)]
    at = max(range(len(totals)), key=totals.__getitem__)
    right = memory.time_s[at] > 0.6 * whole_s
    axes.plot([memory.time_s[at]], [totals[at]], "o", color=_INK, markersize=4)
    axes.annotate(f"peak {memory.peak_bytes / GIB:.2f} GiB", (memory.time_s[at], totals[at]), (-5 if right else 5, 4),
                  textcoords="offset points", ha="right" if right else "left", va="bottom", fontweight="bold")
    axes.set_xlim(0, whole_s)
    axes.set_ylim(0, top_gib)
    if axes.get_gridspec().ncols > 1:
        axes.set_title(summary.name)


def memory_by_component(summaries: list[Summary]) -> Figure:
    """At the peak, predicted above measured."""
    bars = []
    for summary in summaries:
        name = f"{summary.name}\n" if len(summaries) > 1 else ""
        if summary.plan:
            bars.append((f"{name}predicted", summary.predicted_live))
        if summary.first.memory:
            bars.append(("measured" if summary.plan else f"{name}measured", summary.first.memory.at_peak))
    figure, (axes,) = _figure(1, 1, 0.8 + 0.5 * len(bars))
    in_gib = [(label, {name: size / GIB for name, size in parts.items()}) for label, parts in bars]
    _stacked(axes, in_gib, _COMPONENTS, "GiB", "{:.2f}", together=("measured",))
    axes.set_xlabel("live tensors at the peak of a step, GiB")
    _legend(figure, {name: color for name, color in _COMPONENTS.items() if any(parts[name] for _, parts in bars)})
    return figure


def time_by_part(summaries: list[Summary]) -> Figure:
    """The timed step by part, and the profiled one by kind of work, as shares of the timed one."""
    are_profiled = any(summary.first.kinds for summary in summaries)
    figure, panels = _figure(2, 1, 2.0 + 0.68 * len(summaries)) if are_profiled else _figure(1, 1, 1.2 + 0.34 * len(summaries))
    above, *below = panels
    names = [summary.name if len(summaries) > 1 else "" for summary in summaries]
    parts = [(name, {part: share * summary.spread(STEP).median for part, share in summary.part_shares.items()})
             for name, summary in zip(names, summaries, strict=True)]
    _stacked(above, parts, _PARTS, "s", "{:.3g}")
    above.set_title("by part")
    panels[-1].set_xlabel("seconds a step")
    _legend_above(above, _PARTS, parts)
    if below:
        _draw_kinds(below[0], names, summaries)
        above.set_xlim(below[0].get_xlim())
    return figure


def _draw_kinds(axes: Axes, names: list[str], summaries: list[Summary]) -> None:
    kinds = []
    for name, summary in zip(names, summaries, strict=True):
        if summary.first.kinds:
            scale = summary.spread(STEP).median / summary.first.kinds.step_s
            kinds.append((name, {kind: cost_s * scale for kind, cost_s in summary.first.kinds.by_kind_s.items()}))
    _stacked(axes, kinds, _KINDS, "s", "{:.3g}")
    axes.set_title("by kind of work")
    _legend_above(axes, _KINDS, kinds)


def _legend_above(axes: Axes, colors: dict[str, str], shown: list[tuple[str, dict[str, float]]]) -> None:
    used = {name: color for name, color in colors.items() if any(values.get(name, 0) > 0 for _, values in shown)}
    axes.legend(handles=[Patch(color=color, label=name) for name, color in used.items()], loc="lower right", ncols=len(used),
                bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=0.9, handleheight=0.9, columnspacing=1.2, fontsize=9)


def throughput_and_memory(summaries: list[Summary]) -> Figure:
    """Up and to the left is better. A cross spans the turns."""
    figure, (axes,) = _figure(1, 1, 4.0)
    points = []
    for index, summary in enumerate(summaries):
        memory, rate = summary.spread(summary.memory), summary.spread(LABEL_TOKENS)
        color = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, _SKY, _GREY)[index % 7]
        axes.errorbar(memory.median, rate.median, xerr=[[memory.median - memory.lowest], [memory.highest - memory.median]],
                      yerr=[[rate.median - rate.lowest], [rate.highest - rate.median]], fmt="o", color=color, markersize=10, elinewidth=1.5)
        points.append((memory, rate, summary.name))
    _widen(axes, points)
    for x, y, name in ((memory.median, rate.median, name) for memory, rate, name in points):
        right = x > sum(axes.get_xlim()) / 2
        axes.annotate(name, (x, y), (-10 if right else 10, 0), textcoords="offset points", ha="right" if right else "left", va="bottom",
                      fontweight="bold")
    axes.set_xlabel(f"{summaries[0].memory.name} of a rank, GiB")
    axes.set_ylabel("loss-bearing tokens a second")
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.annotate("better ", (0.012, 0.97), (0.075, 0.86), xycoords="axes fraction", color=_MUTED, va="center", ha="left",
                  arrowprops={"arrowstyle": "->", "color": _MUTED})
    return figure


def _widen(axes: Axes, points: list[tuple[Spread, Spread, str]]) -> None:
    """Room for the names; ranges of at least a fifth of the figures, so that small differences look small."""
    for spreads, set_limits in (([memory for memory, _, _ in points], axes.set_xlim), ([rate for _, rate, _ in points], axes.set_ylim)):
        lowest, highest = min(spread.lowest for spread in spreads), max(spread.highest for spread in spreads)
        middle, half = (lowest + highest) / 2, max((highest - lowest) * 0.6, 0.1 * highest)
        set_limits(max(0.0, middle - half), middle + half)


def _stacked(axes: Axes, bars: list[tuple[str, dict[str, float]]], colors: dict[str, str], unit: str, form: str,
             together: tuple[str, ...] = ()) -> None:
    """Horizontal bars from the top down, each part with its figure where there is room, and the sum behind it.

    together: labels of bars that stand close to the one before.
    """
    longest = max(sum(parts.values()) for _, parts in bars)
    rows = list(accumulate(0.8 if label in together else 1.05 for label, _ in bars))
    for row, (_, parts) in zip(rows, bars, strict=True):
        left = 0.0
        for name, color in colors.items():
            value = parts.get(name, 0.0)
            axes.barh(row, value, left=left, color=color, height=0.72, edgecolor="white", linewidth=0.4)
            if value > 0.055 * longest:
                axes.text(left + value / 2, row, form.format(value), ha="center", va="center", fontsize=9,
                          color="#ffffff" if color in _DARK else "#000000")
            left += value
        axes.text(left + 0.008 * longest, row, f"{form.format(left)} {unit}", va="center", fontweight="bold", fontsize=9)
    axes.set_yticks(rows, [label for label, _ in bars])
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8))


def _legend(figure: Figure, colors: dict[str, str]) -> None:
    figure.legend(handles=[Patch(color=color, label=name) for name, color in colors.items()], loc="outside upper left",
                  ncols=min(len(colors), 9), handlelength=0.9, handleheight=0.9, columnspacing=1.4, fontsize=9)


def _figure(rows: int, columns: int, height_in: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    # Not pyplot: nothing here needs its windows or its memory of figures.
    figure = Figure(figsize=(_WIDTH_IN, height_in))
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)


PLOTS = {
    "memory_over_time": memory_over_time, "memory_by_component": memory_by_component, "time_by_part": time_by_part,
    "throughput_and_memory": throughput_and_memory}


def names(summaries: list[Summary]) -> list[str]:
    """Of the plots that there are figures for, in the order of `PLOTS`."""
    is_counted = any(summary.first.memory for summary in summaries)
    absent = {"throughput_and_memory": len(summaries) == 1, "memory_over_time": not is_counted, "memory_by_component": not is_counted}
    return [name for name in PLOTS if not absent.get(name)]


def draw(name: str, summaries: list[Summary], png: Path, title: str) -> str:
    """Writes the PNG, under a title; returns the plot as inline SVG, without one."""
    with _style():
        figure = PLOTS[name](summaries)
        text, picture = StringIO(), BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name}):  # ids of their own: several stand on one page
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(picture, dpi=_DPI, facecolor="white")
        picture.seek(0)
        _write_titled(picture, title, png)
    return _inline(text.getvalue(), name)


def _write_titled(picture: BytesIO, title: str, png: Path) -> None:
    pixels = imread(picture)
    plot_in = pixels.shape[0] / _DPI
    figure = Figure(figsize=(_WIDTH_IN, plot_in + _TITLE_IN), facecolor="white", layout="none")
    axes = figure.add_axes((0, 0, 1, plot_in / (plot_in + _TITLE_IN)))
    axes.imshow(pixels, aspect="auto", interpolation="none")
    axes.set_axis_off()
    figure.text(0.01, 1 - 0.1 / (plot_in + _TITLE_IN), title, va="top", fontweight="bold", fontsize=12)
    figure.savefig(png, dpi=_DPI)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*" (viewBox="[^"]*") width="[^"]*"',
                 lambda match: match[1] or f"{match[2]} {match[3]}", svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "var(--font)").replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    svg = svg.replace('xlink:href="#', f'xlink:href="#{name}-')
    for color, variable in _THEMED.items():
        svg = svg.replace(color, variable)
    return svg


def join(pngs: list[Path], out: Path) -> None:
    """One picture of all, one below the other."""
    pictures = [imread(png) for png in pngs]
    height = sum(picture.shape[0] for picture in pictures) / pictures[0].shape[1]
    figure = Figure(figsize=(_WIDTH_IN, _WIDTH_IN * height), facecolor="white")
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=[picture.shape[0] for picture in pictures],
                             gridspec_kw={"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": 0}).flat
    for axes, picture in zip(panels, pictures, strict=True):
        axes.imshow(picture, aspect="auto", interpolation="none")
        axes.set_axis_off()
    figure.savefig(out, dpi=_DPI)
