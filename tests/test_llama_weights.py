"""Opening, building and loading models, and converting GGUF files."""

import json
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_llama import WholeOnCpu, built_and_loaded, logits, opened, save_tiny, tiny_model, tiny_tokens, write_gguf
from transformers import LlamaForCausalLM

from bone_ds.arch import Architecture
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from llama_adapters import ARCHITECTURE, attention, gguf_conversion, weights

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def test_it_is_an_architecture():
    for name in vars(Architecture):
        if not name.startswith("_"):
            assert hasattr(ARCHITECTURE, name), name


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_model_equals_plain_transformers(tmp_path, variant, shard):
    save_tiny(tmp_path, max_shard_size=shard, **VARIANTS[variant])
    source = opened(tmp_path)
    model = built_and_loaded(source)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(3, 43)[None]
    torch.testing.assert_close(logits(model, tokens), plain(input_ids=tokens).logits[0], rtol=1e-6, atol=1e-5)
    assert weights.weight_files(source) == sorted(tmp_path.glob("*.safetensors"))
    assert all(param.isfinite().all() for param in model.parameters())
    assert not model.config.use_cache


def test_bf16_load_rounds_weights_but_not_rotary_tables(tmp_path):
    whole = save_tiny(tmp_path, **VARIANTS["llama3-rope"])
    model = built_and_loaded(opened(tmp_path), torch.bfloat16)
    assert all(param.dtype == torch.bfloat16 for param in model.parameters())
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight.bfloat16())
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    assert torch.get_default_dtype() == torch.float32


def test_load_mends_rotary_tables_that_construction_rounded(tmp_path):
    whole = save_tiny(tmp_path)
    source = opened(tmp_path)
    model = ARCHITECTURE.build(source, torch.bfloat16)
    model.model.rotary_emb.to(torch.bfloat16)
    ARCHITECTURE.load(model, source, WholeOnCpu())
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_the_attention_is_not_written_to_disk(tmp_path):
    save_tiny(tmp_path / "model")
    model = built_and_loaded(opened(tmp_path / "model"))
    model.save_pretrained(tmp_path / "again")
    assert attention.NAME not in (tmp_path / "again" / "config.json").read_text()
    tokens = torch.arange(3, 20)[None]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(input_ids=tokens).logits[0], logits(model, tokens), rtol=1e-6, atol=1e-5)


