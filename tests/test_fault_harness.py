"""The short forms of the fault harness's parts, and the frame that they are tried in."""

import json
import math

from faults import kills
from faults.harness import Harness, short_form
from rows import Results


def test_a_run_that_is_killed_three_times_is_the_run_that_never_was(tmp_path):
    harness = short_form(tmp_path)
    kills.run(harness)
    (row,) = harness.results.measured.values()
    assert row["ok"], json.dumps(row, indent=1)
    assert [kill["victim"] for kill in row["kills"]] == ["launcher", "one rank", "both ranks"]
    assert row["kills"][0]["saving"] and row["kills"][2]["saving"] and row["steps_compared"] == 12


def fault(ok=True, raises=None):
    def tried():
        if raises:
            raise raises
        return {"ok": ok}

    return tried


def test_what_fails_or_raises_is_a_row_that_is_not_ok(tmp_path):
    harness = short_form(tmp_path)
    assert harness.attempt("a", fault())["ok"] and not harness.attempt("b", fault(ok=False))["ok"]
    row = harness.attempt("c", fault(raises=AssertionError("left")))
    assert not row["ok"] and row["why"] == "AssertionError: left" and harness.failed == ["b", "c"]


def test_what_has_a_row_is_not_tried_again_nor_anything_when_the_time_is_up(tmp_path):
    harness = short_form(tmp_path)
    harness.attempt("a", fault())
    late = Harness(harness.results, tmp_path, seed=0, count=None, quick=True, deadline=-math.inf)
    assert late.attempt("a", fault(raises=AssertionError("tried again")))["ok"] and late.attempt("b", fault()) is None


def test_draws_are_of_seed_and_name(tmp_path):
    def drawn(seed, name):
        return Harness(Results(None, {}, (), fresh=False), tmp_path, seed, None, True, math.inf).draw(name).random()

    assert drawn(0, "a") == drawn(0, "a") and len({drawn(0, "a"), drawn(0, "b"), drawn(1, "a")}) == 3


def test_a_hundred_kills_are_of_every_stage_dtype_and_architecture(tmp_path):
    harness = short_form(tmp_path)
    chains = [(kills._setting(number, harness.draw(str(number))), kills._plan(number, harness.draw(str(number)))) for number in range(16)]
    assert sum(len(plan) for _, plan in chains) == kills.COUNT == 100
    assert len({(setting.architecture, setting.stage, setting.dtype) for setting, _ in chains}) == 16
    assert {(setting.architecture, setting.packing) for setting, _ in chains} == {
        (architecture, packing) for architecture in ("llama", "rwkv") for packing in (False, True)}
    planned = [kill for _, plan in chains for kill in plan]
    assert sum(moment == "saving" for _, moment in planned) >= 36
    assert len(set(planned)) == 9  # every victim at every moment
