"""Models of official sizes with random bf16 weights: what they cost is what trained ones cost.

A block of small values is repeated, so that a file is written as fast as the disk takes it; norms are 1, so that hidden states neither
overflow nor vanish.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rwkv_adapters.model import Sizes, parameter_shapes

RWKV6 = {
    "1.6b": Sizes(layers=24, width=2048, attention_width=2048, heads=32, ffn_width=7168, vocabulary=65536, mix_rank=32, decay_rank=64),
    "3b": Sizes(layers=32, width=2560, attention_width=2560, heads=40, ffn_width=8960, vocabulary=65536, mix_rank=32, decay_rank=64),
    "7b": Sizes(layers=32, width=4096, attention_width=4096, heads=64, ffn_width=14336, vocabulary=65536, mix_rank=64, decay_rank=128),
    "tiny": Sizes(layers=2, width=128, attention_width=128, heads=2, ffn_width=448, vocabulary=65536, mix_rank=32, decay_rank=64),
}
LLAMA = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 320, "num_attention_heads": 2, "vocab_size": 2000},
}
_BLOCK_VALUES = 10_000_019  # prime: no two rows of a matrix are equal


def write_rwkv6(size: str, directory: Path) -> Path:
    """A file in the official layout, unless it is there."""
    path = directory / f"rwkv6-{size}.safetensors"
    if not path.exists():
        _write(path, parameter_shapes(RWKV6[size]))
    return path


def write_llama(size: str, directory: Path, text: Path) -> Path:
    """A Hugging Face directory, unless it is there, with a byte-level tokenizer of its own, made from the text."""
    path = directory / f"llama-{size}"
    if not (path / "model.safetensors").exists():
        config = LlamaConfig(**LLAMA[size], max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
        path.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(path)
        _tokenizer(text, config.vocab_size).save_pretrained(path)
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in LlamaForCausalLM(config).named_parameters()}
        _write(path / "model.safetensors", shapes)
    return path


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file, without the model ever being in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    block = (torch.randn(_BLOCK_VALUES, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.int16).numpy().data
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            if len(shape) == 1 and name.endswith("weight"):
                file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.int16).numpy().data)
                continue
            left = math.prod(shape)
            while left:
                count = min(left, _BLOCK_VALUES)
                file.write(block[:count])
                left -= count
    aside.rename(path)


def _tokenizer(text: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
