"""Rows of text to a .jsonl file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One row a line; the file appears whole or not at all."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
