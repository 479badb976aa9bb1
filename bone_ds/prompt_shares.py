"""Prompts dealt over ranks: each rank writes the texts of its share, and the command that started the ranks puts them in order.

Nothing is sent from rank to rank: one that is done early ends, however long the others take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bone_ds.launch import Ranks


def places(lengths: Sequence[int], ranks: Ranks) -> list[int]:
    """Of this rank's prompts among all, given by their numbers of tokens: dealt in turn by length, so that shares are about alike."""
    by_length = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return by_length[ranks.rank::ranks.world_size]


def seed(given: int, ranks: Ranks) -> int:
    """A rank's own: prompts that are equal are drawn apart."""
    return int(np.random.SeedSequence((given, ranks.rank)).generate_state(1, np.uint64)[0])


def write(directory: Path, ranks: Ranks, texts: Mapping[int, str]) -> None:
    """texts: by place."""
    (directory / f"rank-{ranks.rank}.json").write_text(json.dumps(dict(texts)), encoding="utf-8")


def write_error(directory: Path, ranks: Ranks, message: str) -> None:
    (directory / f"rank-{ranks.rank}.error").write_text(message, encoding="utf-8")


def error(directory: Path) -> str | None:
    """Of the first rank that wrote one: what is wrong is mostly wrong on all."""
    written = sorted(directory.glob("rank-*.error"))
    return written[0].read_text(encoding="utf-8") if written else None


def together(directory: Path, count: int) -> list[str]:
    """The texts of all ranks by place, once every rank has written its own."""
    texts = {}
    for path in directory.glob("rank-*.json"):
        texts |= json.loads(path.read_text(encoding="utf-8"))
    assert len(texts) == count, f"{len(texts)} of {count} texts were written"
    return [texts[str(place)] for place in range(count)]
