"""What was found at a path, as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_PLAIN = ("step", "steps", "rank", "r", "groups", "revision")
"""Numbers that are written without separators."""
_WIDEST = 80
"""Characters of a dictionary that stands on one line; a longer one takes a line for each of its pairs."""


@dataclass(frozen=True)
class Inspection:
    """What lies at a path. A single file that is damaged has none: it is an error."""

    path: str
    what: str
    facts: dict[str, Any]
    """Numbers, texts, lists and dictionaries of them; None is what is not known or does not apply."""
    problems: tuple[str, ...] = ()
    """What is missing or damaged in a directory of several files."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"whole": not self.problems}

    def as_text(self) -> str:
        verdict = "not whole" if self.problems else "whole"
        known = {_label(name): _text(name, value) for name, value in self.facts.items() if _is_known(value)}
        width = max(map(len, known))
        lines = [f"  {label:<{width}}  {line}" if number == 0 else f"  {'':<{width}}  {line}"
                 for label, text in known.items() for number, line in enumerate(text)]
        return "\n".join([f"{self.path}: {self.what}, {verdict}", *lines, *(f"  ! {problem}" for problem in self.problems)])


def _is_known(value: Any) -> bool:
    return any(map(_is_known, value.values())) if isinstance(value, dict) else value not in (None, [])


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _text(name: str, value: Any) -> list[str]:
    """One line, or one for each dictionary of a list and each pair of a long dictionary."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [", ".join(_pairs(one)) for one in value]
    if isinstance(value, dict):
        pairs = list(_pairs(value))
        line = ", ".join(pairs)
        return [line] if len(line) <= _WIDEST else pairs
    if name == "layers" and isinstance(value, list):
        return ["[{}, {})".format(*value)]
    if isinstance(value, list):
        return [", ".join(map(str, value))]
    return [_number(name, value)]


def _pairs(value: dict[str, Any]) -> Iterator[str]:
    for name, one in value.items():
        if one is not None:
            yield f"{_label(name)} {', '.join(_text(name, one))}"


def _number(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes"):
        return next((f"{value / size:.1f} {unit}" for unit, size in _UNITS if value >= size), f"{value} bytes")
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if name in _PLAIN else f"{value:,}"
