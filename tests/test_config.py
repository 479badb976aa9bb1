"""What a config means: defaults, overrides, numbers as people write them, and YAML out that reads back as it was."""

import re
from itertools import product
from typing import get_args

import pytest
import yaml

from bone_ds.bone import STRATEGIES
from bone_ds.cli import main
from bone_ds.config import AdapterConfig, RunConfig, describe_fields, dump_yaml, load_config
from bone_ds.errors import ConfigError
from ds_configs import NAMES

SMALLEST = "model:\n  path: some/model\ndata:\n  train: train.jsonl\noutput:\n  directory: run\n"


@pytest.fixture
def smallest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def test_defaults(smallest):
    config = load_config(smallest)
    assert config.data.train == ("train.jsonl",) and config.data.eval == ()
    assert (config.adapter.method, config.adapter.grouping, config.adapter.rank) == ("bone", "row", 64)
    assert config.deepspeed.config in NAMES
    assert config.adapter.alpha is None and config.train.steps is None and config.train.epochs is None


@pytest.mark.parametrize(("overrides", "overlong"), [
    ([], "truncate"), (["data.prompt=text"], "split"), (["data.prompt=text", "data.overlong=drop"], "drop")])
def test_long_texts_are_split_unless_the_config_says_otherwise(smallest, overrides, overlong):
    config = load_config(smallest, overrides)
    assert config.data.overlong_rule == overlong
    smallest.write_text(dump_yaml(config))
    assert load_config(smallest) == config


@pytest.mark.parametrize("override, section, field, value", [
    ("train.steps=10", "train", "steps", 10),
    ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
    ("train.learning_rate=2E-5", "train", "learning_rate", 2e-5),
    ("train.learning_rate=1", "train", "learning_rate", 1.0),
    ("train.eps=+1.e-6", "train", "eps", 1e-6),
    ("data.train=[a.jsonl, b.json]", "data", "train", ("a.jsonl", "b.json")),
    ("data.fields={query: question}", "data", "fields", {"query": "question"}),
    ("data.packing=no", "data", "packing", False),
    ("adapter.targets=q_proj", "adapter", "targets", ("q_proj",)),
    ("train.recompute_modules=[mlp, self_attn]", "train", "recompute_modules", ("mlp", "self_attn")),
    ("train.activation_checkpointing=bone+layer", "train", "activation_checkpointing", "bone+layer"),
    ("adapter.parameters=33030144", "adapter", "parameters", 33_030_144),
    ("adapter.layers=[0, 2]", "adapter", "layers", (0, 2)),
    ("adapter.targets=null", "adapter", "targets", None),
    ("output.directory=a=b", "output", "directory", "a=b"),
    ("model.path='1e5'", "model", "path", "1e5"),
])
def test_an_override_is_read_as_yaml(smallest, override, section, field, value):
    assert getattr(getattr(load_config(smallest, [override]), section), field) == value


def test_the_last_override_wins_and_a_commented_out_section_has_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train:\n  # steps: 10\n")
    assert load_config(path).train == load_config(path, ["train.steps=5", "train.steps=null"]).train


@pytest.mark.parametrize("adapter", [
    "{}", "{method: lora, rank: 8}", "{method: lora, rank: 8, alpha: 16}", "{grouping: col, strategy: checkpointed, rank: 16}",
    "{grouping: free, groups: 4}", "{grouping: miss, rank: 7}", "{form: unconstrained, strategy: fused}",
    "{targets: [q_proj, v_proj], layers: [1, 3]}", "{parameters: 1000}", "{parameters: 1000, rank: 4}"])
def test_dumped_yaml_reads_back_to_an_equal_config(tmp_path, adapter):
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + f"adapter: {adapter}\ntrain: {{learning_rate: 3e-5, epochs: 2}}\n")
    config = load_config(path, ["data.eval=[é.jsonl]", "data.fields={response: 'on', query: '1e5'}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(again) == config
    assert load_config(again).adapter.has_rank == config.adapter.has_rank


def test_a_combination_is_refused_exactly_if_the_operator_lacks_it(smallest):
    lacking = set()
    adapter = {field: get_args(AdapterConfig.model_fields[field].annotation) for field in ("grouping", "form", "strategy")}
    assert adapter["strategy"] == ("auto", *(strategy for strategy in STRATEGIES if strategy != "auto"))
    for grouping, form, strategy in product(*adapter.values()):
        groups = ["adapter.groups=2"] * (grouping == "free")
        try:
            load_config(smallest, [f"adapter.grouping={grouping}", f"adapter.form={form}", f"adapter.strategy={strategy}", *groups])
        except ConfigError:
            lacking.add((strategy, (grouping, form)))
    assert lacking == {(strategy, pair) for strategy in STRATEGIES for pair in product(adapter["grouping"], adapter["form"])
                       if pair not in STRATEGIES[strategy]}


def test_the_shown_fields_with_the_required_ones_filled_in_are_the_defaults(smallest, tmp_path, capsys):
    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert shown == describe_fields()
    assert max(map(len, shown.splitlines())) <= 100
    for field, value in [("path", "some/model"), ("train", "train.jsonl"), ("directory", "run")]:
        shown, count = re.subn(rf"^  {field}:  # required$", f"  {field}: {value}", shown, flags=re.MULTILINE)
        assert count == 1, field
    filled = tmp_path / "filled.yaml"
    filled.write_text(shown)
    assert load_config(filled) == load_config(smallest)


def test_every_field_is_shown_with_a_meaning():
    shown = yaml.safe_load(describe_fields())
    for section, info in RunConfig.model_fields.items():
        assert list(shown[section]) == list(info.annotation.model_fields)
        assert all(field.description for field in info.annotation.model_fields.values()), section


def test_config_shows_a_file_as_it_would_be_used(smallest, capsys):
    assert main(["config", str(smallest), "train.steps=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 7
