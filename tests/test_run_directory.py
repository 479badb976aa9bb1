"""Which directories a run accepts, which changes a resumed one, and what it writes there."""

import errno
import os
from itertools import count

import pytest

from bone_ds.config import dump_yaml, validate
from bone_ds.errors import CheckpointError, ConfigError
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


def test_what_a_start_leaves_that_was_killed_before_its_config_is_no_run(tmp_path):
    run, config = RunDirectory(tmp_path / "run"), config_of(tmp_path / "run")
    with run.locked(resume=False):
        run.checkpoints.mkdir()
        (run.path / "config.yaml.partial").write_text("mod")
        (run.path / "tensorboard").mkdir()
        run.check(config, resume=False)
    for other in (run.checkpoints / "step-00000001.partial", run.config):
        other.touch()
        with pytest.raises(ConfigError, match="is not empty"):
            run.check(config, resume=False)
        other.unlink()
    run.create(config, {})
    for begin in (lambda: run.check(config, resume=False), lambda: run.locked(resume=False).__enter__()):
        with pytest.raises(ConfigError, match="is not empty"):
            begin()
    run.check(config, resume=True)
    with run.locked(resume=True):
        pass


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        RunDirectory(tmp_path).check(config_of(tmp_path), resume=False)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_is_one_line_and_leaves_the_config(run, monkeypatch, call):
    calls = count(1)

    def full(*_):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = run.config.read_text(encoding="utf-8")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="can't be written: No space left on device"):
        run.create(config_of(run.path, train={"seed": 1}), {})
    assert (run.config.read_text(encoding="utf-8") == before) == (call < 3) and not any(run.path.glob("*.partial"))


def test_a_torn_line_of_events_stays_on_a_line_of_its_own(run):
    run.events.write_text('{"event": "st', encoding="utf-8")
    run.record_start(None, step=0)
    run.record("end", step=1)
    assert run.events.read_text(encoding="utf-8").splitlines()[0] == '{"event": "st'
