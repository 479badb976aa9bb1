"""Tokenised corpora in binidx form: corpus.bin holds the tokens, corpus.idx says where each document lies.

It is Megatron-LM's indexed dataset (megatron/core/datasets/indexed_dataset.py), as RWKV-LM's src/binidx.py and json2binidx write
it. The .bin is tokens end to end. The .idx, little-endian and without gaps:

    9 bytes "MMIDIDX\\0\\0" | uint64 version, 1 | uint8 code of the dtype | uint64 S sequences | uint64 B bounds
    S x int32 length of each sequence in tokens | S x int64 its first byte in the .bin | B x int64 bounds of the documents

Document d is the sequences bounds[d] to bounds[d + 1], so B is one more than the documents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bone_ds.data.rows import check_file
from bone_ds.errors import DataError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one corpus. Its tokens are mapped into memory and read when they are looked at."""

    path: Path
    """The .bin"""
    tokens: np.ndarray
    """Of the file's dtype; all sequences."""
    starts: np.ndarray
    """(S,) int64, the first token of each sequence."""
    lengths: np.ndarray
    """(S,) int64"""
    bounds: np.ndarray
    """(documents + 1,) int64, in sequences."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """(length,) of the file's dtype, the sequences of the document joined; may be empty."""
        members = range(self.bounds[index], self.bounds[index + 1])
        parts = [self.tokens[self.starts[member]:self.starts[member] + self.lengths[member]] for member in members]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self.tokens[:0]

    def checked(self, index: int, vocabulary_size: int) -> np.ndarray:
        """(length,) int32. Raises DataError, naming the document (from 1), for a token that the tokenizer has not."""
        document = self[index]
        if len(document) and not 0 <= (wrong := _outermost(document)) < vocabulary_size:
            raise DataError(f"{self.path}: document {index + 1} holds token {wrong}, the tokenizer has 0 to {vocabulary_size - 1}; "
                            "was it made with another tokenizer?")
        return document.astype(np.int32)


def _outermost(document: np.ndarray) -> int:
    """A token below 0 if there is one, else the largest."""
    lowest = int(document.min())
    return lowest if lowest < 0 else int(document.max())


def open_documents(path: Path, limit: int | None = None) -> Documents:
    """The first `limit` documents of a corpus, named by its .bin or its .idx; the other one lies beside it.

    Where the index has no bounds (none at all, or a lone 0, as some converters leave it) each sequence is a document. Raises
    DataError, naming the file, for a missing or broken one, and where the two don't belong together.
    """
    bin_path, idx_path = path.with_suffix(".bin"), path.with_suffix(".idx")
    check_file(path)
    for partner in (bin_path, idx_path):
        if not partner.exists():
            raise DataError(f"{partner}: there is no such file beside {path.name}; a binidx corpus is a .bin and its .idx")
        check_file(partner)
    dtype, lengths, first_bytes, bounds = _read_index(idx_path)
    _check_sequences(bin_path, idx_path, lengths * dtype.itemsize, first_bytes)
    if len(bounds) < 2 and not bounds.any():
        bounds = np.arange(len(lengths) + 1)
    _check_bounds(idx_path, bounds, len(lengths))
    if limit is not None:
        bounds = bounds[:limit + 1]
    tokens = np.asarray(np.memmap(bin_path, dtype, mode="r"))  # still mapped, but cheaper to slice
    starts = first_bytes // dtype.itemsize  # exact: the sequences fill the file, so each starts where a token does
    return Documents(bin_path, tokens, starts, lengths, bounds)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The tokens' dtype; each sequence's length in tokens and first byte, both (S,) int64; the bounds of the documents."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise DataError(f"{path}: is no binidx index, it starts with {header[:len(_MAGIC)]!r} and not with {_MAGIC!r}")
    if len(header) < _HEADER.size:
        raise DataError(f"{path}: is cut short, it holds {size_bytes} bytes and its header alone has {_HEADER.size}")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{path}: is of version {version} of the format; only version 1 is known")
    if code not in _INTEGERS:
        what = "floating-point numbers, which are no tokens" if code in _FLOATS else f"the unknown dtype code {code}"
        raise DataError(f"{path}: names {what}; known are the integers, codes {', '.join(map(str, _INTEGERS))}")
    if not sequences:
        raise DataError(f"{path}: holds no sequence, give a corpus with at least one")
    expected_bytes = _HEADER.size + sequences * (4 + 8) + bounds * 8
    if size_bytes != expected_bytes:
        what = "is cut short" if size_bytes < expected_bytes else "does not match its own header"
        raise DataError(f"{path}: {what}, it holds {size_bytes} bytes; {sequences} sequences and {bounds} bounds take {expected_bytes}")
    content = np.memmap(path, np.uint8, mode="r", offset=_HEADER.size)
    lengths, first_bytes, bounds = np.split(content, [sequences * 4, sequences * (4 + 8)])
    return (np.dtype(_INTEGERS[code]), lengths.view("<i4").astype(np.int64), first_bytes.view("<i8").astype(np.int64),
            bounds.view("<i8").astype(np.int64))


def _check_sequences(bin_path: Path, idx_path: Path, size_bytes: np.ndarray, first_bytes: np.ndarray) -> None:
    """Raises DataError unless the sequences fill the .bin without gap or overlap, in any order."""
    held_bytes = bin_path.stat().st_size
    if (size_bytes < 0).any():
        raise DataError(f"{idx_path}: sequence {_first(size_bytes < 0)} has a negative length; make the corpus anew")
    named_bytes = int(size_bytes.sum())
    if named_bytes != held_bytes:
        what = "is cut short or belongs" if held_bytes < named_bytes else "belongs"
        raise DataError(f"{bin_path}: holds {held_bytes} bytes, {idx_path.name} names {named_bytes}; it {what} to another index")
    outside = (first_bytes < 0) | (first_bytes > held_bytes - size_bytes)
    if outside.any():
        sequence = _first(outside)
        raise DataError(f"{idx_path}: sequence {sequence} starts at byte {first_bytes[sequence - 1]} and is {size_bytes[sequence - 1]} "
                        f"bytes long, which is outside of {bin_path.name} ({held_bytes} bytes)")
    order = np.lexsort((size_bytes, first_bytes))
    ends = first_bytes[order] + size_bytes[order]
    overlapping = ends[:-1] > first_bytes[order][1:]
    if overlapping.any():
        one, other = order[_first(overlapping) - 1:][:2] + 1
        raise DataError(f"{idx_path}: the sequences {one} and {other} overlap in {bin_path.name}; make the corpus anew")


def _check_bounds(path: Path, bounds: np.ndarray, sequences: int) -> None:
    if bounds[0] != 0 or bounds[-1] != sequences:
        raise DataError(f"{path}: its documents go from sequence {bounds[0]} to {bounds[-1]}, its sequences from 0 to {sequences}; "
                        "make the corpus anew")
    falling = np.diff(bounds) < 0
    if falling.any():
        raise DataError(f"{path}: document {_first(falling)} ends before it starts; make the corpus anew")


def _first(flags: np.ndarray) -> int:
    """The place of the first true one, from 1."""
    return int(flags.argmax()) + 1
