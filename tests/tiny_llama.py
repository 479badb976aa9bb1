"""Tiny random Llamas: in memory, saved by transformers, as one GGUF file, and with a random adapter."""

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from whole_on_cpu import WholeOnCpu

from bone_ds import adapter_file, checksums
from bone_ds.checksums import Checksums
from bone_ds.config import ModelConfig, RunConfig
from bone_ds.inject import inject
from llama_adapters import ARCHITECTURE, attention, gguf_conversion


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                          "bos_token_id": 1, "eos_token_id": 2} | changes)


def tiny_tokens() -> dict[str, int]:
    """A byte-level vocabulary of the 96 tokens that the tiny models know."""
    letters = [chr(code) for code in range(33, 125)]
    return {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters, "ab"])}


def save_tiny(directory, **changes) -> LlamaForCausalLM:
    """A random model and a tokenizer, saved by transformers."""
    torch.manual_seed(0)
    shard = changes.pop("max_shard_size", "1GB")
    dtype = changes.pop("dtype", torch.float32)
    model = LlamaForCausalLM(tiny_config(**changes)).to(dtype)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    tokenizer = Tokenizer(models.BPE(vocab=tiny_tokens(), merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return model


def opened(path, **changes):
    return ARCHITECTURE.open(ModelConfig(path=str(path), **changes))


def built_and_loaded(source, dtype=torch.float32, checksums=None):
    placement = WholeOnCpu()
    with placement.empty():
        model = ARCHITECTURE.build(source, dtype)
    for param in model.parameters():
        param.data.fill_(float("nan"))
    ARCHITECTURE.load(model, source, placement, checksums)
    return model


def logits(model, tokens):
    return attention.hidden(model, tokens, (tokens.shape[1],)) @ ARCHITECTURE.head(model).T


def tiny_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes))


def random_adapter(directory, path, dtype="fp32", **adapter):
    """A random adapter for the base in `directory`, written to `path`; returns the base with it, through our own forward."""
    config = RunConfig.model_validate({
        "model": {"path": str(directory), "dtype": dtype}, "adapter": adapter, "data": {"train": "train.jsonl"},
        "output": {"directory": "run"}})
    source, base = opened(directory), Checksums()
    model = built_and_loaded(source, checksums=base)
    trainable = inject(model, ARCHITECTURE, config.adapter)
    torch.manual_seed(1)
    for parameter in trainable.values():
        torch.nn.init.normal_(parameter, std=0.05)
    adapter_file.write(path, adapter_file.header_of(config, ARCHITECTURE, source, 3, checksums.record(base.values)), trainable)
    return model


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation of query and key rows, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {hf: short for short, hf in gguf_conversion._LAYER_NAMES.items()}


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names and in its row order."""
    outer = {hf: name for name, hf in gguf_conversion._OUTER_NAMES.items()}
    tensors = {}
    for name, param in model.named_parameters():
        values = param.detach().numpy()
        if "q_proj" in name:
            values = llama_cpp_rows(values, model.config.num_attention_heads)
        if "k_proj" in name:
            values = llama_cpp_rows(values, model.config.num_key_value_heads)
        if name not in outer:
            _, _, layer, short, _ = name.replace("self_attn.", "self_attn:").replace("mlp.", "mlp:").split(".")
            name = f"blk.{layer}.{GGUF_NAMES[short.replace(':', '.')]}.weight"
        tensors[outer.get(name, name)] = values
    return tensors


def write_gguf(path, model, *, quantised=None, architecture="llama", extra=(), skip=()):
    """The model and a byte-level tokenizer in one GGUF file."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tiny_tokens()))
    writer.add_token_types([2, 3, 3] + [1] * 93)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, values in (gguf_tensors(model) | dict(extra)).items():
        if name in skip:
            continue
        if quantised is not None and values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
