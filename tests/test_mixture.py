"""Several sources by weight: how many samples of each an epoch has, in which order, and from how many ranks' view."""

import json
from collections import Counter

import numpy as np
import pytest
import ranks
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import opened

from bone_ds.config import DataConfig, dump_yaml, load_config, validate
from bone_ds.data import GlobalOrder, Part, Report, Samples, load_samples
from bone_ds.data.order import shares
from bone_ds.errors import ConfigError
from llama_adapters import ARCHITECTURE


def samples_of(counts, weights, length=4):
    """Samples whose tokens are their own index; the parts are called a, b, c ..."""
    n = sum(counts)
    report = Report(n, n, 0, 0, 0, n * length, n * (length - 1), length)
    parts = tuple(Part(name, count, report, weight) for name, count, weight in zip("abcdef", counts, weights))
    learnt = np.tile(np.arange(length) > 0, n)
    return Samples(np.repeat(np.arange(n, dtype=np.int32), length), np.arange(n + 1) * length, learnt, 0, report, parts)


def epochs_of(samples, count, packing=False, seed=0):
    """The samples of each epoch, in order."""
    order = GlobalOrder(samples, packing, 16, 4, seed)
    bounds = [order.steps_in_epochs(number) for number in range(count + 1)]
    return [[index for step in range(*bounds[number:number + 2]) for unit in order.window(step).units for index in unit]
            for number in range(count)]


@pytest.mark.parametrize(("counts", "weights", "wanted"), [
    ((10, 10, 10), (1, 1, 1), [10, 10, 10]),
    ((100, 10, 10), (2, 1, 1), [60, 30, 30]),
    ((5, 5), (1, 2), [3, 7]),  # 3 1/3 and 6 2/3
    ((3, 3, 4), (1, 1, 1), [4, 3, 3]),  # thirds: what is left over goes to the first
    ((7, 1), (0.1, 0.7), [1, 7]),
])
def test_an_epochs_counts_are_exact(counts, weights, wanted):
    samples = samples_of(counts, weights)
    assert shares(samples.parts) == wanted
    bounds = np.cumsum([0, *counts])
    for epoch in epochs_of(samples, 3):
        assert np.histogram(epoch, bounds)[0].tolist() == wanted


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 5)), min_size=1, max_size=4), seed=st.integers(0, 3),
       packing=st.booleans())
@settings(deadline=None, max_examples=50)
def test_every_sample_of_a_source_is_seen_equally_often(sizes, seed, packing):
    samples = samples_of(*zip(*sizes))
    try:
        counts = shares(samples.parts)
    except ConfigError:
        return
    assert sum(counts) == len(samples)
    seen, first = Counter(), 0
    for number, epoch in enumerate(epochs_of(samples, 4, packing, seed), 1):
        seen.update(epoch)
        first = 0
        for part, count in zip(samples.parts, counts, strict=True):
            times = [seen[index] for index in range(first, first + part.count)]
            assert sum(times) == number * count and max(times) - min(times) <= 1
            first += part.count


def test_each_epoch_and_seed_has_an_order_of_its_own_and_a_step_is_found_again():
    samples = samples_of((20, 20), (3, 1))
    first, second = epochs_of(samples, 2)
    assert first != second and first != epochs_of(samples, 1, seed=1)[0] and first != sorted(first)
    order = GlobalOrder(samples, True, 16, 4, 0)
    walked = [order.window(step) for step in range(12)]
    assert [GlobalOrder(samples, True, 16, 4, 0).window(step) for step in (11, 3, 7)] == [walked[step] for step in (11, 3, 7)]


def test_a_weight_too_small_for_a_sample_is_refused():
    with pytest.raises(ConfigError, match=r"data.mixture: b: weight 0.001 is less than one of the 20 samples of an epoch; raise it"):
        GlobalOrder(samples_of((10, 10), (1, 0.001)), False, 16, 4, 0)


def test_without_weights_the_order_is_that_of_one_source():
    parted = samples_of((30,), (None,))
    assert epochs_of(parted, 2) == epochs_of(Samples(parted.tokens, parted.offsets, parted.learnt, 0, parted.report), 2)


