"""A resumed run is the run that was never interrupted; a checkpoint that doesn't fit is refused."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
import zero_runs
from safetensors.torch import load_file, save_file
from zero_runs import MOVES, PAUSE, STAGES, WORLD_SIZES

from bone_ds import adapter_file, checkpoint
from bone_ds.checkpoint import Damaged, files
from bone_ds.config import load_config
from bone_ds.engine.state import PARTS
from bone_ds.errors import CheckpointError

TIMEOUT_S = 600
PARAMETERS = 5022
"""What an adapter of tiny.RANK trains of the tiny model."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "zero_runs"


@pytest.fixture(scope="module")
def runs(directory):
    return zero_runs.outcomes(directory)


@pytest.mark.parametrize("dtype", zero_runs.DTYPES)
@pytest.mark.parametrize(("stage", "world_size"), [(stage, size) for size in WORLD_SIZES for stage in STAGES])
def test_the_remaining_steps_are_equal_to_the_bit(runs, stage, world_size, dtype):
    whole, resumed = (runs[f"row-{stage}-{dtype}{suffix}", world_size] for suffix in ("", "-resumed"))
    assert len(whole["losses"]) == 6
    assert resumed["evaluations"] == whole["evaluations"][1:]
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["norms"] == whole["norms"][3:]
    torch.testing.assert_close(load_file(resumed["masters"]), load_file(whole["masters"]), rtol=0, atol=0)


@pytest.mark.parametrize("move", MOVES)
def test_other_stages_and_world_sizes_go_on_from_the_same_state(runs, move):
    origin, origin_world_size, _, target_world_size = MOVES[move]
    tolerance = 5e-3 if "bf16" in move else 1e-5
    whole, resumed = runs[origin, origin_world_size], runs[move, target_world_size]
    assert resumed["losses"] == pytest.approx(whole["losses"][3:], rel=0, abs=tolerance)
    assert resumed["norms"] == pytest.approx(whole["norms"][3:], rel=0, abs=tolerance)


