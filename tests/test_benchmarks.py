"""What the benchmarks share: rows and their resuming, the choice of a rate, random models, the Trainer's samples."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import groupings
import random_models
import table7
from rows import Results, Row, ratio
from training_run import Run

from bone_ds import arch
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


def test_measurements_are_kept_for_the_same_settings_alone(tmp_path):
    file = tmp_path / "rows.json"
    first = Results(file, {"steps": 3}, (), fresh=False)
    assert first.once("a", lambda: {"s": 1}) == {"s": 1}
    first.finish([Row("a", 1.0, "s", at_most=2.0)])
    stored = json.loads(file.read_text())
    assert stored["rows"][0]["met"] is True and stored["provenance"]["commit"]

    def fail():
        raise AssertionError("measured again")

    assert Results(file, {"steps": 3}, (), fresh=False).once("a", fail) == {"s": 1}
    for other in (Results(file, {"steps": 4}, (), fresh=False), Results(file, {"steps": 3}, (), fresh=True),
                  Results(file, {"steps": 3}, (), fresh=False, quick=True)):
        assert other.measured == {}


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
