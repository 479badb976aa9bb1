"""CRC-32 of each tensor of a base model, taken as it is read, so that what was trained on is known again to the bit.

It is the CRC-32 of zip archives: a .pth says it of its own contents, and the same number is compared with that.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from bone_ds import tensor_file
from bone_ds.errors import CheckpointError

_DIGITS = 8
_STATED = "bone_ds_crc32"


class Checksums:
    """Of one reading of a base on one rank. The tensors count as they are stored, whatever file and shard they lie in."""

    def __init__(self, expected: str | None = None, refusal: str = "", rank: int = 0, ranks: int = 1):
        """expected: what `record` has made of an earlier reading, if there is one. refusal: what an error begins with.

        rank, ranks: of this host, whose ranks share the work; each takes every ranks-th tensor.
        """
        self.values: dict[str, str] = {}
        """Hexadecimal digits by name, of this rank's share."""
        self._expected, self._refusal, self._rank, self._ranks = expected, refusal, rank, ranks
        self._asked = 0
        self._thread = ThreadPoolExecutor(1, "checksums")  # starts with the first thing to do

    @contextmanager
    def taking(self, name: str, tensor: Tensor) -> Iterator[Future[str] | None]:
        """The CRC-32 of a CPU tensor, computed while the block runs; None where it is another rank's to take.

        Raises CheckpointError at the block's end where the name has been taken of other bytes before.
        """
        if not self._is_mine():
            yield None
            return
        taken = self._thread.submit(crc32, tensor)
        yield taken
        self._note(name, taken.result())

    def note(self, name: str, content: Callable[[], bytes]) -> None:
        """Something else that the base's outputs depend on."""
        if self._is_mine():
            self._note(name, f"{zlib.crc32(content()):0{_DIGITS}x}")

    def share(self, items: Sequence) -> Sequence:
        """Those of what lies on this host that this rank checks."""
        return items[self._rank::self._ranks]

    def finish(self) -> None:
        """Raises CheckpointError where the base is not the expected one, now that all of it has been read."""
        if name := changed(self._expected, record(self.values), self.values):
            raise CheckpointError(f"{self._refusal}: {name} holds other bytes; it is damaged, or another: give the one that was trained on")

    def _is_mine(self) -> bool:
        self._asked += 1
        return (self._asked - 1) % self._ranks == self._rank

    def _note(self, name: str, value: str) -> None:
        if self.values.setdefault(name, value) != value:
            raise CheckpointError(f"{self._refusal or 'the base'}: its two copies of {name} differ; it is damaged")


def crc32(tensor: Tensor) -> str:
    """Of the elements of a CPU tensor in order."""
    return f"{zlib.crc32(tensor_file.as_bytes(tensor)):0{_DIGITS}x}"


def stating(tensors: Mapping[str, Tensor], notes: Mapping[str, bytes] | None = None) -> dict[str, str]:
    """Metadata of a safetensors file, in which it states the CRC-32 of each of its tensors, and of what belongs to them."""
    return {_STATED: json.dumps(crc32s(tensors, notes))}


def crc32s(tensors: Mapping[str, Tensor], notes: Mapping[str, bytes] | None = None) -> dict[str, str]:
    return {name: crc32(tensor) for name, tensor in tensors.items()} | {
        name: f"{zlib.crc32(content):0{_DIGITS}x}" for name, content in (notes or {}).items()}


def stated_in(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """By tensor what a file states of itself, which most files don't. Raises CheckpointError."""
    try:
        return dict(json.loads((metadata or {}).get(_STATED, "{}")))
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: is damaged: its {_STATED} is no JSON object") from None


def check_stated(path: Path, stated: Mapping[str, str], name: str, found: str) -> None:
    if stated.get(name, found) != found:
        raise CheckpointError(f"{path}: is damaged: {name} has not the CRC-32 that the file's header states; take another copy, or make it "
                              "again")


def not_stating(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Of other tensors in the place of those that were stated."""
    return {key: value for key, value in (metadata or {}).items() if key != _STATED}


def record(values: Mapping[str, str]) -> str:
    """The CRC-32s end to end, in the order of the names, which the base tells again."""
    return "".join(values[name] for name in sorted(values))


def is_record(given: object) -> bool:
    return isinstance(given, str) and re.fullmatch(f"([0-9a-f]{{{_DIGITS}}})+", given) is not None


def together(shares: Iterable[Mapping[str, str]], place: str) -> dict[str, str]:
    """What the ranks of all hosts have taken, as one. Raises CheckpointError, naming the place, where hosts have read different bytes."""
    found: dict[str, str] = {}
    for share in shares:
        for name, value in share.items():
            if found.setdefault(name, value) != value:
                raise CheckpointError(f"{place}: the hosts hold different bytes of {name}; give every host the same model, undamaged")
    return found


def changed(before: str | None, now: str | None, names: Iterable[str]) -> str | None:
    """The first of the base's names whose bytes have changed between two records; None where none has, or one record is missing."""
    if not before or not now or before == now:
        return None
    if len(before) != len(now):
        return "the set of its tensors"
    parts = ([text[at:at + _DIGITS] for at in range(0, len(text), _DIGITS)] for text in (before, now))
    return next((name for name, *pair in zip(sorted(names), *parts) if pair[0] != pair[1]), "one of its tensors")
