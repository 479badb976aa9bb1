"""What the benchmarks share: rows and their resuming, the choice of a rate, random models, the Trainer's samples."""

import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bone_operator
import groupings
import random_models
import rows
import table7
from rows import Results, Row, ratio
from training_run import Run

from bone_ds import arch, provenance
from bone_ds.config import DataConfig, ModelConfig
from bone_ds.data import load_samples
from bone_ds.engine import placement

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.mark.parametrize("bound, met", [
    ({"at_least": 2.0}, True), ({"at_least": 2.1}, False), ({"at_most": 2.0}, True), ({"at_most": 1.9}, False), ({"below": 2.0}, False),
    ({"at_least": 1.0, "at_most": 1.5}, False), ({}, None)])
def test_a_row_says_whether_its_target_is_met(bound, met):
    assert Row("name", 2.0, "s", **bound).met is met


def test_a_ratio_is_the_median_of_the_turns_that_have_both_figures():
    row = ratio("name", [2.0, 9.0, 4.0, 100.0], [1.0, 3.0, 4.0], "other")
    assert (row.figure, row.spread) == (2.0, (1.0, 3.0))


def fail():
    raise AssertionError("measured again")


def test_measurements_are_kept_for_the_same_settings_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "is_same_code", lambda since: True)
    file = tmp_path / "rows.json"
    first = Results(file, {"steps": 3}, (), fresh=False)
    assert first.once("a", lambda: {"s": 1}) == {"s": 1}
    first.finish([Row("a", 1.0, "s", at_most=2.0)])
    stored = json.loads(file.read_text())
    assert stored["rows"][0]["met"] is True and stored["provenance"]["commit"]
    assert Results(file, {"steps": 3}, (), fresh=False).once("a", fail) == {"s": 1}
    assert capsys.readouterr().out.count("kept as") == 0
    for number, (settings, more) in enumerate([({"steps": 4}, {}), ({"steps": 3}, {"fresh": True}), ({"steps": 3}, {"quick": True})], 1):
        file.write_text(json.dumps(stored))
        assert Results(file, settings, (), **{"fresh": False} | more).measured == {}
        # What was measured before is not lost.
        assert json.loads((tmp_path / f"rows.json.old{number}").read_text()) == stored and not file.exists()
        assert f"kept as {tmp_path}/rows.json.old{number}" in capsys.readouterr().out


def test_another_machine_goes_on_where_no_times_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "is_same_code", lambda since: since == "abc1234")
    file = tmp_path / "rows.json"
    first = Results(file, {}, (), fresh=False, timed=False)
    first.head["provenance"] |= {"commit": "abc1234", "cores": 99}
    first.once("a", lambda: {"loss": 1})
    again = Results(file, {}, (), fresh=False, timed=False)
    assert again.once("a", fail) == {"loss": 1} and again.head["provenance"]["cores"] == 99
    assert Results(file, {}, (), fresh=False, timed=True).measured == {}
    for commit in ("def5678", provenance.UNKNOWN):
        first.head["provenance"]["commit"] = commit
        first.write([])
        assert Results(file, {}, (), fresh=False, timed=False).measured == {}


