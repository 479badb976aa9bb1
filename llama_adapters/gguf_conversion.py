"""A Llama in one GGUF file, converted once to a Hugging Face directory that is kept in a cache.

The weights are unpacked tensor by tensor from mapped memory, so no more than one shard of the model is ever held.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from gguf import GGUFReader, ReaderTensor, dequantize
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bone_ds.checksums import stating
from bone_ds.errors import CheckpointError
from bone_ds.tensor_file import save_file
from llama_adapters import checks

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LAYOUT = 1
"""Raise it when converted directories change, so that cached ones are made anew."""

_SHARD_BYTES = 256 * 2**20
_MOST_VALUES = 2**22
"""In a header; the largest vocabularies have a quarter of a million tokens and twice as many merges."""
_ROPE_FACTORS = "rope_freqs.weight"

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_once(gguf: Path, dtype: str, cache_dir: Path) -> Path:
    """The cached directory of this file's content in `dtype` (bf16 or fp32), made if it isn't there yet.

    Of several processes one converts and the others wait. Raises CheckpointError; nothing half-made stays.
    """
    directory = cache_dir / f"{gguf.stem}-{dtype}-{_content_key(gguf)}"
    if directory.is_dir():
        return directory
    config, weights = read(gguf)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():
                _write(directory, gguf, config, weights, _DTYPES[dtype])
    except OSError as error:
        raise CheckpointError(f"{cache_dir}: {gguf.name} can't be converted there: {error.strerror or error}; "
                              "set model.cache_dir") from None
    return directory


def read(gguf: Path) -> tuple[LlamaConfig, dict[str, ReaderTensor]]:
    """The model that the header describes, and the mapped tensor of each parameter. Raises CheckpointError where they don't fit."""
    reader = _read(gguf)
    config = _config(gguf, reader)
    return config, _match(gguf, reader, config)


def tensor_to_torch(tensor: ReaderTensor, dtype: torch.dtype, config: LlamaConfig) -> torch.Tensor:
    """One tensor unpacked, in Hugging Face's row order and in `dtype`."""
    values = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        values = _rows_to_halves(values, config.num_attention_heads)
    if tensor.name.endswith("attn_k.weight"):
        values = _rows_to_halves(values, config.num_key_value_heads)
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(dtype)


class _BoundedReader(GGUFReader):
    """GGUFReader that notices when a field lies beyond the end of the file, instead of reading nothing for ever, and too many of them."""

    _values = 0

    def _get_field_parts(self, orig_offs, raw_type):
        self._values += 1
        if self._values > _MOST_VALUES:
            raise ValueError(f"its header holds more than {_MOST_VALUES} values")
        return super()._get_field_parts(orig_offs, raw_type)

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, its header reaches to {end}")
        return super()._get(offset, dtype, count, override_order)


