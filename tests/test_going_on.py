"""Runs in one process that end and are gone on from: what is found on disk, passed over, kept, refused and overwritten."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from safetensors.torch import load_file
from test_run_lock import HOLDER

from bone_ds import adapter_file, checkpoint
from bone_ds.checkpoint import saver as savers
from bone_ds.cli import main
from bone_ds.config import validate
from bone_ds.errors import CheckpointError, ConfigError
from bone_ds.evaluate import Evaluation, HeldOut
from bone_ds.launch import Ranks
from bone_ds.run_directory import RunDirectory
from bone_ds.train import train

ALONE = Ranks(0, 0, 1, 1)


@pytest.fixture(scope="module")
def as_rank():
    """This process as the one rank of a run."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patched.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory, as_rank):
    """directory, fields of `train` -> a config of four steps, each saved and evaluated."""
    base = tmp_path_factory.mktemp("going_on")
    model, rows = tiny.write_model(base / "model"), tiny.write_rows(base / "rows.jsonl")

    def make(directory: Path, **fields) -> dict:
        fields = {"steps": 4, "save_every": 1, "eval_every": 1, "keep_checkpoints": 3} | fields
        return tiny.config_tree(model, rows, directory, train=fields)

    return make


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """A run that was never interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(validate(tree(directory), "case"), ALONE)
    return RunDirectory(directory)


@pytest.fixture
def run(whole, tmp_path):
    return RunDirectory(shutil.copytree(whole.path, tmp_path / "run"))


def events(run: RunDirectory, kind: str) -> list[dict]:
    return [event for event in map(json.loads, run.events.read_text().splitlines()) if event["event"] == kind]


def losses(run: RunDirectory) -> dict[int, float]:
    """Of the last time that each step was done."""
    return {event["step"]: event["loss"] for event in events(run, "step")}


def steps(run: RunDirectory) -> list[int]:
    return [checkpoint.verify(path).step for path in checkpoint.existing(run.checkpoints)]


def damage(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def adapters_are_equal(run, whole) -> bool:
    """To the bit, header included."""
    return run.adapter.read_bytes() == whole.adapter.read_bytes()


def test_what_a_run_leaves(whole):
    assert steps(whole) == [2, 3, 4]
    saved = events(whole, "checkpoint")
    assert [(event["step"], event["path"]) for event in saved] == [(step, f"checkpoints/step-0000000{step}") for step in range(1, 5)]
    assert [event["held_out_loss"] for event in saved] == [event["loss"] for event in events(whole, "eval")][1:]
    assert events(whole, "start")[0]["checkpoint"] is None
    assert adapter_file.read(whole.adapter)[0].step == 4
    assert not any(whole.path.rglob("*.partial"))


def test_damaged_ones_are_passed_over(tree, run, whole, capsys):
    damage(run.checkpoints / "step-00000004/adapter.safetensors")
    (run.checkpoints / "step-00000003/manifest.json").unlink()
    (run.checkpoints / "step-00000005.partial").mkdir()
    damage(run.adapter)
    train(validate(tree(run.path), "case"), ALONE, resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume: ")]
    assert [any(f"step-0000000{step}" in line and why in line for line in said) for step, why in (
        (4, "adapter.safetensors: is damaged"), (3, "manifest.json: is missing"), (5, "was never finished, removed"))] == [True] * 3
    assert all(line in run.log.read_text() for line in said)
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4, 3, 4]
    assert events(run, "start")[-1] | {"step": 2, "checkpoint": f"{run.checkpoints}/step-00000002"} == events(run, "start")[-1]
    assert losses(run) == losses(whole) and adapters_are_equal(run, whole) and steps(run) == [2, 3, 4]
    assert {path.name for path in run.checkpoints.glob("*.*")} == {"step-00000004.damaged", "step-00000003.damaged"}


def test_none_is_whole(tree, run):
    for path in checkpoint.existing(run.checkpoints):
        damage(path / "state.safetensors")
    before = sorted(run.path.rglob("*"))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint") as error:
        train(validate(tree(run.path), "case"), ALONE, resume=True)
    assert "\n" not in str(error.value) and sorted(run.path.rglob("*")) == before


def test_none_yet(tree, run, whole, capsys):
    """A run that was killed before its first checkpoint, and one that had begun from another's."""
    shutil.rmtree(run.checkpoints)
    (run.checkpoints / "step-00000007.partial").mkdir(parents=True)
    run.adapter.unlink()
    train(validate(tree(run.path), "case"), ALONE, resume=True)
    said = capsys.readouterr().out
    assert "no checkpoint yet: begun anew" in said and "step-00000007.partial: was never finished, removed" in said
    assert not any(run.checkpoints.glob("*.partial"))
    assert losses(run) == losses(whole) and adapters_are_equal(run, whole) and [event["step"] for event in events(run, "start")] == [0, 0]
    begun_from_another = RunDirectory(run.path.with_name("other"))
    train(validate(tree(begun_from_another.path), "case"), ALONE, resume=whole.checkpoints / "step-00000003")
    shutil.rmtree(begun_from_another.checkpoints)
    assert begun_from_another.began_from() == whole.checkpoints / "step-00000003" and whole.began_from() is None
    train(validate(tree(begun_from_another.path), "case"), ALONE, resume=True)
    assert [event["step"] for event in events(begun_from_another, "start")] == [3, 3]
    assert adapters_are_equal(begun_from_another, whole)