def test_fingerprint_knows_the_model_and_not_its_files(tmp_path):
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    prints = {name: opened(tmp_path / name).fingerprint for name in ("one", "sharded", "copy", "half")}
    assert prints["one"] == prints["sharded"] == prints["copy"] != prints["half"]

    weights = (tmp_path / "copy" / "model.safetensors").read_bytes()
    (tmp_path / "copy" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert opened(tmp_path / "copy").fingerprint != prints["one"]


def test_old_rotary_tables_and_a_copied_head_are_harmless(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, tie_word_embeddings=True)
    fingerprint = opened(tmp_path).fingerprint
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert opened(tmp_path).fingerprint == fingerprint


def test_tokenizer(tmp_path):
    save_tiny(tmp_path)
    tokenizer = ARCHITECTURE.tokenizer(opened(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("ab").input_ids == [tiny_tokens()["a"], tiny_tokens()["b"]]


def test_a_hub_id_is_recorded_with_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "0123abcd"
    save_tiny(snapshot)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = opened("someone/some-llama", revision="main")
    assert (source.origin, source.revision, source.path) == ("someone/some-llama", "0123abcd", snapshot)
    assert asked["repo"] == "someone/some-llama" and asked["revision"] == "main"
    assert not any("bin" in pattern or pattern.endswith(".py") for pattern in asked["allow_patterns"])


def test_without_weights_nothing_of_them_is_fetched(tmp_path, monkeypatch):
    save_tiny(tmp_path / "commit", max_position_embeddings=48)
    (tmp_path / "commit/model.safetensors").unlink()
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "commit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = ARCHITECTURE.without_weights(ModelConfig(path="someone/some-llama", revision="main"))
    assert ARCHITECTURE.tokenizer(source)("ab")["input_ids"] and ARCHITECTURE.context_length(source) == 48
    ((name, options),) = asked
    assert name == "someone/some-llama" and options["revision"] == "main"
    assert not [pattern for pattern in options["allow_patterns"] if "safetensors" in pattern]


def test_recognises(tmp_path):
    save_tiny(tmp_path / "llama")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert ARCHITECTURE.recognises(str(tmp_path / "llama")) and ARCHITECTURE.recognises("someone/some-llama")
    assert not ARCHITECTURE.recognises(str(tmp_path / "other")) and not ARCHITECTURE.recognises("model.pth")


@pytest.mark.parametrize("variant", ["gqa", "tied", "mha"])
def test_gguf_converts_to_the_bit(tmp_path, variant, monkeypatch):
    monkeypatch.setattr(gguf_conversion, "_SHARD_BYTES", 20_000)
    model = tiny_model(**VARIANTS[variant])
    write_gguf(tmp_path / "tiny.gguf", model)
    source = opened(tmp_path / "tiny.gguf", dtype="fp32", cache_dir=str(tmp_path / "cache"))
    assert len(weights.weight_files(source)) > 1
    loaded = dict(built_and_loaded(source).named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(loaded[name], param), name
    tokenizer = ARCHITECTURE.tokenizer(source)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert opened(tmp_path / "tiny.gguf", dtype="fp32", cache_dir=str(tmp_path / "cache")) == source
    assert not list((tmp_path / "cache").glob("*.part"))


def test_quantised_gguf_in_bf16(tmp_path):
    model = tiny_model()
    write_gguf(tmp_path / "tiny.gguf", model, quantised=GGMLQuantizationType.Q8_0)
    source = opened(tmp_path / "tiny.gguf", dtype="bf16", cache_dir=str(tmp_path / "cache"))
    assert json.loads((source.path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = dict(built_and_loaded(source, torch.bfloat16).named_parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(loaded[name].float(), param.float(), rtol=2e-2, atol=1e-3, msg=name)


def test_llama3_frequencies_are_recognised_in_a_gguf(tmp_path):
    model, unscaled = tiny_model(head_dim=16, **VARIANTS["llama3-rope"]), tiny_model(head_dim=16)
    factors = (unscaled.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    write_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": factors})
    source = opened(tmp_path / "tiny.gguf", dtype="fp32", cache_dir=str(tmp_path / "cache"))
    torch.testing.assert_close(built_and_loaded(source).model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_unknown_frequency_scaling_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), extra={"rope_freqs.weight": np.float32([1, 2, 3, 4])})
    with pytest.raises(CheckpointError, match="rope_freqs.weight"):
        opened(tmp_path / "tiny.gguf", cache_dir=str(tmp_path / "cache"))


def test_one_converts_and_the_others_wait(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    write, writes, others = gguf_conversion._write, [], []

    def convert():
        return gguf_conversion.convert_once(tmp_path / "tiny.gguf", "fp32", tmp_path / "cache")

    def write_while_another_waits(*args):
        writes.append(args)
        others.append(threading.Thread(target=convert))
        others[0].start()
        others[0].join(0.5)
        assert others[0].is_alive(), "the other didn't wait"
        write(*args)

    monkeypatch.setattr(gguf_conversion, "_write", write_while_another_waits)
    assert convert().is_dir()
    others[0].join(20)
    assert len(writes) == 1 and not others[0].is_alive()


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_model())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_conversion, "_write_shards", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        opened(tmp_path / "tiny.gguf", cache_dir=str(tmp_path / "cache"))
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_real_gguf_equals_transformers_to_the_bit(smollm2_gguf, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache = tmp_path_factory.mktemp("cache")
    source = opened(smollm2_gguf, dtype="fp32", cache_dir=str(cache))
    model = built_and_loaded(source)
    plain = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    theirs = dict(plain.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert torch.equal(param, theirs[name]), name

    tokenizer = ARCHITECTURE.tokenizer(source)
    direct = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    text = "Natalia sold 48 clips  in\nApril. <|im_end|> ü"
    assert tokenizer(text).input_ids == direct(text).input_ids
    assert tokenizer.chat_template == direct.chat_template is not None
    assert (tokenizer.bos_token, tokenizer.eos_token) == (direct.bos_token, direct.eos_token) == ("<|im_start|>", "<|im_end|>")

    tokens = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), plain(input_ids=tokens).logits[0], rtol=1e-5, atol=1e-4)
    shutil.rmtree(cache)


def test_loading_holds_one_tensor_at_a_time(tmp_path):
    """Here the embedding and the head, which are nearly all of the file, one after the other."""
    save_tiny(tmp_path, vocab_size=200_000)
    source = opened(tmp_path)
    with torch.device("meta"):
        model = ARCHITECTURE.build(source, torch.float32)
    held_bytes = []

    class ReadAndForgotten:
        def assign(self, param, tensor):
            assert torch.isfinite(tensor.sum())  # which reads all of it
            held_bytes.append(resident_bytes())

    before = resident_bytes()
    ARCHITECTURE.load(model, source, ReadAndForgotten())
    file_bytes = sum(path.stat().st_size for path in weights.weight_files(source))
    assert file_bytes > 30 * 2**20
    assert 0.2 * file_bytes < max(held_bytes) - before < 0.8 * file_bytes, (before, max(held_bytes), file_bytes)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
