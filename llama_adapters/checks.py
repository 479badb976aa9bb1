"""Whether a directory holds a whole Llama model, found out from its headers alone.

Everything wrong with it is a CheckpointError that names the file, the tensor or field, and its value.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bone_ds.errors import CheckpointError
from bone_ds.tensor_file import LARGEST_HEADER_BYTES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
               "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
_FORWARD_FIELDS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
                   "tie_word_embeddings")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_MOST_LAYERS = 2**12


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file; its bytes are [begin, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_config(directory: Path) -> LlamaConfig:
    """config.json as a LlamaConfig that can be built. Raises CheckpointError."""
    path = directory / "config.json"
    fields = _read_json(path, "a Hugging Face model directory has one")
    if fields.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {fields.get('model_type')!r}, only 'llama' is supported")
    if fields.get("quantization_config"):
        raise CheckpointError(f"{path}: quantization_config is {_short(fields['quantization_config'])}: quantised weights "
                              "can't be trained on, use the model in bf16 or fp32")
    try:
        config = LlamaConfig.from_dict(fields)
        parameter_shapes(config)
    except Exception as error:  # transformers raises a dozen kinds for a field it can't use
        raise CheckpointError(f"{path}: transformers can't build this model: {one_line(error)}") from None
    return config


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in the model's own order; a tied head is left out. Raises ValueError for absurdly many layers."""
    if config.num_hidden_layers > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, more than {_MOST_LAYERS}")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def read_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor the directory's safetensors files offer, from their headers. Raises CheckpointError."""
    if (directory / SINGLE).exists():
        return _read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _read_sharded(directory / INDEX)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(f"{directory / pickles[0]}: pickled weights are not read, they can run code; convert them to "
                              "safetensors\n(transformers: from_pretrained, then save_pretrained)")
    raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}")


def check_tensors(config: LlamaConfig, tensors: dict[str, Stored], directory: Path) -> dict[str, Stored]:
    """The stored tensors of exactly the model's parameters, in their order. Raises CheckpointError."""
    wanted = parameter_shapes(config)
    for name in tensors.keys() - wanted.keys():
        _check_superfluous(name, config, tensors)
    for name, shape in wanted.items():
        if name not in tensors:
            tied = " (config.json says tie_word_embeddings: false)" if name == "lm_head.weight" else ""
            raise CheckpointError(f"{directory}: the weights lack the tensor {name}{tied}")
        stored = tensors[name]
        if stored.shape != shape:
            raise CheckpointError(f"{stored.file}: {name} has shape {list(stored.shape)}, config.json implies {list(shape)}")
        if stored.dtype not in _WEIGHT_DTYPES:
            raise CheckpointError(f"{stored.file}: {name} has dtype {stored.dtype}, weights must be one of "
                                  f"{', '.join(_WEIGHT_DTYPES)}")
    return {name: tensors[name] for name in wanted}


def forward_fields(config: LlamaConfig) -> bytes:
    """What of config.json decides the outputs and can't be told from the tensors."""
    fields = {name: getattr(config, name) for name in _FORWARD_FIELDS}
    fields["rope_parameters"] = {name: value for name, value in config.rope_parameters.items() if value is not None}
    return json.dumps(fields, sort_keys=True).encode()


def tokenizer_fields(directory: Path) -> bytes:
    """What of the tokenizer's files decides the tokens of a text, and where it begins and ends. Raises CheckpointError."""
    if not (directory / "tokenizer.json").exists():
        return b"".join((directory / name).read_bytes() for name in ("tokenizer.model", "vocab.json", "merges.txt")
                        if (directory / name).exists())
    fields, settings = (_read_json(directory / name, "") if (directory / name).exists() else {} for name in _TOKENIZER)
    ends = [given.get("content") if isinstance(given := settings.get(name), dict) else given for name in ("bos_token", "eos_token")]
    return json.dumps([fields, *ends, settings.get("add_bos_token")], sort_keys=True).encode()


def check_tokenizer(directory: Path) -> None:
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{directory}: holds no tokenizer, one of {', '.join(TOKENIZER_FILES)} is needed")


def sample(stored: Stored, size_bytes: int = 4096) -> bytes:
    """The first and the last bytes of a tensor."""
    with open(stored.file, "rb") as file:
        file.seek(stored.begin)
        first = file.read(min(size_bytes, stored.end - stored.begin))
        file.seek(max(stored.begin, stored.end - size_bytes))
        return first + file.read(min(size_bytes, stored.end - stored.begin))


def _check_superfluous(name: str, config: LlamaConfig, tensors: dict[str, Stored]) -> None:
    """Old files store rotary tables, and some a copy of the embedding as the head; anything else isn't this model."""
    stored = tensors[name]
    if name.endswith(".rotary_emb.inv_freq"):
        return
    if name == "lm_head.weight" and config.tie_word_embeddings:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding and (stored.dtype, stored.shape, sample(stored)) == (embedding.dtype, embedding.shape, sample(embedding)):
            return
        raise CheckpointError(f"{stored.file}: lm_head.weight differs from the embedding, but config.json says "
                              "tie_word_embeddings: true; correct the one that is wrong")
    raise CheckpointError(f"{stored.file}: the tensor {name} is no part of the model that config.json describes")


def _read_sharded(index: Path) -> dict[str, Stored]:
    weight_map = _read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {_short(weight_map)}, not a map from tensor to file")
    shards = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {tensor} lies in {_short(name)}, not in a file of this directory")
        if name not in shards:
            shards[name] = _read_header(index.parent / name)
        if tensor not in shards[name]:
            raise CheckpointError(f"{index.parent / name}: lacks the tensor {tensor} that {INDEX} places there")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file: 8 bytes of header length, a JSON header, then the tensors without gaps."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(LARGEST_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: is no whole safetensors file: its header claims {length} bytes, "
                                      f"the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is no safetensors file, its header is no JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is no safetensors file, its header holds {_short(header)}")
    header.pop("__metadata__", None)
    tensors = {name: _read_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def _read_entry(path: Path, name: str, entry: dict, data_start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        right = end - begin == math.prod(shape) * _ITEM_BYTES[dtype] and all(size >= 0 for size in shape)
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise CheckpointError(f"{path}: the header's entry for {name} is wrong: {_short(entry)}")
    return Stored(path, dtype, shape, data_start + begin, data_start + end)


def _check_extent(path: Path, tensors: dict[str, Stored], data_start: int, size: int) -> None:
    """The tensors follow each other and end with the file."""
    position = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position:
            raise CheckpointError(f"{path}: {name} starts at byte {stored.begin}, not {position}; the file is damaged")
        if stored.end > size:
            raise CheckpointError(f"{path}: {name} ends at byte {stored.end} but the file has {size}; copy or download it again")
        position = stored.end
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position} but the file has {size}; the file is damaged")


def _read_json(path: Path, hint: str) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds {_short(fields)}, not a JSON object")
    return fields


def one_line(error: Exception) -> str:
    """Another library's message, fit to stand in one of ours."""
    return _short(" ".join(str(error).split()), 200)


def _short(value: object, limit: int = 80) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[:limit - 3] + "..."