def test_a_directory_that_is_no_checkout_has_no_commit(tmp_path):
    assert provenance.commit(tmp_path) == provenance.UNKNOWN
    assert not provenance.is_unchanged(tmp_path, provenance.UNKNOWN, ".")
    assert provenance.provenance(checkout=tmp_path)["commit"] == provenance.UNKNOWN


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)

    checkout, link = tmp_path / "checkout", tmp_path / "link"
    (checkout / "inside").mkdir(parents=True)
    link.symlink_to(checkout)
    (checkout / "inside" / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = provenance.commit(link)
    assert len(commit) >= 7 and provenance.commit(checkout / "inside") == provenance.UNKNOWN  # as an installed package lies in one
    (checkout / "README.md").write_text("words")
    git("add", ".")
    git("commit", "-m", "words")
    assert provenance.commit(checkout) != commit and provenance.is_unchanged(checkout, commit, "inside")
    assert not provenance.is_unchanged(checkout, commit, ".")
    (checkout / "inside" / "code.py").write_text("2")
    assert provenance.commit(checkout).endswith(provenance.DIRTY) and not provenance.is_unchanged(checkout, commit, "inside")
    assert not provenance.is_unchanged(checkout, provenance.commit(checkout), ".")


def test_cols_floor_counts_its_products():
    """One square layer: 3 against 2 products of tokens and weight, and the thin ones."""
    C, tokens, rank = 256, 512, 32
    model = bone_operator.Model(1, {"layer": ("x", C, C)}, {"paper": rank})
    expected = (3 * tokens * C * C + 3 * C * C * 64) / (2 * tokens * C * C + 3 * tokens * rank * 2 * C)
    assert bone_operator._least_of_col(model, tokens, f"peft lora r={rank}") == pytest.approx(expected)
    model = bone_operator.MODELS["rwkv6-3b"]
    methods = bone_operator._methods(model)
    measured = {"seconds": {name: [1.0, 2.0] for name in methods} | {"row materialized": [3.0, None]},
                "saved_bytes": dict.fromkeys(methods, 1), "peak_bytes": dict.fromkeys(methods, 1)}
    made = {row.name: row for row in bone_operator._rows("case", model, "bf16", 512, measured)}
    assert made["case: col fused, time at equal speed of all products"].figure == pytest.approx(1.64, abs=0.005)
    assert made["case: row materialized"].spread is made["case: row materialized, time"].spread is None
    assert made["case: col fused, time"].spread == (1.0, 1.0)


def test_a_quick_run_claims_nothing(tmp_path):
    results = Results(tmp_path / "rows.json", {}, (), fresh=False, quick=True)
    assert [row.target for row in results.write([Row("a", 1.0, "s", at_most=2.0)])] == [None]


@pytest.mark.parametrize("best, tried", [(-7, range(-8, -5)), (-9, range(-10, -5)), (-4, range(-8, -3)), (-20, range(-10, -5))])
def test_a_rate_at_the_edge_is_followed_twice_at_most(monkeypatch, best, tried):
    asked = []

    def loss(study, method, index, *_):
        asked.append(index)
        return abs(index - best)

    monkeypatch.setattr(groupings, "_loss", loss)
    method = groupings.Method("row", (), first_rate=-8)
    found = groupings._best_rate(Namespace(validation=None), method, 40, Namespace(quick=False), None)
    assert sorted(set(asked)) == list(tried)
    assert found == max(best, tried[0])


def test_a_rate_at_which_the_loss_is_not_finite_is_the_worst(tmp_path, monkeypatch):
    method = groupings.Method("row", (), first_rate=-8)
    options = Namespace(quick=False, work=tmp_path)

    def train(config, directory, overrides, may_diverge):
        assert may_diverge
        directory.mkdir()
        rate = config["train"]["learning_rate"]
        diverges = rate >= 1e-3
        step = {"event": "step", "loss": 2.0, "grad_norm": math.nan if diverges else 1.0}
        evals = [{"event": "eval", "loss": loss} for loss in ((3.0,) if diverges else (3.0, 2 - 100 * rate))]
        return Run(2 if diverges else 0, [{"event": "start", "trainable_parameters": 5}, *evals, *[step] * 3])

    monkeypatch.setattr(groupings, "train", train)
    study = groupings.Study({"data": {}, "train": {}}, (method,), tmp_path / "validation", tmp_path / "test")
    results = Results(tmp_path / "rows.json", {}, (), fresh=False)
    assert groupings._best_rate(study, method, 40, options, results) == -7
    assert results.measured["row, rate 0.001, 40 steps, seed 0"] == {
        "trainable_parameters": 5, "held_out_loss_before": 3.0, "held_out_loss": None, "diverged_at_step": 3}
    made = groupings._rows({method: -6}, (40, 80), results)
    assert made[2].figure == math.inf
    results.finish(made)
    json.loads((tmp_path / "rows.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_rates_follow_each_other_by_about_three():
    assert [groupings.rate(index) for index in (-8, -7, -6, -1, 0)] == [1e-4, 3e-4, 1e-3, 0.3, 1.0]


def test_table7_sets_each_turn_against_loras_and_records_what_does_not_fit(tmp_path):
    results = Results(None, {}, (), fresh=False)
    for turn, (lora_s, row_s) in enumerate([(1.0, 2.0), (4.0, 4.0)]):
        for name, step_s in (("lora r=32", lora_s), ("bone row, factored", row_s)):
            results.once(f"{name}, turn {turn}", lambda s=step_s: {"step_s": [9.0, s], "tokens": 512, "memory_gib": s})
    results.once("bone row, materialized, turn 0", lambda: {"killed": True})
    rows = {row.name: row for row in table7._rows("1.6b", table7.METHODS, results)}
    throughput = rows["bone row, factored: throughput ratio"]
    assert (throughput.figure, throughput.spread, throughput.met) == (0.75, (0.5, 1.0), False)
    assert rows["bone row, factored: memory ratio"].figure == 1.5
    assert "bone row, materialized: does not fit into this machine's memory" in rows
    assert "bone row, materialized, bone recomputed: throughput" not in rows


def test_table7_sets_the_live_peak_against_loras_where_both_were_counted():
    results = Results(None, {}, (), fresh=False)
    for name, peak_bytes in (("lora r=32", 100), ("bone row, factored", 103), ("bone col, fused", None)):
        results.once(f"{name}, turn 0", lambda: {"step_s": [9.0, 1.0], "tokens": 512, "memory_gib": 1.0})
        results.once(f"{name}, live", lambda peak=peak_bytes: {"live_peak_bytes": peak} if peak else {"killed": True})
    made = {row.name: row for row in table7._rows("1.6b", table7.METHODS, results)}
    live = made["bone row, factored: live peak ratio"]
    assert (live.figure, live.met, live.target) == (1.03, False, "at most 1.02")
    assert "bone col, fused: does not fit while its tensors are counted" in made and "bone col, fused: throughput ratio" in made


def test_table7_goes_on_where_lora_does_not_fit(tmp_path, monkeypatch):
    """Nothing is set against it, and what was killed isn't started again."""
    started = []

    def train(config, directory, overrides, may_be_killed):
        started.append(overrides)
        killed = overrides == table7.METHODS[table7.LORA]
        step = {"event": "step", "step_s": 1.0, "tokens": 512, "memory_gib": 2.0, "loss": 1.0, "grad_norm": 1.0}
        return Run(137 if killed else 0, [{"event": "start", "trainable_parameters": 5}, step, step])

    monkeypatch.setattr(table7, "train", train)
    monkeypatch.setattr(table7, "METHODS", dict(list(table7.METHODS.items())[:2]))
    monkeypatch.setattr(table7, "_live_peak", lambda *arguments: {"live_peak_bytes": 7})
    monkeypatch.setattr(table7, "write_rwkv6", lambda size, work: Namespace(unlink=lambda: None))
    arguments = ["table7.py", "--text", "text", "--work", str(tmp_path), "--turns", "2", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    table7.main()
    made = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert made == ["lora r=32: does not fit into this machine's memory", "bone row, factored: throughput",
                    "bone row, factored: high-water memory", "bone row, factored: peak of live tensors"]
    assert [overrides == table7.METHODS[table7.LORA] for overrides in started] == [True, False, False]


@pytest.mark.parametrize("code, outcome", [(-9, {"killed": True}), (137, {"killed": True}), (0, {"live_peak_bytes": 7}), (1, None)])
def test_table7_records_a_counted_run_that_was_killed(tmp_path, monkeypatch, code, outcome):
    def run(command):
        Path(command[3]).write_text('{"live_peak_bytes": 7}')
        return Namespace(returncode=code)

    monkeypatch.setattr(table7.subprocess, "run", run)
    if outcome is None:
        with pytest.raises(SystemExit, match="ended with exit code 1"):
            table7._live_peak({}, tmp_path, ("adapter.rank=4",))
    else:
        assert table7._live_peak({}, tmp_path, ("adapter.rank=4",)) == outcome


@pytest.mark.parametrize("name", ["rwkv", "llama"])
def test_random_models_are_models(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    path = random_models.write_rwkv6("tiny", tmp_path) if name == "rwkv" else random_models.write_llama("tiny", tmp_path, text)
    architecture = arch.resolve(ModelConfig(path=str(path)))
    assert architecture.name == name
    source = architecture.open(ModelConfig(path=str(path)))
    where = placement.choose({"zero_optimization": {"stage": 0}}, torch.device("cpu"))
    with where.empty():
        model = architecture.build(source, torch.bfloat16)
    architecture.load(model, source, where)
    samples = load_samples(DataConfig(train=(str(text),), prompt="text", max_length=64, overlong="split"), architecture.tokenizer(source))
    tokens = torch.from_numpy(samples[0]).long()[None]
    with torch.no_grad():
        hidden, _ = architecture.hidden(model, tokens, (tokens.shape[1],))
    assert hidden.isfinite().all() and 1e-2 < hidden.float().std() < 10


def test_the_trainer_has_the_samples_labels(tmp_path):
    import hugging_face

    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "one and one", "response": "two"}\n{"query": "two and two", "response": "is four"}\n')
    (tmp_path / "text.txt").write_text(TEXT)
    source_path = random_models.write_llama("tiny", tmp_path, tmp_path / "text.txt")
    architecture = arch.load("llama")
    samples = load_samples(DataConfig(train=(str(file),)), architecture.tokenizer(architecture.open(ModelConfig(path=str(source_path)))))
    for index in range(len(samples)):
        features = hugging_face._features(samples, index)
        learnt = [label for label in features["labels"] if label != hugging_face.MASKED]
        assert len(learnt) == samples.label_count(index) and learnt == samples[index].tolist()[-len(learnt):]
        assert len(features["labels"]) == len(features["input_ids"]) == len(features["attention_mask"])


def test_a_run_that_the_system_ended_is_told_from_one_that_failed():
    assert Run(137, []).killed and not Run(1, []).killed


@pytest.mark.parametrize("code, loss, grad_norm, diverged", [
    (2, math.nan, 1.0, True), (2, 1.0, math.inf, True), (2, 1.0, 1.0, False), (0, math.nan, 1.0, False)])
def test_a_run_that_diverged_is_told_from_one_that_was_refused(code, loss, grad_norm, diverged):
    assert Run(code, [{"event": "step", "loss": loss, "grad_norm": grad_norm}]).diverged is diverged
    assert not Run(code, []).diverged