def test_a_base_of_which_a_bit_has_changed_is_refused(tree, run):
    model = Path(tree(run.path)["model"]["path"]) / "model.safetensors"
    content, embedding = model.read_bytes(), load_file(model)["model.embed_tokens.weight"].numpy().tobytes()
    flipped = bytearray(content)
    flipped[content.index(embedding) + len(embedding) // 2] ^= 1
    shutil.rmtree(run.checkpoints / "step-00000004")  # or there were nothing left to do
    try:
        model.write_bytes(flipped)
        for resume in (True, run.checkpoints / "step-00000002"):
            with pytest.raises(CheckpointError, match="step-0000000[23]: the base model at model.path has changed since: "
                                                      "model.embed_tokens.weight holds other bytes"):
                train(validate(tree(run.path), "case"), ALONE, resume=resume)
    finally:
        model.write_bytes(content)


def test_an_earlier_one_by_name(tree, run, whole, capsys):
    train(validate(tree(run.path, keep_checkpoints=2), "case"), ALONE, resume=run.checkpoints / "step-00000002")
    assert losses(run) == losses(whole) and adapters_are_equal(run, whole) and steps(run) == [3, 4]
    assert {path.name for path in run.checkpoints.glob("*.*")} == {"step-00000003.superseded", "step-00000004.superseded"}
    assert "step-00000004: the run goes on from step 2; kept as step-00000004.superseded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "step-00000002.superseded", "step-00000002.partial"])
def test_one_that_has_lost_its_name_would_not_be_found_again(tree, run, name):
    renamed = (run.checkpoints / "step-00000002").rename(run.checkpoints / name)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ConfigError, match=f"{name} has no checkpoint's name, such as step-00000100, and would not be found again"):
        train(validate(tree(run.path), "case"), ALONE, resume=renamed)
    assert sorted(run.path.rglob("*")) == before


def test_one_of_another_run(tree, whole, tmp_path):
    other = RunDirectory(tmp_path / "other")
    train(validate(tree(other.path), "case"), ALONE, resume=whole.checkpoints / "step-00000003")
    assert losses(other) == {4: losses(whole)[4]} and steps(other) == [4] and steps(whole) == [2, 3, 4]
    assert adapters_are_equal(other, whole)


def test_one_of_another_run_that_does_not_fit(tree, run, tmp_path, whole):
    path = whole.checkpoints / "step-00000003"
    with pytest.raises(ConfigError, match="is not empty"):
        train(validate(tree(run.path), "case"), ALONE, resume=path)
    other = tree(tmp_path / "other")
    other["adapter"]["rank"] = 3
    with pytest.raises(ConfigError, match="--resume: adapter.rank: 3 differs from the run's 9"):
        train(validate(other, "case"), ALONE, resume=path)
    with pytest.raises(ConfigError, match="is no checkpoint"):
        train(validate(tree(tmp_path / "other"), "case"), ALONE, resume=whole.path)
    shutil.copytree(path, tmp_path / "copy")
    damage(tmp_path / "copy/state.safetensors")
    with pytest.raises(CheckpointError, match="copy/state.safetensors: is damaged"):
        train(validate(tree(tmp_path / "other"), "case"), ALONE, resume=tmp_path / "copy")
    assert not (tmp_path / "other" / "config.yaml").exists()
    train(validate(tree(tmp_path / "other"), "case"), ALONE)  # what is left of those starts is no run
    assert losses(RunDirectory(tmp_path / "other")) == losses(whole)


def test_the_best_by_held_out_loss(tree, tmp_path, monkeypatch):
    run, found = RunDirectory(tmp_path / "run"), iter([9.0, 3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, engine: Evaluation(next(found), label_tokens=1, eval_s=0.0))
    train(validate(tree(run.path, keep_best=True, keep_checkpoints=1), "case"), ALONE)
    assert steps(run) == [2, 4]
    assert [event["held_out_loss"] for event in events(run, "checkpoint")] == [3.0, 1.0, 2.0, 1.5]


def test_written_beside_training_the_files_are_the_same(tree, whole, tmp_path):
    run = RunDirectory(tmp_path / "run")
    train(validate(tree(run.path, async_save=True), "case"), ALONE)
    assert losses(run) == losses(whole) and adapters_are_equal(run, whole)
    for name in ("adapter.safetensors", "state.safetensors"):
        for step in (2, 3, 4):
            path = Path(f"checkpoints/step-0000000{step}") / name
            assert (run.path / path).read_bytes() == (whole.path / path).read_bytes()


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk(tree, whole, tmp_path, monkeypatch, beside):
    run = RunDirectory(tmp_path / "run")
    copyfile = shutil.copyfile

    def save(tensors, path, metadata=None, save_file=savers.files.tensor_file.save_file):
        if path.parent.name == "step-00000003.partial":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(savers.files.tensor_file, "save_file", save)
        with pytest.raises(CheckpointError, match="can't be written: No space left on device; earlier checkpoints are whole"):
            train(validate(tree(run.path, async_save=beside), "case"), ALONE)
    assert shutil.copyfile is copyfile and steps(run) == [1, 2] and not any(run.path.rglob("*.partial"))
    assert adapter_file.read(run.adapter)[0].step == 2
    train(validate(tree(run.path, async_save=beside), "case"), ALONE, resume=True)
    assert losses(run) == losses(whole) and adapters_are_equal(run, whole)


def test_a_directory_that_another_run_uses(tree, run, tmp_path, capsys, monkeypatch):
    """Refused by the command at once, and by a rank that comes to it later; neither changes anything."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, run.path], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout.readline() == b"held\n"
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        with pytest.raises(ConfigError, match=f"another run goes on there, process {other.pid} on "):
            train(validate(tree(run.path), "case"), ALONE, resume=True)
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(tree(run.path)))
        monkeypatch.delenv("RANK")
        assert main(["train", str(config), "--resume"]) == 2
        assert capsys.readouterr().err.startswith(f"bone-ds: output.directory: {run.path}: another run goes on there, process {other.pid}")
        assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
        other.kill()
