"""The short forms of the fault harness's parts, what they judge by, and the frame that they are tried in."""

import json
import math
import shutil

import pytest
from faults import chain, kills
from faults.equality import differences
from faults.harness import Harness, short_form
from rows import Results

from bone_ds.run_directory import RunDirectory


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


STEP = {"event": "step", "loss": 1.25, "grad_norm": 2.0, "learning_rate": 0.1, "epoch": 0, "tokens": 9, "label_tokens": 3}
RUN = [STEP | {"step": 1}, STEP | {"step": 2}, {"event": "checkpoint", "step": 2, "held_out_loss": None}, STEP | {"step": 3},
       {"event": "eval", "step": 3, "loss": 1.0, "label_tokens": 5}, STEP | {"step": 4},
       {"event": "checkpoint", "step": 4, "held_out_loss": None}]


def write_run(path, recorded):
    for name in ("adapter.safetensors", "checkpoints/step-00000004/adapter.safetensors", "checkpoints/step-00000004/state.safetensors"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode())
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in recorded))
    return path


@pytest.fixture
def whole(tmp_path):
    return write_run(tmp_path / "whole", RUN)


@pytest.mark.parametrize("recorded", [
    RUN, RUN[:3] + [STEP | {"step": 3, "loss": 9.0}] + RUN[3:], RUN[:2] + RUN[3:],
    RUN[:2] + [{"event": "eval", "step": 2, "loss": 7.0, "label_tokens": 5}] + RUN[2:]],
    ids=["the same", "a step done again", "a checkpoint not recorded", "a held-out loss more"])
def test_what_a_kill_may_leave_is_no_difference(whole, tmp_path, recorded):
    assert differences(write_run(tmp_path / "run", recorded), whole) == []


@pytest.mark.parametrize("recorded, said", [
    (RUN[:-2], "steps [4] are"), (RUN[:5] + [STEP | {"step": 4, "loss": math.nextafter(1.25, 2)}] + RUN[6:], "step 4: "),
    (RUN[:5] + [STEP | {"step": 4, "tokens": 8}] + RUN[6:], "step 4: "), (RUN[:4] + RUN[5:], "eval 3: None"),
    (RUN[:-1] + [RUN[-1] | {"held_out_loss": 1.0}], "checkpoint 4: ")])
def test_events_that_differ_are_found(whole, tmp_path, recorded, said):
    (found,) = differences(write_run(tmp_path / "run", recorded), whole)
    assert found.startswith(said)


@pytest.mark.parametrize("name", ["adapter.safetensors", "checkpoints/step-00000004/state.safetensors"])
def test_files_that_differ_are_found(whole, tmp_path, name):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(b"other")
    (run / "checkpoints/step-00000005.partial").mkdir()
    assert differences(run, whole) == [f"{name} differs", "checkpoints/step-00000005.partial is left"]
    (run / "checkpoints/step-00000004").rename(run / "checkpoints/step-00000003")
    assert "checkpoints ['step-00000003'], not ['step-00000004']" in differences(run, whole)


@pytest.mark.parametrize("steps, saved, beside, published, is_lost", [
    (3, [2], False, [2], False), (4, [2], False, [2], False), (5, [2], False, [2], True), (5, [2], True, [2], False),
    (7, [2], True, [2], True), (4, [2, 4], False, [2], True), (1, [], False, [], False), (3, [], False, [], True)])
def test_more_than_the_steps_since_the_last_checkpoint_is_lost(tmp_path, steps, saved, beside, published, is_lost):
    recorded = [STEP | {"step": step} for step in range(1, steps + 1)] + [{"event": "checkpoint", "step": step} for step in saved]
    run = RunDirectory(write_run(tmp_path / "run", recorded))
    setting = chain.Setting("llama", 2, "fp32", packing=False, async_save=beside, keep_best=False)
    assert bool(chain.lost(run, setting, published)) is is_lost


KILLED = "bone-ds: rank 1 was killed by signal 9 (SIGKILL), the others were ended"
HINT = "SIGKILL is what the system sends when memory runs out: lower this"


@pytest.mark.parametrize("ranks, code, errors, is_wrong", [
    ([], -9, [], False), ([], -9, ["a frame"], True), ([], 1, [], True), ([1], 137, [KILLED, HINT], False),
    ([0, 1], 137, [KILLED, HINT], False), ([0], 137, [KILLED, HINT], True), ([1], 1, [KILLED, HINT], True),
    ([1], 137, ["a frame", KILLED, HINT], True), ([1], 137, [], True)])
def test_what_is_said_of_a_kill_is_judged(ranks, code, errors, is_wrong):
    assert bool(chain.says_wrongly(ranks, code, errors)) is is_wrong
