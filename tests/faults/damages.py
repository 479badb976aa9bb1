"""Ways in which a file comes to harm, each with what has to be said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

HEAD_BYTES = 200
"""Every second cut, and every third bit, is drawn from the beginning of a file, where its header lies."""


@dataclass(frozen=True)
class Damage:
    name: str
    do: Callable[[Path, Random], str | None]
    """To a directory of undamaged files; returns what was drawn."""
    says: str
    """A pattern of the reason for which it is refused, passed over or made anew."""
    may_change_nothing: bool = False
    """Some of its draws are of bytes that mean nothing."""


def of_file(file: str, cuts: int, flips: int, truncated: str, flipped: str, empty: str | None = None,
            missing: str | None = None) -> list[Damage]:
    """A file cut off and with a bit flipped, so many times, and one each: empty, and missing. The patterns are what must be said."""
    return [*(Damage(f"{file} truncated {number}", partial(truncate, file, number % 2 == 0), truncated) for number in range(cuts)),
            *(Damage(f"{file} flipped {number}", partial(flip, file, number % 3 == 0), flipped, True) for number in range(flips)),
            Damage(f"{file} empty", partial(empty_out, file), empty or truncated),
            Damage(f"{file} missing", partial(remove, file), missing or truncated)]


def truncate(file: str, in_its_head: bool, directory: Path, draw: Random) -> str:
    content = (directory / file).read_bytes()
    size = draw.randrange(1, min(HEAD_BYTES, len(content)) if in_its_head else len(content))
    (directory / file).write_bytes(content[:size])
    return f"to {size} of {len(content)} bytes"


def flip(file: str, in_its_head: bool, directory: Path, draw: Random) -> str:
    content = bytearray((directory / file).read_bytes())
    place, bit = draw.randrange(min(HEAD_BYTES, len(content)) if in_its_head else len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    (directory / file).write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


def flip_within(file: str, content_of: Callable[[Path], bytes], directory: Path, draw: Random) -> str:
    """A bit of a part of the file that its bytes tell."""
    content, part = bytearray((directory / file).read_bytes()), content_of(directory)
    assert content.count(part) == 1
    place, bit = content.index(part) + draw.randrange(len(part)), draw.randrange(8)
    content[place] ^= 1 << bit
    (directory / file).write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


def empty_out(file: str, directory: Path, draw: Random) -> None:
    (directory / file).write_bytes(b"")


def remove(file: str, directory: Path, draw: Random) -> None:
    (directory / file).unlink()


def put_in_place(file: str, by: str, directory: Path, draw: Random) -> str:
    shutil.copyfile(directory / by, directory / file)
    return f"by {by}"


def swap(one: str, other: str, directory: Path, draw: Random) -> str:
    (directory / one).rename(directory / "swapped")
    (directory / other).rename(directory / one)
    (directory / "swapped").rename(directory / other)
    return f"{one} and {other}"


def edit_json(file: str, change: Callable[[dict], object], directory: Path, draw: Random) -> None:
    fields = json.loads((directory / file).read_text(encoding="utf-8"))
    change(fields)
    (directory / file).write_text(json.dumps(fields), encoding="utf-8")


def setting(**fields: object) -> Callable[[dict], object]:
    return lambda given: given.update(fields)


def in_turn(*damages: Callable[[Path, Random], object]) -> Callable[[Path, Random], str]:
    def do(directory: Path, draw: Random) -> str:
        return "; ".join(str(damage(directory, draw)) for damage in damages)

    return do


