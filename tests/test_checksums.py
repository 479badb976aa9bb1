"""A base of which one bit has changed since training is refused, wherever the bit lies and whatever file it lies in."""

import hashlib
import json
import re
import shutil
import struct
import zipfile
from dataclasses import replace

import pytest
import tiny_rwkv
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import built_and_loaded, opened, random_adapter, save_tiny
from tiny_rwkv_adapter import random_adapter as random_rwkv_adapter

from bone_ds import adapter_file, checksums, generate
from bone_ds.checksums import Checksums
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from bone_ds.merge import merge

BASES = ("llama", "sharded", "m.pth", "m.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bases, and an adapter beside each."""
    directory = tmp_path_factory.mktemp("whole")
    save_tiny(directory / "llama")
    save_tiny(directory / "sharded", max_shard_size="20KB")
    for name in ("m.pth", "m.safetensors"):
        tiny_rwkv.save_tiny(directory / name, vocabulary=256)
    for name in BASES:
        make = random_rwkv_adapter if name.startswith("m.") else random_adapter
        make(directory / name, directory / f"{name}.adapter.safetensors", rank=8)
    return directory


@pytest.fixture(params=BASES)
def base(whole, tmp_path, request):
    """A copy of one, and its adapter."""
    path = tmp_path / request.param
    (shutil.copytree if (whole / request.param).is_dir() else shutil.copy)(whole / request.param, path)
    return path, whole / f"{request.param}.adapter.safetensors"


def embedding_of(base) -> tuple[str, object]:
    """Its name, and the file that holds it."""
    if base.is_file():
        return "emb.weight", base
    name = "model.embed_tokens.weight"
    index = base / "model.safetensors.index.json"
    return name, base / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")


def flip_in_the_middle(base) -> str:
    """One bit of the embedding, which no sample of its bytes sees; returns its name."""
    name, path = embedding_of(base)
    tensor = (torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path))[name]
    content, values = bytearray(path.read_bytes()), tensor.numpy().tobytes()
    assert content.count(values) == 1 and len(values) >= 3 * 4096
    content[content.index(values) + len(values) // 2] ^= 1
    path.write_bytes(content)
    return name


def test_merge_and_generate_take_the_base_that_was_trained_on_alone(base, tmp_path):
    path, adapter = base
    out = tmp_path / f"merged{path.suffix}"
    fingerprint = generate.arch.resolve(ModelConfig(path=str(path))).open(ModelConfig(path=str(path))).fingerprint
    merge(adapter, tmp_path / f"before{path.suffix}", str(path))
    name = flip_in_the_middle(path)
    assert generate.arch.resolve(ModelConfig(path=str(path))).open(ModelConfig(path=str(path))).fingerprint == fingerprint
    says = "the data of emb.weight has not the CRC-32 that the archive says" if path.suffix == ".pth" else (
        f"its base {re.escape(str(path))} has changed since it was trained: {name} holds other bytes")
    model = ModelConfig(path=str(path), dtype="fp32", tokenizer="bytes" if path.is_file() else "auto")
    for use in (lambda: merge(adapter, out, str(path)), lambda: generate.load(model, adapter)):
        with pytest.raises(CheckpointError, match=says) as error:
            use()
        assert "\n" not in str(error.value)
    assert not out.exists() and not any(tmp_path.glob("*.partial"))


def test_a_record_knows_tensors_and_not_files(whole):
    headers = {name: adapter_file.read(whole / f"{name}.adapter.safetensors")[0] for name in BASES}
    assert headers["llama"].base_crc32 == headers["sharded"].base_crc32 != headers["m.pth"].base_crc32
    assert headers["m.pth"].base_crc32 == headers["m.safetensors"].base_crc32
    with safe_open(whole / "llama/model.safetensors", "pt") as file:
        assert len(headers["llama"].base_crc32) == 8 * (len(file.keys()) + 2)  # and config.json, tokenizer.json


@pytest.mark.parametrize("field, value", [("rms_norm_eps", 1e-4), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
                                          ("hidden_act", "gelu")])
def test_a_config_that_computes_otherwise_is_another_base(whole, tmp_path, field, value):
    shutil.copytree(whole / "llama", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match="has changed since it was trained: config.json holds other bytes"):
        merge(whole / "llama.adapter.safetensors", tmp_path / "merged", str(tmp_path / "base"))
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 128, "torch_dtype": "bfloat16"}))
    merge(whole / "llama.adapter.safetensors", tmp_path / "merged", str(tmp_path / "base"))


