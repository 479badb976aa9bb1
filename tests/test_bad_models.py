"""Every way a model can be broken ends in one CheckpointError of at most two lines that names the file and the value."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny, tiny_model, write_gguf

from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError, ConfigError
from llama_adapters import ARCHITECTURE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    save_tiny(directory / "single")
    save_tiny(directory / "sharded", max_shard_size="20KB")
    write_gguf(directory / "tiny.gguf", tiny_model())
    return directory


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_header(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def only_pickle(directory):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


def set_header_length(path, length):
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BROKEN_DIRECTORIES = {
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "missing"]),
    "bad json": (lambda d: (d / "config.json").write_text('{"model_type": '), ["config.json", "JSON"]),
    "json list": (lambda d: (d / "config.json").write_text("[1]"), ["config.json", "[1]"]),
    "other model": (lambda d: edit_config(d, model_type="gpt2"), ["config.json", "model_type", "'gpt2'"]),
    "text for a number": (lambda d: edit_config(d, hidden_size="wide"), ["config.json", "hidden_size", "wide"]),
    "heads that do not fit": (lambda d: edit_config(d, num_attention_heads=0), ["config.json"]),
    "unknown rope": (lambda d: edit_config(d, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ["config.json", "spiral"]),
    "quantised": (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), ["config.json", "'gptq'"]),
    "quantised, oddly": (lambda d: edit_config(d, quantization_config=[4]), ["config.json", "quantization_config"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors"]),
    "only pickles": (only_pickle, ["pytorch_model.bin", "convert"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), [NORM]),
    "missing head": (lambda d: edit_tensors(d, lambda t: t.pop("lm_head.weight")), ["lm_head.weight", "tie_word_embeddings"]),
    "wrong shape": (lambda d: edit_tensors(d, lambda t: t.update({UP: torch.ones(63, 32)})),
                    ["model.safetensors", UP, "[63, 32]", "[64, 32]"]),
    "integers": (lambda d: edit_tensors(d, lambda t: t.update({UP: torch.ones(64, 32, dtype=torch.int8)})),
                 ["model.safetensors", UP, "I8"]),
    "foreign tensor": (lambda d: edit_tensors(d, lambda t: t.update({"model.layers.0.extra": torch.ones(2)})),
                       ["model.safetensors", "model.layers.0.extra"]),
    "tied but different head": (lambda d: edit_config(d, tie_word_embeddings=True),
                                ["model.safetensors", "lm_head.weight", "tie_word_embeddings"]),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=3), ["model.layers.2."]),
    "truncated": (lambda d: truncate(d / "model.safetensors", 9000), ["model.safetensors", "9000"]),
    "truncated header": (lambda d: truncate(d / "model.safetensors", 5), ["model.safetensors", "5"]),
    "empty file": (lambda d: truncate(d / "model.safetensors", 0), ["model.safetensors", "0"]),
    "absurd header": (lambda d: set_header_length(d / "model.safetensors", 2**60), ["model.safetensors", str(2**60)]),
    "short header": (lambda d: set_header_length(d / "model.safetensors", 11), ["model.safetensors", "JSON"]),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]" + bytes(99)),
                        ["model.safetensors", "JSON"]),
    "appended bytes": (lambda d: append(d / "model.safetensors", b"more"), ["model.safetensors", "end at byte"]),
    "unknown dtype": (lambda d: edit_header(d / "model.safetensors", b'"model.norm.weight":{"dtype":"F32"',
                                            b'"model.norm.weight":{"dtype":"F99"'), ["model.safetensors", NORM, "F99"]),
    "gap in the file": (lambda d: edit_header(d / "model.safetensors", b'"model.norm.weight"', b'"model.norm.weighs"'),
                        ["model.norm.weighs"]),
}
BROKEN_SHARDS = {
    "missing shard": (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), ["model-00002-of-00003.safetensors"]),
    "index names an absent tensor": (lambda d: edit_index(d, lambda m: m.update({NORM: m["model.embed_tokens.weight"]})), [NORM]),
    "index without a tensor": (lambda d: edit_index(d, lambda m: m.pop(NORM)), [NORM]),
    "index leaves the directory": (lambda d: edit_index(d, lambda m: m.update({NORM: "../x.safetensors"})),
                                   [NORM, "../x.safetensors"]),
    "index without a map": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'),
                            ["model.safetensors.index.json", "weight_map"]),
    "index no json": (lambda d: (d / "model.safetensors.index.json").write_text("x"), ["model.safetensors.index.json"]),
}


def refusal(path, cache, **changes) -> str:
    with pytest.raises(CheckpointError) as caught:
        ARCHITECTURE.open(ModelConfig(path=str(path), cache_dir=str(cache), **changes))
    assert not cache.exists()
    message = str(caught.value)
    assert len(message.splitlines()) <= 2 and len(message) < 600, message
    return message


def copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("damage", BROKEN_DIRECTORIES)
def test_broken_directory(damage, whole, tmp_path):
    directory = copy(whole / "single", tmp_path / "model")
    do, named = BROKEN_DIRECTORIES[damage]
    do(directory)
    message = refusal(directory, tmp_path / "cache")
    assert all(text in message for text in [str(directory), *named]), message


@pytest.mark.parametrize("damage", BROKEN_SHARDS)
def test_broken_shards(damage, whole, tmp_path):
    directory = copy(whole / "sharded", tmp_path / "model")
    for path in directory.glob("*.safetensors"):
        path.rename(directory / re.sub(r"of-\d+", "of-00003", path.name))
    edit_index(directory, lambda m: m.update({k: re.sub(r"of-\d+", "of-00003", v) for k, v in m.items()}))
    do, named = BROKEN_SHARDS[damage]
    do(directory)
    message = refusal(directory, tmp_path / "cache")
    assert all(text in message for text in [str(directory), *named]), message


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "no/such/model", "missing.gguf", "~/no/such/model"])
def test_nothing_there(path, tmp_path):
    assert path.removeprefix("~") in refusal(path, tmp_path / "cache")


def test_the_hub_refuses(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("401 Client Error.\n\nRepository Not Found for url:\nmake sure you are authenticated.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = refusal("someone/some-llama", tmp_path / "cache", revision="v2")
    assert all(text in message for text in ("someone/some-llama", "'v2'", "Repository Not Found"))


def test_some_other_file(tmp_path):
    (tmp_path / "model.onnx").write_text("x")
    assert "model.onnx" in refusal(tmp_path / "model.onnx", tmp_path / "cache")


def test_revision_of_a_directory(whole, tmp_path):
    assert "'main'" in refusal(whole / "single", tmp_path / "cache", revision="main")


@pytest.mark.parametrize(("field", "value"), [("tokenizer", "world"), ("wkv", "fla")])
def test_what_is_for_rwkv_alone(whole, field, value):
    with pytest.raises(ConfigError, match=f"model.{field}: '{value}' is for RWKV6, .* is a Llama; remove it"):
        ARCHITECTURE.open(ModelConfig(path=str(whole / "single"), **{field: value}))


@pytest.mark.parametrize("size", [0, 3, 20, 200, 3000, 20_000])
def test_truncated_gguf(whole, tmp_path, size):
    (tmp_path / "cut.gguf").write_bytes((whole / "tiny.gguf").read_bytes()[:size])
    assert str(tmp_path / "cut.gguf") in refusal(tmp_path / "cut.gguf", tmp_path / "cache")


def test_gguf_with_an_absurd_length(whole, tmp_path):
    """A damaged array length must not make the reader collect empty values for ever."""
    data = (whole / "tiny.gguf").read_bytes()
    key = b"tokenizer.ggml.token_type"
    length_at = data.index(key) + len(key) + 8
    (tmp_path / "absurd.gguf").write_bytes(data[:length_at] + struct.pack("<Q", 2**60) + data[length_at + 8:])
    assert "absurd.gguf" in refusal(tmp_path / "absurd.gguf", tmp_path / "cache")


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    assert "text.gguf" in refusal(tmp_path / "text.gguf", tmp_path / "cache")


BAD_GGUFS = {
    "architecture": (dict(architecture="gptj"), ["general.architecture", "'gptj'"]),
    "missing tensor": (dict(skip=["blk.1.ffn_up.weight"]), ["model.layers.1.mlp.up_proj.weight"]),
    "foreign tensor": (dict(extra={"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}), ["blk.0.ffn_gate_exps.weight"]),
    "surplus layer": (dict(extra={"blk.7.ffn_up.weight": np.ones((64, 32), np.float32)}), ["blk.7.ffn_up.weight"]),
    "wrong shape": (dict(extra={"blk.1.ffn_up.weight": np.ones((63, 32), np.float32)}),
                    ["blk.1.ffn_up.weight", "[63, 32]", "[64, 32]"]),
}


@pytest.mark.parametrize("damage", BAD_GGUFS)
def test_unfit_gguf(damage, tmp_path):
    changes, named = BAD_GGUFS[damage]
    write_gguf(tmp_path / "bad.gguf", tiny_model(), **changes)
    message = refusal(tmp_path / "bad.gguf", tmp_path / "cache")
    assert all(text in message for text in ["bad.gguf", *named]), message


def test_damaged_tokenizer(whole, tmp_path):
    directory = copy(whole / "single", tmp_path / "model")
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    source = ARCHITECTURE.open(ModelConfig(path=str(directory)))
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        ARCHITECTURE.tokenizer(source)
    assert str(directory) in str(caught.value) and len(str(caught.value).splitlines()) <= 2
