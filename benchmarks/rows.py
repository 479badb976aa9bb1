"""What a benchmark leaves: measurements, written as they are taken, and the rows that follow from them.

The file of `--json` holds `provenance`, `settings`, `measured` (raw, by name) and `rows`. A benchmark that is started again goes on from
it where it was begun at a clean commit, no code has changed since, and versions, machine and settings are the same. Another file is
begun beside one that doesn't fit, which is kept under another name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from provenance import is_same_code, provenance

_OF_A_MACHINE = ("machine", "processor", "cores", "python")
"""What times depend on, and results hardly."""


@dataclass(frozen=True)
class Row:
    name: str
    figure: float
    unit: str
    compared_with: str | None = None
    """What the figure is a ratio or difference to."""
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    spread: tuple[float, float] | None = None
    """Least and most of what the figure stands for."""
    published: float | None = None
    """The same figure in the paper."""

    @property
    def target(self) -> str | None:
        bounds = (("at least", self.at_least), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None) or None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return ((self.at_least is None or self.figure >= self.at_least) and (self.at_most is None or self.figure <= self.at_most)
                and (self.below is None or self.figure < self.below))

    def as_json(self) -> dict:
        return {"name": self.name, "figure": _in_json(self.figure), "unit": self.unit, "compared_with": self.compared_with,
                "target": self.target, "met": self.met, "spread": self.spread and tuple(map(_in_json, self.spread)),
                "published": self.published}


def _in_json(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def ratio(name: str, ours: Iterable[float], theirs: Iterable[float], compared_with: str, **more: float | None) -> Row:
    """The median of the ratios of each turn's two figures; their least and most are the spread. more: fields of the Row."""
    ratios = [one / other for one, other in zip(ours, theirs)]  # a turn that is not over has one of the two
    return Row(name, statistics.median(ratios), "ratio", compared_with, spread=(min(ratios), max(ratios)), **more)


class Results:
    """Measurements by name, each taken once: those of an earlier start are kept."""

    def __init__(self, path: Path | None, settings: dict, packages: Iterable[str], fresh: bool, quick: bool = False, timed: bool = True):
        """settings: what else makes measurements comparable, such as sizes. quick: too small for the targets, rows have none.

        timed: whether times are measured; where they are not, another machine may go on. The provenance is that of the first start.
        """
        self.path, self.quick = path, quick
        self.head = json.loads(json.dumps({"provenance": provenance(*packages), "settings": settings | {"quick": quick}}))
        self.measured: dict[str, dict] = {}
        if path is None or not path.exists():
            return
        stored = json.loads(path.read_text())
        if not fresh and self._goes_on(stored, () if timed else _OF_A_MACHINE):
            self.head = {part: stored[part] for part in self.head}
            self.measured = stored["measured"]
        else:
            print(f"{path}: is of another start or state of the code; kept as {_put_aside(path)}", flush=True)

    def _goes_on(self, stored: dict, may_differ: tuple[str, ...]) -> bool:
        then, now = stored.get("provenance", {}), self.head["provenance"]
        compared = now.keys() - {"commit", *may_differ}
        return (stored.get("settings") == self.head["settings"] and all(then.get(name) == now[name] for name in compared)
                and is_same_code(then["commit"]))

    def once(self, name: str, measure: Callable[[], dict]) -> dict:
        if name not in self.measured:
            self.measured[name] = measure()
            print(json.dumps({"measured": name} | self.measured[name]), flush=True)
            self.write([])
        return self.measured[name]

    def write(self, rows: Iterable[Row]) -> list[Row]:
        """The rows as they are written."""
        rows = [replace(row, at_least=None, at_most=None, below=None) if self.quick else row for row in rows]
        if self.path:
            aside = self.path.with_name(self.path.name + ".partial")
            aside.write_text(json.dumps(self.head | {"measured": self.measured, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")
            os.replace(aside, self.path)
        return rows

    def finish(self, rows: list[Row]) -> None:
        """Writes and prints the rows."""
        rows = self.write(rows)
        width = max(len(row.name) for row in rows) + 2
        print(f"\n{'':<{width}}{'figure':>10}  {'unit':<16}{'least':>11}{'most':>11}  compared with, target")
        for row in rows:
            least, most = (f"{value:.4g}" for value in row.spread) if row.spread else ("", "")
            verdict = "" if row.target is None else f"{row.target}: {'met' if row.met else 'MISSED'}"
            published = "" if row.published is None else f"the paper {row.published:.3g}"
            notes = ", ".join(note for note in (row.compared_with, published, verdict) if note)
            print(f"{row.name:<{width}}{row.figure:>10.5g}  {row.unit:<16}{least:>11}{most:>11}  {notes}".rstrip())


def _put_aside(path: Path) -> Path:
    aside = next(name for number in itertools.count(1) if not (name := path.with_name(f"{path.name}.old{number}")).exists())
    return path.rename(aside)


def parser(description: str, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has: --quick, --json, --fresh."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--json", type=Path, metavar="FILE", help="write measurements and rows, and go on from them when started again")
    options.add_argument("--fresh", action="store_true", help="measure again what FILE holds already")
    return options