def test_an_adapter_without_a_record_is_taken_as_it_is(whole, tmp_path):
    header, tensors = adapter_file.read(whole / "llama.adapter.safetensors")
    adapter_file.write(tmp_path / "old.safetensors", replace(header, base_crc32=None), tensors)
    shutil.copytree(whole / "llama", tmp_path / "base")
    flip_in_the_middle(tmp_path / "base")
    merge(tmp_path / "old.safetensors", tmp_path / "merged", str(tmp_path / "base"))


@pytest.mark.parametrize("record", ["12", "0123456g", 7, ["00000000"], ""])
def test_a_header_with_something_else_for_a_record(whole, tmp_path, record):
    header, tensors = adapter_file.read(whole / "llama.adapter.safetensors")
    adapter_file.write(tmp_path / "bad.safetensors", replace(header, base_crc32=record), tensors)
    with pytest.raises(CheckpointError, match="bad.safetensors: its header's base_crc32 is .*, not 8 hexadecimal digits a tensor"):
        adapter_file.read(tmp_path / "bad.safetensors")


def test_a_pth_is_held_against_its_own_checksums(whole, tmp_path):
    """Each record of it, with a bit flipped, by the CRC-32 that the archive has of it; without any adapter."""
    content, noticed = (whole / "m.pth").read_bytes(), 0
    with zipfile.ZipFile(whole / "m.pth") as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    for entry in entries:
        name_bytes, extra_bytes = struct.unpack("<HH", content[entry.header_offset + 26:entry.header_offset + 30])
        damaged = bytearray(content)
        damaged[entry.header_offset + 30 + name_bytes + extra_bytes + entry.file_size // 2] ^= 16
        (tmp_path / "m.pth").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="m.pth: is damaged: .* has not the CRC-32 that the archive says"):
            tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "m.pth"))
        noticed += 1
    assert noticed > 40


def test_a_pth_that_was_saved_without_checksums_is_read(whole, tmp_path):
    tensors = torch.load(whole / "m.pth", weights_only=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    model = tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "m.pth"))
    assert torch.equal(model.emb.weight, tensors["emb.weight"])


def test_parts_of_one_storage_are_held_against_its_checksum(tmp_path):
    tensors = tiny_rwkv.random_tensors(tiny_rwkv.tiny_sizes())
    storage = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = storage.split([tensor.numel() for tensor in tensors.values()])
    torch.save({name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts)}, tmp_path / "m.pth")
    tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "m.pth"))
    content = bytearray((tmp_path / "m.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="m.pth: is damaged: the data of .* has not the CRC-32"):
        tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "m.pth"))


def test_ranks_share_the_work(whole):
    source, alone = opened(whole / "llama"), Checksums()
    built_and_loaded(source, checksums=alone)
    shares = [Checksums(rank=rank, ranks=3) for rank in range(3)]
    for share in shares:
        built_and_loaded(source, checksums=share)
    assert all(len(share.values) <= len(alone.values) // 3 + 1 for share in shares)
    assert checksums.together([share.values for share in shares], "base") == alone.values


def test_hosts_with_different_bytes_are_told_apart():
    with pytest.raises(CheckpointError, match="model.path: base: the hosts hold different bytes of b; give every host the same model"):
        checksums.together([{"a": "0" * 8, "b": "0" * 8}, {"a": "0" * 8, "b": "1" * 8}], "model.path: base")


def test_two_copies_of_a_tensor_that_differ(tmp_path):
    """Some files of tied models hold the embedding as the head too; a sample of their bytes may agree."""
    save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "tied/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][48, 3] += 1
    save_file(tensors, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    random_adapter(tmp_path / "tied", tmp_path / "adapter.safetensors", rank=8)
    with pytest.raises(CheckpointError, match="its two copies of model.embed_tokens.weight differ; it is damaged"):
        merge(tmp_path / "adapter.safetensors", tmp_path / "merged", str(tmp_path / "tied"))


def test_what_lies_in_the_hubs_cache_is_held_against_its_name(whole, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (whole / "sharded").iterdir():
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / path.name).symlink_to(blobs / name)
    built_and_loaded(opened(snapshot))
    for path in sorted(snapshot.iterdir()):
        content = path.read_bytes()
        path.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{path.name}: is damaged: its content is not the one that the hub names it by; remove"):
            built_and_loaded(opened(snapshot))
        path.resolve().write_bytes(content)
    built_and_loaded(opened(snapshot))
