"""The short form of the harness's damaged files: `python -m tests.faults damage` tries hundreds."""

import json

from faults import bases, damage, kept
from faults.harness import short_form


def test_damaged_files_are_refused_passed_over_or_made_anew(tmp_path):
    harness = short_form(tmp_path)
    damage.run(harness)
    rows = harness.results.measured
    assert not harness.failed, json.dumps({name: rows[name] for name in harness.failed}, indent=1)
    outcomes = {row["outcome"] for row in rows.values()}
    assert len(rows) >= 20 and {damage.REFUSED, damage.PASSED_OVER, damage.MADE_ANEW} <= outcomes
    assert sum(row["outcome"] == damage.HARMLESS for row in rows.values()) <= 2


def test_every_subject_has_a_name_of_its_own_and_the_short_form_knows_them():
    names = [subject.name for subject in (*kept.subjects(), *bases.subjects())]
    assert len(names) == len(set(names)) and set(damage.SHORT) <= set(names)


def test_what_is_taken_though_it_differs_is_silent(tmp_path):
    """The harness itself: a reader that believes everything is found out."""

    class Believer(kept.Adapter):
        def use(self, directory):
            return kept.Taken(kept.digest_of((directory / kept.ADAPTER).read_bytes().hex()))

        def inspected(self, directory):
            return []

    subject, whole = Believer(), tmp_path / "whole"
    whole.mkdir()
    (whole / kept.ADAPTER).write_bytes(bytes(500))
    undamaged = subject.use(whole)
    (flipped,) = (one for one in subject.damages() if one.name == f"{kept.ADAPTER} flipped 1")
    row = damage._tried(short_form(tmp_path), "believed", subject, flipped, whole, undamaged)
    assert row["outcome"] == damage.SILENT and not row["ok"]
