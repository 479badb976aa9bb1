"""A merged directory is what plain transformers makes of it: the base with its adapter, and no trace of unmerged weights."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import built_and_loaded, logits, opened, random_adapter, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from bone_ds.errors import ConfigError
from bone_ds.merge import merge
from llama_adapters import rewriting

TOKENS = torch.arange(3, 43)[None]
BASES = {"single": {}, "sharded": {"max_shard_size": "20KB"}, "tied": {"tie_word_embeddings": True}}
ADAPTERS = {
    "row": {"grouping": "row", "rank": 8},
    "col": {"grouping": "col", "rank": 16},
    "left": {"grouping": "left", "rank": 16},
    "free": {"grouping": "free", "rank": 8, "groups": 8},
    "miss with a shorter last shard": {"grouping": "miss", "rank": 12},
    "hadamard": {"grouping": "col", "rank": 8, "form": "hadamard"},
    "unconstrained": {"grouping": "row", "rank": 8, "form": "unconstrained"},
    "unconstrained free": {"grouping": "free", "rank": 8, "groups": 2, "form": "unconstrained"},
    "some layers and targets": {"rank": 8, "targets": ["k_proj", "down_proj"], "layers": [1, 2]},
    "lora": {"method": "lora", "rank": 4},
    "lora with alpha": {"method": "lora", "rank": 4, "alpha": 10.0},
    "full": {"method": "full"},
}


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", BASES)
def test_plain_transformers_gives_base_plus_adapter(tmp_path, kind, adapter):
    save_tiny(tmp_path / "base", **BASES[kind])
    model = random_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", **ADAPTERS[adapter])
    source = merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert source.origin == str(tmp_path / "base")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        merged, adapted = plain(input_ids=TOKENS).logits[0], logits(model, TOKENS)
        unadapted = logits(built_and_loaded(source), TOKENS)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - unadapted).abs().max() > 0.01
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 96
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(path.name for path in (tmp_path / "base").iterdir())


def test_a_bf16_base_stays_bf16_and_is_rounded_once(tmp_path):
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    model = random_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", dtype="bf16", grouping="col", rank=8)
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(after[f"{name}.weight"], model.get_submodule(name).merged_weight(torch.bfloat16))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "proj" not in name}


def test_shards_keep_their_index_metadata_and_split(tmp_path, base):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_text() == (base / index).read_text()
    shards = set(json.loads((base / index).read_text())["weight_map"].values())
    assert len(shards) > 2
    for shard in shards:
        with safe_open(base / shard, "pt") as before, safe_open(tmp_path / "merged" / shard, "pt") as after:
            assert before.keys() == after.keys() and before.metadata() == after.metadata()


def test_other_weights_are_not_copied_and_other_files_are(tmp_path):
    save_tiny(tmp_path / "base")
    unmerged = ["pytorch_model.bin", "consolidated.00.pth", "old.pt", "model.Q4.gguf", "stray.safetensors", "tf_model.h5",
                "pytorch_model.bin.index.json", "model.safetensors.index.json"]
    for name in [*unmerged, "chat_template.jinja", "README.md", "generation_config.json"]:
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base" / "onnx").mkdir()
    random_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", rank=8)
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    copied = {path.name for path in (tmp_path / "merged").iterdir()}
    assert copied.isdisjoint([*unmerged, "onnx"])
    assert copied >= {"chat_template.jinja", "README.md", "generation_config.json", "config.json", "tokenizer.json", "model.safetensors"}


def test_a_tied_head_that_is_stored_twice_stays_the_embedding(tmp_path):
    save_tiny(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    model = random_adapter(tmp_path / "base", tmp_path / "adapter.safetensors", method="full")
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    torch.testing.assert_close(logits(built_and_loaded(opened(tmp_path / "merged")), TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["merged.pth", "merged.safetensors", "merged.gguf"])
def test_a_name_of_a_file_is_refused(tmp_path, base, name):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    with pytest.raises(ConfigError, match=f"--out: .*{name}: a Llama is written as a directory"):
        merge(tmp_path / "adapter.safetensors", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_base_that_has_moved(tmp_path, base):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    base.rename(tmp_path / "moved")
    merge(tmp_path / "adapter.safetensors", tmp_path / "deep/in/merged", base=str(tmp_path / "moved"))
    assert (tmp_path / "deep/in/merged/config.json").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_merge_that_fails_midway_leaves_nothing(tmp_path, base, monkeypatch, failure):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    written = []

    def save_one(tensors, path, metadata):
        if written:
            raise failure
        written.append(path)
        path.touch()

    monkeypatch.setattr(rewriting, "save_file", save_one)
    with pytest.raises(ConfigError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert len(written) == 1 and written[0].parent.name == "merged.partial"
    if isinstance(failure, OSError):
        assert "merged: can't be written" in str(caught.value) and "No space left" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


def test_what_a_killed_merge_left_is_no_obstacle(tmp_path, base):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial/half.safetensors").write_text("x")
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists() and not (tmp_path / "merged/half.safetensors").exists()