# from files


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixture(tmp_path):
    """Three sources worded in three ways; their texts tell them apart."""
    import pyarrow
    import pyarrow.parquet

    shards = tmp_path / "set/data"
    shards.mkdir(parents=True)
    for number in range(2):
        rows = [{"query": "q" * (number + 1), "response": "A" * (1 + row % 3)} for row in range(6)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), shards / f"train-{number:05d}-of-00002.parquet")
    one = write(tmp_path / "one.jsonl", [{"q": "qq", "a": "B" * (1 + row % 4)} for row in range(8)])
    (tmp_path / "two.csv").write_text("instruction,output\n" + "".join(f"do,{'C' * (1 + row)}\n" for row in range(4)))
    return {"max_length": 256, "template": "{q}=", "completion": "{a}", "prompt": "template", "mixture": [
        {"path": str(tmp_path / "set"), "weight": 2, "prompt": "user_assistant"}, {"path": one},
        {"path": str(tmp_path / "two.csv"), "weight": 0.5, "prompt": "wizardlm", "samples": 3}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_mixture_of_three_sources(mixture, model):
    tokenizer = ARCHITECTURE.tokenizer(opened(model))
    config = validate({"model": {"path": str(model)}, "data": mixture, "output": {"directory": "run"}}, "case")
    samples = load_samples(config.data, tokenizer)
    assert [(part.count, part.weight, part.report.kept) for part in samples.parts] == [(12, 2, 12), (8, 1, 8), (3, 0.5, 3)]
    assert samples.report.kept == len(samples) == 23
    learnt = [tokenizer.decode(samples[index][samples.learnt_of(index)].tolist()) for index in range(23)]
    letters = [next(letter for letter in text if letter in "ABC") for text in learnt]
    assert letters == ["A"] * 12 + ["B"] * 8 + ["C"] * 3
    assert shares(samples.parts) == [13, 7, 3]  # of 23 by 4 : 2 : 1
    other = load_samples(config.data.model_copy(update={"mixture": (*config.data.mixture[:2], config.data.mixture[2].model_copy(
        update={"weight": 1.0}))}), tokenizer)
    assert other.tokens.tolist() == samples.tokens.tolist() and other.fingerprint() != samples.fingerprint()


def test_what_an_entry_leaves_out_is_the_sections():
    data = DataConfig.model_validate({
        "prompt": "template", "template": "{q}=", "completion": "{a}", "fields": {"q": "question"}, "subset": "main", "mixture": (
            {"path": "a"}, {"path": "b", "prompt": "chat", "subset": "other"}, {"path": "c", "prompt": "text", "split": "test"},
            {"path": "d", "template": "{q}:"})})
    one, two, three, four = map(data.of_source, data.mixture)
    assert (one.train, one.template, one.fields, one.subset, one.train_split) == (("a",), "{q}=", {"q": "question"}, "main", "train")
    assert (two.prompt, two.template, two.completion, two.fields, two.subset) == ("chat", None, None, {}, "other")
    assert (three.prompt, three.overlong_rule, three.train_split) == ("text", "split", "test") and one.overlong_rule == "truncate"
    assert (four.prompt, four.template, four.completion, four.fields) == ("template", "{q}:", "{a}", {"q": "question"})


def test_a_mixture_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\noutput: {directory: run}\n"
                    "data:\n  mixture:\n  - a.jsonl\n  - {path: b.jsonl, weight: 2, fields: {query: q}}\n")
    config = load_config(path)
    assert [(source.path, source.weight, source.fields) for source in config.data.mixture] == [
        ("a.jsonl", 1.0, None), ("b.jsonl", 2, {"query": "q"})]
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("overlong", [None, "drop", "split"])
def test_a_mixture_cuts_alike_after_it_was_written(tmp_path, overlong):
    given = {"prompt": "text", "mixture": ["a.txt", {"path": "b.jsonl", "prompt": "metamath"}], "overlong": overlong}
    config = validate({"model": {"path": "m"}, "output": {"directory": "run"}, "data": given}, "case")
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    first, second = ([data.of_source(source).overlong_rule for source in data.mixture] for data in (config.data, load_config(path).data))
    assert first == second == {None: ["split", "truncate"], "drop": ["drop", "drop"], "split": ["split", "truncate"]}[overlong]


def test_text_beside_rows_is_split_after_it_was_written(tmp_path):
    given = {"mixture": [{"path": "a.txt", "prompt": "text"}, "b.jsonl"]}
    config = validate({"model": {"path": "m"}, "output": {"directory": "run"}, "data": given}, "case")
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    assert [load_config(path).data.of_source(source).overlong_rule for source in config.data.mixture] == ["split", "truncate"]


def test_two_ranks_train_on_a_mixture_as_one_does(mixture, model, tmp_path):
    """The same samples in the same order, whole packs dealt to one rank or two, and losses that are equal but for rounding."""
    train = {"steps": 5, "global_batch_size": 6, "micro_batch_size": 1}
    tree = tiny.config_tree(model, tmp_path / "unused.jsonl", tmp_path / "run", train=train)
    tree["data"] = mixture
    outcomes = {}
    for world_size in (1, 2):
        directory = tmp_path / f"{world_size}"
        directory.mkdir()
        outcomes[world_size] = ranks.run({"seen": {"run": "seen", "config": tree}, "train": {"run": "train", "config": tree}},
                                         world_size, directory)
    assert outcomes[1]["seen"]["units"] == outcomes[2]["seen"]["units"]
    steps = outcomes[1]["seen"]["steps_in_an_epoch"]
    drawn = [index for units in outcomes[2]["seen"]["units"][:steps] for unit in units for index in unit]
    assert np.histogram(drawn, [0, 12, 20, 23])[0].tolist() == [13, 7, 3]
    assert outcomes[2]["train"]["losses"] == pytest.approx(outcomes[1]["train"]["losses"], abs=1e-5)
