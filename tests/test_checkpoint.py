"""Whatever ends a save, at whichever call, the checkpoints before it are whole and one of them, or the new one, is gone on from."""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from bone_ds import adapter_file, checkpoint, tensor_file
from bone_ds.adapter_file import Header
from bone_ds.checkpoint import Snapshot, manifest, saver
from bone_ds.engine.state import PARTS
from bone_ds.errors import CheckpointError

HEADER = Header(format_version=1, architecture="llama", method="bone", grouping="row", rank=4, alpha=None, targets=["q_proj"], layers=None,
                base="base", base_revision=None, base_dtype="fp32", base_fingerprint="b" * 16, step=0)
ORIGIN = checkpoint.Origin(HEADER, "d" * 16, "model: {}\n")
NAMES = [f"layers.{layer}.q_proj.bone" for layer in range(3)]


class Killed(BaseException):
    """The process ends here: nothing that follows is done."""


def snapshot(step: int, held_out_loss: float | None = None) -> Snapshot:
    parts = {part: {name: torch.full((2, 4, 4), step + number / 8) for name in NAMES} for number, part in enumerate(PARTS)}
    return Snapshot(step, step, 1, held_out_loss, parts)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Saves of a run with nothing but state; `save(step)` writes, publishes and thins as training does."""
    monkeypatch.setattr(saver.engines, "by_first", lambda action: action())

    def save(step, held_out_loss=None, keep=2, keep_best=False, beside=False):
        state = snapshot(step)
        engine = SimpleNamespace(adam_step=lambda: step, gather=state.parts.__getitem__, world_size=1)
        places = tmp_path / "checkpoints", tmp_path / "adapter.safetensors"
        with checkpoint.Saver(*places, engine, ORIGIN, keep, keep_best, beside) as writer:
            writer.save(step, held_out_loss)
            writer.finish()

    return SimpleNamespace(path=tmp_path, checkpoints=tmp_path / "checkpoints", save=save)


def steps(run) -> list[int]:
    """Of all published checkpoints, each of which must be whole."""
    return [checkpoint.verify(path).step for path in checkpoint.existing(run.checkpoints)]


# Every call by which a save changes the disk, where it can end.


class Disk:
    """Counts the calls that change the disk; from number `last` on each ends in `failure`, after half of its work."""

    def __init__(self, monkeypatch, last: int, failure: BaseException):
        self.calls, self.last, self.failure = [], last, failure
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (Path, "write_text"),
                            (shutil, "copyfile"), (safetensors.torch, "save_file")):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name, original):
        def call(*arguments, **options):
            self.calls.append(name)
            if len(self.calls) < self.last:
                return original(*arguments, **options)
            if name in ("write_text", "copyfile", "save_file"):
                original(*arguments, **options)
                path = Path(arguments[{"write_text": 0, "copyfile": 1, "save_file": 1}[name]])
                os.truncate(path, path.stat().st_size // 2)
            raise self.failure

        return call


def calls_of_a_save(run, monkeypatch) -> int:
    with monkeypatch.context() as patched:
        disk = Disk(patched, last=10**9, failure=Killed())
        run.save(3)
    shutil.rmtree(run.checkpoints)
    assert {"replace", "fsync", "mkdir", "unlink", "rmdir", "write_text", "copyfile", "save_file"} == set(disk.calls)
    return len(disk.calls)


def begin_from(before: Path, run) -> None:
    shutil.rmtree(run.path)
    shutil.copytree(before, run.path)


def test_killed_at_every_call(run, monkeypatch, tmp_path_factory):
    run.save(1)
    run.save(2)
    before = shutil.copytree(run.path, tmp_path_factory.mktemp("before"), dirs_exist_ok=True)
    ends = set()
    for last in range(1, calls_of_a_save(run, monkeypatch) + 1):
        begin_from(before, run)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            Disk(patched, last, Killed())
            run.save(3)
        found = checkpoint.last_whole(run.checkpoints, ORIGIN)
        assert found.damaged == () and steps(run) in ([1, 2], [1, 2, 3], [2, 3]), last
        assert adapter_file.read(run.path / "adapter.safetensors")[0].step in (2, 3), last
        ends.add(found.step)
        # The run goes on from there.
        checkpoint.settle(run.checkpoints, found.step, found.damaged)
        run.save(found.step + 1)
        assert steps(run) == [found.step, found.step + 1]
        assert {path.suffix for path in run.checkpoints.iterdir()} == {""}
    assert ends == {2, 3}


@pytest.mark.parametrize("beside", [False, True])
def test_refused_at_every_call(run, monkeypatch, beside, tmp_path_factory):
    """As by a full disk: every later call is refused too, but those that free space."""
    run.save(1)
    run.save(2)
    before = shutil.copytree(run.path, tmp_path_factory.mktemp("before"), dirs_exist_ok=True)
    refused = 0
    for last in range(1, calls_of_a_save(run, monkeypatch) + 1):
        begin_from(before, run)
        with monkeypatch.context() as patched:
            frees = {name: getattr(os, name) for name in ("unlink", "rmdir")}
            Disk(patched, last, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            for name, original in frees.items():
                patched.setattr(os, name, original)
            try:
                run.save(3, beside=beside)
            except CheckpointError as error:
                refused += 1
                assert "can't be written: " in str(error) and "No space left on device" in str(error) and "\n" not in str(error)
                assert "earlier checkpoints are whole" in str(error)
        assert steps(run)[:2] == [1, 2] or steps(run) == [2, 3], last
        assert not any(run.path.rglob("*.partial")), last
        assert adapter_file.read(run.path / "adapter.safetensors")[0].step in (2, 3), last
    assert refused > 10


def test_a_file_larger_than_the_system_allows(run):
    run.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(CheckpointError, match="can't be written: .*File too large"):
            run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps(run) == [1] and [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors"])
def test_what_reads_back_as_something_else_is_not_published(run, monkeypatch, name):
    def save(tensors, path, metadata=None, save_file=safetensors.torch.save_file):
        save_file(tensors, path, metadata)
        if path.name == name:
            contents = bytearray(path.read_bytes())
            contents[-3] ^= 1
            path.write_bytes(contents)

    monkeypatch.setattr(tensor_file.safetensors.torch, "save_file", save)
    with pytest.raises(CheckpointError, match=f"{name}: was written, but .*q_proj.bone reads back as something else"):
        run.save(1)
    assert not any(run.checkpoints.iterdir())


def test_an_error_beside_training_ends_the_next_save_or_check(run, monkeypatch):
    state = snapshot(1)
    engine = SimpleNamespace(adam_step=lambda: 1, gather=state.parts.__getitem__, world_size=1)
    monkeypatch.setattr(saver.files, "write", lambda *_: (_ for _ in ()).throw(CheckpointError("full")))
    for end in ("save", "check", "finish"):
        with checkpoint.Saver(run.checkpoints, run.path / "a.safetensors", engine, ORIGIN, 2, beside=True) as writer:
            writer.save(1)
            writer._writing.exception()
            with pytest.raises(CheckpointError, match="full"):
                writer.save(2) if end == "save" else getattr(writer, end)()
            writer.finish()


# Which are kept.


@pytest.mark.parametrize(("losses", "keep", "keep_best", "kept"), [
    ([3, 2, 1, 4, 5], 2, False, [4, 5]), ([3, 2, 1, 4, 5], 2, True, [3, 4, 5]), ([3, 2, 1, 4, 0.5], 2, True, [4, 5]),
    ([1, 1, 1, 1, 1], 1, True, [1, 5]), ([None, 2, None, None, None], 1, True, [2, 5]), ([None] * 3, 1, True, [3]),
    ([float("nan"), 2, 3, 4], 1, True, [2, 4])])
def test_retention(run, losses, keep, keep_best, kept):
    for step, loss in enumerate(losses, 1):
        run.save(step, loss, keep, keep_best)
    assert steps(run) == kept


def test_a_checkpoint_whose_manifest_is_damaged_is_not_the_best(run):
    run.save(1, 0.5, keep=1, keep_best=True)
    (run.checkpoints / "step-00000001/manifest.json").write_text("{}")
    run.save(2, 2.0, keep=1, keep_best=True)
    run.save(3, 3.0, keep=1, keep_best=True)
    assert steps(run) == [2, 3]


# What is gone on from.


def damage(path: Path) -> None:
    contents = bytearray((path / "state.safetensors").read_bytes())
    contents[-1] ^= 1
    (path / "state.safetensors").write_bytes(contents)


def test_the_last_whole_one_is_found_and_the_others_are_kept_apart(run, caplog):
    for step in range(1, 6):
        run.save(step, keep=9)
    damage(run.checkpoints / "step-00000005")
    (run.checkpoints / "step-00000004/state.safetensors").unlink()
    (run.checkpoints / "step-00000006").mkdir()
    shutil.copytree(run.checkpoints / "step-00000003", run.checkpoints / "step-00000007.partial")
    found = checkpoint.last_whole(run.checkpoints, ORIGIN)
    assert found.step == 3 and found.path.name == "step-00000003"
    assert [record.getMessage().removeprefix(f"--resume: passed over: {run.checkpoints}/step-0000000") for record in caplog.records] == [
        "6/manifest.json: is missing, the checkpoint is not whole",
        "5/state.safetensors: is damaged: its content is not what its manifest's sha256 says",
        f"4/state.safetensors: has no bytes, its manifest says {(found.path / 'state.safetensors').stat().st_size}; it is not whole"]
    checkpoint.settle(run.checkpoints, 2, found.damaged)
    assert sorted(path.name.removeprefix("step-0000000") for path in run.checkpoints.iterdir()) == [
        "1", "2", "3.superseded", "4.damaged", "5.damaged", "6.damaged"]
    run.save(3, keep=9)
    checkpoint.settle(run.checkpoints, 2, ())
    assert (run.checkpoints / "step-00000003.superseded1").exists() and steps(run) == [1, 2]


def test_none_is_whole(run):
    assert checkpoint.last_whole(run.checkpoints, ORIGIN) is None
    run.save(1)
    run.save(2)
    for path in checkpoint.existing(run.checkpoints):
        damage(path)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint: .*step-00000002/state.*; .*step-00000001/state") as error:
        checkpoint.last_whole(run.checkpoints, ORIGIN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors", "adapter.safetensors"])
def test_one_that_may_not_be_read_is_not_passed_over(run, monkeypatch, name):
    """It may be whole, and the right to read it can be given."""
    run.save(1)
    run.save(2)
    path, opened = run.checkpoints / "step-00000002" / name, Path.open
    refused = PermissionError(errno.EACCES, "Permission denied")

    def opening(self, *options, **more):
        if self == path:
            raise refused
        return opened(self, *options, **more)

    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises(CheckpointError, match=f"{path}: can't be read: Permission denied; give this user the right") as error:
        checkpoint.last_whole(run.checkpoints, ORIGIN)
    assert type(error.value) is CheckpointError
    if name == "adapter.safetensors":
        with pytest.raises(CheckpointError, match=f"{path}: can't be read: Permission denied$"):
            adapter_file.read(path)


def test_a_directory_that_may_not_be_listed_is_not_empty(run, monkeypatch):
    run.save(1)

    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(PermissionError):
        checkpoint.last_whole(run.checkpoints, ORIGIN)


def test_what_is_no_longer_kept_makes_room_for_the_adapter(run, monkeypatch):
    run.save(1, keep=1)
    monkeypatch.setattr(saver.publishing, "copy", lambda source, path: pytest.fail() if steps(run) == [1, 2] else None)
    run.save(2, keep=1)
    assert steps(run) == [2]


def test_a_whole_one_of_another_run_is_no_damage(run):
    run.save(1)
    with pytest.raises(CheckpointError, match="other training samples"):
        checkpoint.last_whole(run.checkpoints, checkpoint.Origin(HEADER, "e" * 16, ""))


def test_the_manifest_says_what_was_written(run):
    run.save(7, 1.25)
    read = manifest.read(run.checkpoints / "step-00000007")
    assert (read.step, read.adam_step, read.world_size, read.held_out_loss) == (7, 7, 1, 1.25)
    assert {name: record.size_bytes for name, record in read.files.items()} == {
        path.name: path.stat().st_size for path in (run.checkpoints / "step-00000007").iterdir() if path.name != "manifest.json"}
