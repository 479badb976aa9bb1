"""Files that are damaged in every way that a disk, a copy or a hand damages them, and then taken up by what reads them.

Each must be refused for the right reason, passed over with a line that says which and why, or made anew. What is taken must be what would
have been taken undamaged, to the bit: then the damage was harmless, as in padding, and is counted apart.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from rows import Row

from bone_ds.errors import BoneError
from bone_ds.inspection import inspect
from faults import bases, kept
from faults.damages import Damage
from faults.harness import Harness
from faults.subject import Subject, Taken

REFUSED, PASSED_OVER, MADE_ANEW, HARMLESS, SILENT = "refused", "passed over", "made anew", "harmless", "silent"
SHORT = ("checkpoint", "adapter", "llama in shards", "rwkv .pth", "gguf", "token cache")
"""Subjects of the short form, with one damage each of these kinds."""
SHORT_KINDS = ("truncated", "flipped", "empty", "swapped")
LEAST = 200


def run(harness: Harness) -> list[Row]:
    subjects = [subject for subject in (*kept.subjects(), *bases.subjects()) if not harness.quick or subject.name in SHORT]
    for subject in subjects:
        whole = harness.work / "whole" / subject.name
        whole.mkdir(parents=True)
        subject.write(whole)
        undamaged = subject.use(_copied(whole, harness.work / "tried"))
        assert undamaged.digest == subject.use(_copied(whole, harness.work / "tried")).digest, f"{subject.name}: not alike by itself"
        for damage in _chosen(subject, harness):
            name = f"{subject.name}: {damage.name}"
            harness.attempt(name, partial(_tried, harness, name, subject, damage, whole, undamaged))
    return _figures(harness)


def _chosen(subject: Subject, harness: Harness) -> list[Damage]:
    if not harness.quick:
        return subject.damages()
    by_kind = {}
    for damage in subject.damages():
        kind = next((kind for kind in SHORT_KINDS if kind in damage.name), None)
        if kind:
            by_kind.setdefault(kind, damage)
    return list(by_kind.values())


def _tried(harness: Harness, name: str, subject: Subject, damage: Damage, whole: Path, undamaged: Taken) -> dict:
    directory = _copied(whole, harness.work / "tried")
    draw = harness.draw(name)
    drawn = damage.do(directory, draw)
    outcome, said = _outcome(subject, directory, undamaged)
    _look_at(subject, directory)
    said = said.replace(str(directory), "")
    right = damage.may_change_nothing if outcome == HARMLESS else outcome == MADE_ANEW or re.search(damage.says, said) is not None
    return {"ok": outcome != SILENT and right and said.count("\n") < 2, "subject": subject.name, "drawn": drawn, "outcome": outcome,
            "said": said[:300]}


def _outcome(subject: Subject, directory: Path, undamaged: Taken) -> tuple[str, str]:
    """And what was said."""
    with _Lines() as lines:
        try:
            taken = subject.use(directory)
        except BoneError as error:
            return REFUSED, str(error)
    said = "\n".join(lines.said)
    if taken.made_anew and taken.digest == undamaged.digest:
        return MADE_ANEW, said
    if said and taken.digest in undamaged.instead:
        return PASSED_OVER, said
    return (HARMLESS if taken.digest == undamaged.digest else SILENT), said


def _look_at(subject: Subject, directory: Path) -> None:
    """`inspect` reads headers alone, so it may find nothing; it must end in a report or a BoneError."""
    for path in subject.inspected(directory):
        try:
            inspect(path).as_text()
        except BoneError:
            pass


def _copied(whole: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(whole, to)


class _Lines(logging.Handler):
    """The warnings of the project while it is active."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> _Lines:
        logging.getLogger("bone_ds").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("bone_ds").removeHandler(self)


def _figures(harness: Harness) -> list[Row]:
    rows = harness.results.measured.values()
    counts = Counter(row.get("outcome", "error") for row in rows)
    with_effect = len(rows) - counts[HARMLESS]
    subjects = f"of {len({row.get('subject') for row in rows})} kinds"
    return [
        Row("damaged files and directories", len(rows), subjects, at_least=LEAST),
        *(Row(f"of them {outcome}", counts[outcome], "files") for outcome in (REFUSED, PASSED_OVER, MADE_ANEW)),
        Row("harmless: equal to the bit", counts[HARMLESS], "files"),
        Row("with an effect, noticed for the right reason", sum(row["ok"] for row in rows) - counts[HARMLESS], f"of {with_effect}",
            at_least=with_effect),
        Row("taken silently", counts[SILENT], "files", at_most=0)]
