"""The whole of `bone-ds profile`: turns, figures, table, rows, plots and page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bone_ds import __version__, launch
from bone_ds import plan as plans
from bone_ds.config import dump_yaml
from bone_ds.errors import USER_ERROR, BoneError, CheckpointError
from bone_ds.plan import Plan
from bone_ds.profile import page, plots, summary, table, turns
from bone_ds.profile.summary import Summary
from bone_ds.profile.turns import Stopped
from bone_ds.profile.variants import Variant
from bone_ds.provenance import provenance

_PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_FAILED = 1


@dataclass(frozen=True)
class Request:
    variants: list[Variant]
    reference: str
    """The name of the variant that ratios refer to."""
    world_size: int
    steps: int
    """Timed ones of a turn."""
    turns: int
    out: Path
    """A directory to be made."""


def run(request: Request, json_path: Path | None, csv_path: Path | None, say: Callable[[str], None]) -> int:
    """Measures and writes it all; returns 0, or 1 where a variant failed, or the code of a worker that refused its config.

    `out` then holds report.html, the plots as PNG, rows.json, rows.csv, configs/ and turns/; of a refused config nothing. Raises
    BoneError for what the plan refuses.
    """
    # First: what the plan refuses is known before minutes are spent.
    device = "cuda" if launch.count_gpus() else "cpu"
    predicted = {variant.name: _plan(variant, request, device, say) for variant in request.variants}
    try:
        results = turns.measure(request.variants, request.world_size, request.steps, request.turns, request.out, say)
    except Stopped as stopped:
        if stopped.code == USER_ERROR:
            shutil.rmtree(request.out)
        else:
            say(f"stopped; the turns that are over lie in {request.out / 'turns'}")
        return stopped.code
    failed = [result for result in results if result.failure]
    summaries = [Summary(result, predicted[result.variant.name]) for result in results if not result.failure]
    reference = next((summary for summary in summaries if summary.name == request.reference), summaries[0] if summaries else None)
    say("\n" + table.table(summaries, failed, reference))
    if reference is None:
        return _FAILED
    origin = {"bone_ds": __version__} | provenance(*_PACKAGES) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": reference.first.device, "ranks": request.world_size,
        "turns": request.turns, "timed steps a turn": request.steps}
    rows = summary.rows(summaries, reference)
    for path in filter(None, (request.out / "rows.json", json_path)):
        path.write_text(summary.as_json(rows, origin), encoding="utf-8")
    for path in filter(None, (request.out / "rows.csv", csv_path)):
        path.write_text(summary.as_csv(rows, origin), encoding="utf-8")
    drawn = _draw(summaries, request.out)
    configs = {result.variant.name: dump_yaml(result.variant.config) for result in results}
    (request.out / "report.html").write_text(page.page(summaries, failed, reference, drawn, configs, origin), encoding="utf-8")
    say(f"\n{request.out / 'report.html'}")
    return _FAILED if failed else 0


def _plan(variant: Variant, request: Request, device: str, say: Callable[[str], None]) -> Plan | None:
    """None where the model can be measured alone: its sizes aren't known before it is read, or fake tensors don't carry it."""
    try:
        return plans.plan(variant.config, request.world_size, device)
    except CheckpointError as error:
        say(f"{variant.name}: no prediction: {error}")
    except BoneError as error:
        raise type(error)(f"{variant.name}: {error}" if len(request.variants) > 1 else str(error)) from None
    except Exception as error:
        say(f"{variant.name}: no prediction: {type(error).__name__}: {error}")
    return None


def _draw(summaries: list[Summary], out: Path) -> dict[str, str]:
    """SVG by the plots' names; a PNG of each beside the page, and one of all."""
    names = plots.names(summaries)
    drawn = {name: plots.draw(name, summaries, out / f"{name}.png", page.CAPTIONS[name][0]) for name in names}
    plots.join([out / f"{name}.png" for name in names], out / "overview.png")
    return drawn