def _content_key(gguf: Path) -> str:
    """Hash of the file's size and the first 64 KiB of every 4 MiB: every layer is sampled, the whole is never read."""
    digest = hashlib.sha256(f"{_LAYOUT}".encode())
    try:
        with open(gguf, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for offset in range(0, size, 4 * 2**20):
                file.seek(offset)
                digest.update(file.read(64 * 2**10))
    except OSError as error:
        raise CheckpointError(f"{gguf}: can't be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _read(gguf: Path) -> GGUFReader:
    try:
        reader = _BoundedReader(gguf)
    except Exception as error:  # the reader raises whatever a damaged header leads it into
        raise CheckpointError(f"{gguf}: is no whole GGUF file: {checks.one_line(error)}") from None
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{gguf}: general.architecture is {architecture!r}, only 'llama' is supported")
    scaling = _field(reader, "llama.rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(f"{gguf}: llama.rope.scaling.type is {scaling!r}, which isn't converted; "
                              "use the model's Hugging Face directory")
    _check_layout(gguf, reader)
    return reader


def _check_layout(gguf: Path, reader: GGUFReader) -> None:
    """The tensors follow each other, each at the next multiple of the alignment, as every writer leaves them."""
    position = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        if tensor.data_offset != position:
            raise CheckpointError(f"{gguf}: {tensor.name} starts at byte {tensor.data_offset}, not {position}; the file is damaged")
        position += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


def _field(reader: GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _config(gguf: Path, reader: GGUFReader) -> LlamaConfig:
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        checks.parameter_shapes(config)
    except Exception as error:  # transformers raises a dozen kinds for a field it can't use
        raise CheckpointError(f"{gguf}: transformers can't build this model: {checks.one_line(error)}") from None
    config.architectures = ["LlamaForCausalLM"]
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            _set_llama3_rope(gguf, config, torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    return config


def _set_llama3_rope(gguf: Path, config: LlamaConfig, factors: torch.Tensor) -> None:
    """Llama 3's frequency scaling: the file holds its outcome, factors (D/2,); config.json wants its parameters."""
    unscaled = LlamaRotaryEmbedding(config).inv_freq
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": config.rope_parameters["rope_theta"], "factor": factors.max().item(),
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = LlamaRotaryEmbedding(config).inv_freq
    if factors.shape != scaled.shape or not torch.allclose(unscaled / factors, scaled, rtol=1e-4, atol=0):
        raise CheckpointError(f"{gguf}: {_ROPE_FACTORS} holds a frequency scaling other than Llama 3's, which isn't "
                              "converted; use the model's Hugging Face directory")


def _match(gguf: Path, reader: GGUFReader, config: LlamaConfig) -> dict[str, ReaderTensor]:
    """The file's tensor for each of the model's parameters. Raises CheckpointError where they don't fit."""
    found = {_hugging_face_name(gguf, tensor.name): tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS}
    wanted = checks.parameter_shapes(config)
    for name, tensor in found.items():
        if name not in wanted:
            raise CheckpointError(f"{gguf}: {tensor.name} is no part of the model that its header describes")
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{gguf}: lacks the tensor for {name}")
        stored = tuple(int(size) for size in reversed(found[name].shape))
        if stored != shape:
            raise CheckpointError(f"{gguf}: {found[name].name} has shape {list(stored)}, its header implies {list(shape)}")
        _check_type(gguf, found[name])
    return {name: found[name] for name in wanted}


def _hugging_face_name(gguf: Path, name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not match or match[2] not in _LAYER_NAMES:
        raise CheckpointError(f"{gguf}: the tensor {name} is no part of a Llama that can be converted")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _check_type(gguf: Path, tensor: ReaderTensor) -> None:
    try:
        dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        raise CheckpointError(f"{gguf}: {tensor.name} is stored as {tensor.tensor_type.name}, which can't be unpacked") from None


def _write(directory: Path, gguf: Path, config: LlamaConfig, weights: dict[str, ReaderTensor], dtype: torch.dtype) -> None:
    """Writes beside `directory` and renames at the end, so a directory that exists is whole."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _write_tokenizer(part, gguf)
        config.dtype = dtype
        config.save_pretrained(part)
        _write_shards(part, config, weights, dtype)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_tokenizer(part: Path, gguf: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds
        raise CheckpointError(f"{gguf}: its tokenizer can't be converted: {checks.one_line(error)}") from None
    tokenizer.save_pretrained(part)


def _write_shards(part: Path, config: LlamaConfig, weights: dict[str, ReaderTensor], dtype: torch.dtype) -> None:
    shards = _shards(weights, dtype)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor_to_torch(weights[name], dtype, config) for name in names}
        save_file(tensors, part / file, {"format": "pt"} | stating(tensors))
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.n_elements for tensor in weights.values()) * dtype.itemsize
    index = {"metadata": {"total_size": int(total)}, "weight_map": weight_map}
    (part / checks.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(weights: dict[str, ReaderTensor], dtype: torch.dtype) -> list[list[str]]:
    """The names in order, cut so that a shard of more than one tensor stays within _SHARD_BYTES."""
    shards, used = [], _SHARD_BYTES
    for name, tensor in weights.items():
        size = tensor.n_elements * dtype.itemsize
        if used + size > _SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _rows_to_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores the rows of each query and key head in rotary pairs, Hugging Face all first halves, then all second."""
    out, columns = values.shape
    return values.reshape(heads, out // heads // 2, 2, columns).swapaxes(1, 2).reshape(out, columns)
