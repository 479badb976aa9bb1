"""Which changes a resumed run accepts."""

import pytest

from bone_ds.config import dump_yaml, validate
from bone_ds.errors import ConfigError
from bone_ds.run_directory import RunDirectory


def config_of(directory, **sections):
    tree = {"model": {"path": "a.pth"}, "data": {"train": "train.jsonl"}, "output": {"directory": str(directory)}}
    return validate(tree | {section: tree.get(section, {}) | fields for section, fields in sections.items()}, "run.yaml")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(config_of(tmp_path)), encoding="utf-8")
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(("section", "field", "value"), [
    ("model", "path", "b.pth"), ("model", "dtype", "fp32"), ("model", "tokenizer", "world"), ("adapter", "rank", 32),
    ("data", "max_length", 256), ("train", "seed", 1), ("train", "global_batch_size", 4), ("train", "chunk_length", 64),
    ("train", "l2wrap", 1e-4)])
def test_what_would_make_it_another_run_is_refused(run, section, field, value):
    with pytest.raises(ConfigError, match=f"--resume: {section}.{field}: {value!r} differs from the run's"):
        run.check(config_of(run.path, **{section: {field: value}}), resume=True)


@pytest.mark.parametrize(("section", "field", "value"), [
    ("model", "wkv", "chunked"), ("train", "steps", 500), ("train", "learning_rate", 1e-5), ("train", "micro_batch_size", 2),
    ("train", "activation_checkpointing", "layer"), ("deepspeed", "config", "zero3")])
def test_what_leaves_it_the_same_run_is_accepted(run, section, field, value):
    run.check(config_of(run.path, **{section: {field: value}}), resume=True)


def test_a_budget_of_parameters_stands_for_the_rank_that_it_chose(run):
    asked = config_of(run.path, adapter={"parameters": 33_030_144})
    chosen = asked.model_copy(update={"adapter": asked.adapter.model_copy(update={"rank": 32})})
    (run.path / "config.yaml").write_text(dump_yaml(chosen), encoding="utf-8")
    for same in (asked, chosen):
        run.check(same, resume=True)
    with pytest.raises(ConfigError, match="--resume: adapter.parameters: 5 differs"):
        run.check(config_of(run.path, adapter={"parameters": 5}), resume=True)
    with pytest.raises(ConfigError, match="--resume: adapter.rank: 16 differs"):
        run.check(config_of(run.path, adapter={"parameters": 33_030_144, "rank": 16}), resume=True)
