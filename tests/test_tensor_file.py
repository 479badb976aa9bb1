"""A tensor file has the mode the user's umask says, and a full disk is one line."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bone_ds import tensor_file
from bone_ds.errors import CheckpointError


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        tensor_file.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool, torch.bfloat16], ids=str)
def test_dtypes_of_an_outline(tmp_path, dtype):
    tensor_file.save_file({"a": torch.zeros(2, 3, dtype=dtype)}, tmp_path / "a.safetensors")
    tensors, _ = tensor_file.outline(tmp_path / "a.safetensors")
    assert (tensors["a"].dtype, tuple(tensors["a"].shape)) == (dtype, (2, 3))


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file.safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="a.safetensors: can't be written: No space left"):
        tensor_file.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="can't be written: .*No such file"):
        tensor_file.save_file({"a": torch.ones(2)}, tmp_path / "nowhere" / "a.safetensors")
