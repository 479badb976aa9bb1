"""Tokenised samples, end to end in flat arrays, and what became of the rows that they are made of."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

_SAMPLES_AT_ONCE = 4096


@dataclass(frozen=True)
class Report:
    """What became of the rows (a document of a corpus is one): rows = kept - pieces + split + dropped + label_less."""

    rows: int
    kept: int
    """Samples: rows, or pieces of them."""
    truncated: int
    """Kept, but cut to max_length tokens."""
    dropped: int
    """Longer than max_length under data.overlong: drop."""
    label_less: int
    """Left out because no token of theirs would be learnt: an empty completion or document, or a prompt that fills max_length."""
    tokens: int
    label_tokens: int
    longest: int
    """Tokens of the longest row before it was cut, dropped ones included."""
    split: int = 0
    """Longer than max_length under data.overlong: split."""
    pieces: int = 0
    """The samples that the split rows were cut into, all together."""

    @classmethod
    def of_all(cls, reports: Sequence[Report]) -> Report:
        sums = {field.name: sum(getattr(report, field.name) for report in reports) for field in fields(cls)}
        return cls(**sums | {"longest": max(report.longest for report in reports)})

    def __str__(self) -> str:
        parts = [f"{self.kept:,} samples of {self.rows:,} rows", f"{self.tokens:,} tokens", f"{self.label_tokens:,} bear loss",
                 f"longest {self.longest:,}"]
        parts += [f"{count:,} {what}" for count, what in (
            (self.truncated, "truncated"), (self.split, f"split into {self.pieces:,}"), (self.dropped, "dropped as too long"),
            (self.label_less, "left out without a token to learn")) if count]
        return ", ".join(parts)


@dataclass(frozen=True)
class Part:
    """The samples of one source; they follow those of the parts before it."""

    name: str
    """As the config names it; several files that are read as one have several names."""
    count: int
    """Samples."""
    report: Report
    weight: float | None = None
    """In data.mixture; None: every sample once an epoch."""
    commits: tuple[str, ...] = ()
    """Of the hub, one for each data set that came from there."""
    cached: Path | None = None
    """Where it is kept for the next start, if it is."""
    was_cached: bool = False
    """Whether it was there already, and nothing was tokenised."""


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples. A token that bears loss is predicted by the one before it; the first of a sample never does."""

    tokens: np.ndarray
    """(sum of lengths,) int32"""
    offsets: np.ndarray
    """(n + 1,) int64; sample i is tokens[offsets[i]:offsets[i + 1]]."""
    learnt: np.ndarray
    """(sum of lengths,) bool: which tokens bear loss."""
    eos_token_id: int
    report: Report
    parts: tuple[Part, ...] = ()
    """Where they come from, in order; of samples that a config names."""
    rows: np.ndarray | None = None
    """(n,) int64: which row of its source, from 1, a sample was made of, or is a piece of; None where nobody knows."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """(length,) int32"""
        return self.tokens[self.offsets[index]:self.offsets[index + 1]]

    def learnt_of(self, index: int) -> np.ndarray:
        """(length,) bool"""
        return self.learnt[self.offsets[index]:self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64"""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """(n,) int64, loss-bearing tokens."""
        counts = np.empty(len(self), np.int64)
        for start, end, learnt in self.slices():  # reduceat widens all that it is given to int64
            counts[start:end] = np.add.reduceat(learnt, self.offsets[start:end] - self.offsets[start], dtype=np.int64)
        return counts

    def slices(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """First sample and last, excluded, of some thousand at a time, and `learnt` of them all."""
        for start in range(0, len(self), _SAMPLES_AT_ONCE):
            end = min(start + _SAMPLES_AT_ONCE, len(self))
            yield start, end, self.learnt[self.offsets[start]:self.offsets[end]]

    def place(self, index: int) -> tuple[str, int]:
        """The source of a sample and its row there, from 1: of several files that are read as one, counted through them."""
        ends = np.cumsum([part.count for part in self.parts])
        return self.parts[np.searchsorted(ends, index, side="right")].name, int(self.rows[index])

    def label_count(self, index: int) -> int:
        return int(self.learnt_of(index).sum())

    def fingerprint(self) -> str:
        """Equal for equal samples in equal order, mixed alike; a resumed run compares it."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.offsets, self.learnt):
            digest.update(np.ascontiguousarray(values))
        for part in self.parts:
            if part.weight is not None:
                digest.update(f"{part.count} {part.weight}\n".encode())
        return digest.hexdigest()[:16]


def joined(samples: Sequence[Samples]) -> Samples:
    """The samples of several sources, one source after the other."""
    if len(samples) == 1:
        return samples[0]
    starts = np.cumsum([0, *(len(one.tokens) for one in samples[:-1])])
    offsets = np.concatenate([[0], *(one.offsets[1:] + start for one, start in zip(samples, starts, strict=True))])
    tokens, learnt = (np.concatenate([getattr(one, name) for one in samples]) for name in ("tokens", "learnt"))
    return Samples(tokens, offsets, learnt, samples[0].eos_token_id, Report.of_all([one.report for one in samples]),
                   tuple(part for one in samples for part in one.parts), np.concatenate([one.rows for one in samples]))


class Store:
    """Samples as they are added, in flat arrays, and the counts of those left out."""

    def __init__(self, max_length: int, overlong: Literal["truncate", "drop", "split"]):
        self.max_length, self.overlong = max_length, overlong
        self.tokens, self.offsets, self.learnt, self.row_of = array("i"), array("q", [0]), bytearray(), array("q")
        self.rows = self.truncated = self.dropped = self.label_less = self.label_tokens = self.longest = self.split = self.pieces = 0

    def add(self, tokens: np.ndarray, learnt: np.ndarray) -> None:
        """One row: tokens (length,) int32, learnt (length,) bool. The first token never bears loss, whatever is said."""
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        overlong = len(tokens) > self.max_length
        if overlong and self.overlong == "drop":
            self.dropped += 1
        elif not learnt[1:self.max_length].any():
            self.label_less += 1
        elif overlong and self.overlong == "split":
            self._split(tokens, learnt)
        else:
            self.truncated += overlong
            self._keep(tokens[:self.max_length], learnt[:self.max_length])

    def _split(self, tokens: np.ndarray, learnt: np.ndarray) -> None:
        """Each piece starts with the last token of the piece before it, not learnt again: every token is learnt once.

        Nothing else carries over: to the model a piece is a document of its own.
        """
        self.split += 1
        for start in range(0, len(tokens) - 1, self.max_length - 1):
            self.pieces += 1
            self._keep(tokens[start:start + self.max_length], learnt[start:start + self.max_length])

    def _keep(self, tokens: np.ndarray, learnt: np.ndarray) -> None:
        learnt = learnt.copy()
        learnt[0] = False
        self.label_tokens += int(learnt.sum())
        self.tokens.frombytes(tokens.tobytes())
        self.offsets.append(len(self.tokens))
        self.row_of.append(self.rows)
        self.learnt += learnt.tobytes()

    def samples(self, eos: int) -> Samples:
        """The arrays without a copy: nothing can be added after it."""
        report = Report(self.rows, len(self.offsets) - 1, self.truncated, self.dropped, self.label_less, len(self.tokens),
                        self.label_tokens, self.longest, self.split, self.pieces)
        tokens, learnt = np.frombuffer(self.tokens, np.int32), np.frombuffer(self.learnt, bool)
        return Samples(tokens, np.frombuffer(self.offsets, np.int64), learnt, eos, report, rows=np.frombuffer(self.row_of, np.int64))