def test_a_checkpoint_holds_the_adapter_and_its_moments_and_no_other_weight(runs, directory):
    for dtype in zero_runs.DTYPES:
        for stage in STAGES:
            path = zero_runs.checkpoints_of(directory, f"row-{stage}-{dtype}", 2) / PAUSE
            shapes = {name: tensor.shape for name, tensor in load_file(runs[f"row-{stage}-{dtype}", 2]["masters"]).items()}
            header, masters = adapter_file.read(path / "adapter.safetensors")
            state = load_file(path / "state.safetensors")
            assert {file.name for file in path.iterdir()} == {"manifest.json", "config.yaml", "adapter.safetensors", "state.safetensors"}
            assert header.step == 3 and {name: tensor.shape for name, tensor in masters.items()} == shapes
            assert {name: tensor.shape for name, tensor in state.items()} == {
                f"{part}/{name}": shape for part in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
            assert {tensor.dtype for tensor in (*masters.values(), *state.values())} == {torch.float32}
            manifest = json.loads((path / "manifest.json").read_text())
            assert manifest["held_out_loss"] == runs[f"row-{stage}-{dtype}", 2]["evaluations"][1]
            beside = path.parent.with_name(f"{path.parent.name}.safetensors")
            assert beside.read_bytes() == (path / "adapter.safetensors").read_bytes()


@pytest.fixture
def saved(runs, directory, tmp_path):
    """A copy of a checkpoint, and what the run that goes on from it is of."""
    path = shutil.copytree(zero_runs.checkpoints_of(directory, "row-2-fp32", 2) / PAUSE, tmp_path / PAUSE)
    header, masters = adapter_file.read(path / "adapter.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    origin = checkpoint.Origin(header, manifest["data_fingerprint"], config="")
    return SimpleNamespace(path=path, origin=origin, shapes={name: tuple(tensor.shape) for name, tensor in masters.items()})


def refusal(saved, kind=CheckpointError) -> str:
    """What keeps the checkpoint from being restored."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.given(saved.path, saved.origin)
        files.read(saved.path, saved.shapes)
    message = str(error.value)
    assert type(error.value) is kind and "\n" not in message and str(saved.path) in message
    return message


def edit_manifest(saved, **changes):
    """Without a digest that fits."""
    manifest = json.loads((saved.path / "manifest.json").read_text()) | changes
    (saved.path / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def seal(saved, **changes):
    """As a writer of another kind would have written it: all digests fit."""
    sizes = {file.name: {"size_bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in saved.path.iterdir() if file.name != "manifest.json"}
    edit_manifest(saved, **{"files": sizes, "held_out_loss": 1.0} | changes)
    fields = json.loads((saved.path / "manifest.json").read_text())
    del fields["sha256"]
    edit_manifest(saved, sha256=hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest())


def edit_state(saved, edit):
    state = load_file(saved.path / "state.safetensors")
    edit(state)
    save_file(state, saved.path / "state.safetensors")
    seal(saved)


def test_what_fits_is_read(saved):
    assert checkpoint.given(saved.path, saved.origin).step == 3
    manifest, parts = files.read(saved.path, saved.shapes)
    assert manifest.adam_step == 3 and {name: len(part) for name, part in parts.items()} == dict.fromkeys(PARTS, len(saved.shapes))
    seal(saved)
    assert files.read(saved.path, saved.shapes)[0].held_out_loss == 1.0


def test_other_data_is_refused(saved):
    saved.origin = replace(saved.origin, data_fingerprint="0123456789abcdef")
    assert "other training samples" in refusal(saved)


def test_another_base_is_refused(saved):
    saved.origin = replace(saved.origin, header=replace(saved.origin.header, base_fingerprint="0123456789abcdef"))
    assert "another base model" in refusal(saved)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors", "config.yaml", "manifest.json"])
def test_every_flipped_bit_is_found(saved, name):
    whole = (saved.path / name).read_bytes()
    draw = random.Random(0)
    for _ in range(50):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        (saved.path / name).write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1:])
        try:
            assert name in refusal(saved, Damaged), (place, bit)
        except pytest.fail.Exception:
            # Two texts of one number mean the same.
            assert name == "manifest.json" and json.loads((saved.path / name).read_bytes()) == json.loads(whole), (place, bit)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors", "config.yaml"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_file_that_was_cut_is_found(saved, name, kept):
    (saved.path / name).write_bytes((saved.path / name).read_bytes()[:kept])
    assert f"{name}: has {kept} bytes, its manifest says" in refusal(saved, Damaged)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors", "config.yaml", "manifest.json"])
def test_a_file_that_is_missing_is_found(saved, name):
    (saved.path / name).unlink()
    assert f"{name}: {'is missing' if name == 'manifest.json' else 'has no bytes'}" in refusal(saved, Damaged)


def test_files_of_another_checkpoint_are_found(saved, directory):
    other = zero_runs.checkpoints_of(directory, "row-3-fp32", 2) / PAUSE
    shutil.copy(other / "state.safetensors", saved.path)
    assert "state.safetensors: is damaged: its content is not what its manifest's sha256 says" in refusal(saved, Damaged)
    saved.path = saved.path.rename(saved.path.with_name("step-00000007"))
    assert "manifest.json: is of step 3" in refusal(saved, Damaged)


def test_a_manifest_that_was_changed_is_found(saved):
    edit_manifest(saved, step=2)
    assert "manifest.json: is damaged: its content is not what its sha256 says" in refusal(saved, Damaged)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\udcff"])
def test_a_manifest_that_is_no_json_object_is_found(saved, text):
    (saved.path / "manifest.json").write_text(text, errors="surrogateescape")
    assert "manifest.json: is damaged" in refusal(saved, Damaged)


@pytest.mark.parametrize(("key", "value"), [
    ("step", None), ("step", "3"), ("step", -1), ("adam_step", 2.5), ("world_size", True), ("base_fingerprint", None), ("files", []),
    ("files", {"../adapter.safetensors": {"size_bytes": 1, "sha256": ""}})])
def test_a_manifest_with_a_value_of_another_kind_is_found(saved, key, value):
    seal(saved, **{key: value})
    message = refusal(saved, Damaged)
    assert "manifest.json: is damaged" in message and key in message


@pytest.mark.parametrize("version", [1, 2, 4])
def test_another_format_is_refused(saved, version):
    if version > checkpoint.FORMAT_VERSION:
        seal(saved, format_version=version)
    else:
        edit_manifest(saved, format_version=version, sha256=None)
    assert f"format_version {version} is not 3" in refusal(saved)


def test_another_adapter_is_refused(saved):
    name = next(iter(saved.shapes))
    saved.shapes[name] = (2, 18, 18)
    assert f"{name}: shape (7, 9, 9) is not the adapter's (2, 18, 18)" in refusal(saved)
    del saved.shapes[name]
    assert f"{name}: is missing from the adapter that is trained" in refusal(saved)
    saved.shapes["model.layers.0.extra.bone"] = (1, 9, 9)
    assert "model.layers.0.extra.bone: is missing from the checkpoint" in refusal(saved)


@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq"])
def test_a_state_with_a_tensor_too_few_or_not_finite_is_refused(saved, part):
    name = f"{part}/{next(iter(saved.shapes))}"
    edit_state(saved, lambda state: state[name].view(-1)[5:6].fill_(float("nan")))
    assert f"{name}: holds NaN or infinite values" in refusal(saved)
    edit_state(saved, lambda state: state.pop(name))
    assert f"{name}: is missing from the checkpoint" in refusal(saved)


# The command line, under each launcher.


def launched(launcher: list[str], *arguments) -> str:
    """Standard output of a training command that has to succeed."""
    done = subprocess.run([sys.executable, "-m", *launcher, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_step(run, field="loss") -> dict[int, float]:
    """Of the last time that each step was trained."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return {event["step"]: event[field] for event in events if event["event"] == "step"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Five steps on two ranks from the command line: the config, the run's directory and what was printed."""
    base = tmp_path_factory.mktemp("command")
    model, rows = tiny.write_model(base / "model"), tiny.write_rows(base / "rows.jsonl")
    tree = tiny.config_tree(model, rows, base / "run", train={"steps": 5, "save_every": 1, "keep_checkpoints": 3, "schedule": "cosine"},
                            deepspeed={"config": "zero2"})
    tree["adapter"] = {"parameters": PARAMETERS + 1}
    config = base / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    printed = launched(["bone_ds"], "train", config, "--ranks", 2)
    return SimpleNamespace(config=config, run=base / "run", printed=printed)


def test_the_rank_chosen_for_a_budget_is_written_wherever_a_rank_is(command):
    header, tensors = adapter_file.read(command.run / "adapter.safetensors")
    assert header.rank == load_config(command.run / "config.yaml").adapter.rank == tiny.RANK
    assert sum(tensor.numel() for tensor in tensors.values()) == PARAMETERS


def test_the_latest_checkpoints_stay(command):
    assert [path.name for path in checkpoint.existing(command.run / "checkpoints")] == ["step-00000003", "step-00000004", "step-00000005"]


def test_only_our_progress_is_printed(command):
    assert command.printed == (command.run / "log.txt").read_text()


def test_a_run_resumed_under_torchrun_is_equal_to_the_bit(command, tmp_path):
    run = shutil.copytree(command.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "adapter.safetensors").unlink()
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bone_ds"]
    assert "\nresumed after step 3 of 5\n" in launched(torchrun, "train", command.config, "--resume", f"output.directory={run}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 4, 5]
    for field in ("loss", "grad_norm", "learning_rate"):
        assert by_step(run, field) == by_step(command.run, field)
    for name in ("adapter.safetensors", "checkpoints/step-00000005/state.safetensors"):
        torch.testing.assert_close(load_file(run / name), load_file(command.run / name), rtol=0, atol=0)


def test_a_finished_run_without_its_adapter_is_given_it_on_another_number_of_ranks(command, tmp_path):
    """As when it was killed between its last checkpoint and the adapter, in the middle of a line of events; nor is one too many left."""
    run = shutil.copytree(command.run, tmp_path / "run")
    (run / "adapter.safetensors").unlink()
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000002")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    printed = launched(["bone_ds"], "train", command.config, "--resume", "--ranks", 1, f"output.directory={run}")
    assert "\nresumed after step 5 of 5: nothing is left to do" in printed and " tensors, 1 rank\n" in printed
    torch.testing.assert_close(load_file(run / "adapter.safetensors"), load_file(command.run / "adapter.safetensors"), rtol=0, atol=0)
    assert [path.name for path in checkpoint.existing(run / "checkpoints")] == ["step-00000003", "step-00000004", "step-00000005"]
    lines = (run / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "end" and '{"event": "st' in lines


def test_the_loss_falls(command):
    losses = by_step(command.run)
    assert losses[1] - losses[5] > 0.1
