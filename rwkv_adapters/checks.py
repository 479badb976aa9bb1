"""Reading a file of tensors without reading its data, and whether they are a whole RWKV6 model.

Everything wrong is a CheckpointError that names the file, the tensor, and its value. Nothing in a file is ever run.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bone_ds.checksums import crc32
from bone_ds.errors import CheckpointError
from bone_ds.tensor_file import open_file
from rwkv_adapters.model import MIXES, Sizes, parameter_shapes

SUFFIXES = (".pth", ".safetensors")
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Of the dtypes that weights may have, as safetensors calls them."""

_OTHERS = (
    (".att.r_k", "RWKV-7"), (".ffn.time_maa_k", None), (".att.ln_x.", "RWKV-5"), (".att.time_first", "RWKV-4"),
    (".att.time_mix_k", "RWKV-4"), ("model.", "a Hugging Face model (give its directory)"), (".time_state", "a state file"),
    (".bone", "an adapter"), (".disha", "an adapter"), (".lora_A", "an adapter"))
"""What a file is by a part of its tensors' names, None for RWKV6; the first that is found counts."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .pth or .safetensors file in mapped memory: it costs none until it is used. Raises CheckpointError."""
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None


def check_tensors(tensors: dict[str, Tensor], path: Path) -> Sizes:
    """The sizes of the model that the tensors are: each of its parameters and nothing else. Raises CheckpointError."""
    _check_version(tensors, path)
    sizes = _sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    wanted = parameter_shapes(sizes)
    for name in tensors.keys() - wanted.keys():
        raise CheckpointError(f"{path}: the tensor {name} is no part of an RWKV6 model of {sizes.layers} layers")
    for name, shape in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: lacks the tensor {name}")
        tensor = tensors[name]
        if _squeezed(tensor.shape) != _squeezed(shape):
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, the other tensors imply {list(shape)}")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} is {kind}, weights must be plain float32, float16 or bfloat16")
    return sizes


def sample(tensor: Tensor, size_bytes: int = 4096) -> bytes:
    """The first and the last bytes of a tensor."""
    values = tensor.reshape(-1)
    count = min(len(values), size_bytes // tensor.itemsize)
    return b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in (values[:count], values[len(values) - count:]))


def one_line(error: Exception, limit: int = 200) -> str:
    """Another library's message, fit to stand in one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit - 3] + "..."


class Records:
    """What the archive of a .pth says of the data in it: its CRC-32s. Files say nothing that are .safetensors, or were saved without."""

    def __init__(self, path: Path):
        self._path = path
        entries, are_checksums = ([], False) if path.suffix == ".safetensors" else _entries(path)
        self._known = {(entry.file_size, f"{entry.CRC:08x}") for entry in entries} if are_checksums else None
        self._whole: set[int] = set()

    def check(self, name: str, tensor: Tensor, taken: Future[str] | None) -> None:
        """taken: the tensor's CRC-32; None: it is checked elsewhere. Raises CheckpointError for data that the archive does not hold."""
        if self._known is None or taken is None:
            return
        storage = tensor.untyped_storage()
        if tensor.is_contiguous() and tensor.nbytes == storage.nbytes():
            found = taken.result()
        elif storage.data_ptr() in self._whole:
            return
        else:  # a part of what other tensors are parts of too
            found = crc32(torch.empty(0, dtype=torch.uint8).set_(storage))
            self._whole.add(storage.data_ptr())
        if (storage.nbytes(), found) not in self._known:
            raise CheckpointError(f"{self._path}: is damaged: the data of {name} has not the CRC-32 that the archive says; copy or "
                                  "download it again")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with open_file(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no whole safetensors file: {one_line(error)}") from None


def _read_pth(path: Path) -> dict[str, Tensor]:
    record_sizes = _check_archive(path)
    try:
        tensors = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise CheckpointError(f"{path}: asks for {wanted[1]} to be loaded; only files of plain tensors are read, nothing in it "
                                  "was run") from None
        raise CheckpointError(f"{path}: torch can't read it: {one_line(error)}") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds one {type(tensors).__name__}, not tensors by their names")
    for name, tensor in tensors.items():
        if name in ("_strategy", "_version", "_rescale_layer"):
            raise CheckpointError(f"{path}: was converted by the rwkv package for one strategy; give the official file")
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: holds {str(name)[:60]!r} of type {type(tensor).__name__}, a model's file holds tensors alone")
    _check_records(tensors, record_sizes, path)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_records(tensors: dict[str, Tensor], record_sizes: Counter[int], path: Path) -> None:
    """Mapped, a storage is taken from where its record begins, however short the record is."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()
                if tensor.layout == torch.strided and not tensor.is_meta}
    for size in Counter(storages.values()) - record_sizes:
        raise CheckpointError(f"{path}: is damaged, it holds no data of {size} bytes for one of its tensors; copy or download it again")


def _check_archive(path: Path) -> Counter[int]:
    """A .pth is an uncompressed zip archive whose directory stands at its end; returns the sizes of its records in bytes.

    All but the tensors' data, which is read later, is compared with its CRC-32.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
    if not zipfile.is_zipfile(path):
        if magic == b"PK\3\4":
            raise CheckpointError(f"{path}: is cut off, its end is missing; copy or download it again")
        old = "; if PyTorch before 1.6 wrote it, load it there and save it again" if magic[:1] == b"\x80" else ""
        raise CheckpointError(f"{path}: is {'no PyTorch file' if magic else 'empty'}, a .pth is a zip archive{old}")
    return Counter(entry.file_size for entry in _entries(path)[0])


def _entries(path: Path) -> tuple[list[zipfile.ZipInfo], bool]:
    """And whether their CRC-32s are such: under `torch.serialization.set_crc32_options(False)` none of them is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: {entry.filename} in it is compressed, PyTorch doesn't write such files; use torch.save")
                archive.open(entry).close()  # holds its head against the archive's directory
            small = [entry for entry in entries if "/data/" not in entry.filename]
            wrong = [entry.filename for entry in small if not _is_right(archive, entry)]
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error) as error:  # RuntimeError: it says that it is encrypted
        raise CheckpointError(f"{path}: is damaged: {one_line(error)}; copy or download it again") from None
    if wrong and len(wrong) < max(2, len(small)):
        raise CheckpointError(f"{path}: is damaged: {wrong[0]} in it has not the CRC-32 that the archive says; copy or download it again")
    return entries, not wrong


def _is_right(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    with archive.open(entry) as record:
        try:
            while record.read(2**20):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def _check_version(tensors: dict[str, Tensor], path: Path) -> None:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    for part, kind in _OTHERS:
        name = next((name for name in tensors if part in name), None)
        if name is not None:
            if kind is not None:
                raise CheckpointError(f"{path}: looks like {kind}, it has {name}; only RWKV6 (x060) models are read")
            return
    raise CheckpointError(f"{path}: is no RWKV6 model, its first tensor is {next(iter(tensors))}")


def _sizes(shapes: dict[str, tuple[int, ...]], path: Path) -> Sizes:
    """By the tensors that say them; whether the others agree is seen later."""
    layers = _layers(shapes, path)
    vocabulary, width = _shape(shapes, "emb.weight", 2, path)
    attention_width, _ = _shape(shapes, "blocks.0.att.key.weight", 2, path)
    ffn_width, _ = _shape(shapes, "blocks.0.ffn.key.weight", 2, path)
    _, mixes_rank = _shape(shapes, "blocks.0.att.time_maa_w1", 2, path)
    _, decay_rank = _shape(shapes, "blocks.0.att.time_decay_w1", 2, path)
    heads, head_size = _shape(shapes, "blocks.0.att.time_faaaa", 2, path)
    if heads * head_size != attention_width:
        raise CheckpointError(f"{path}: blocks.0.att.time_faaaa has shape [{heads}, {head_size}], blocks.0.att.key.weight implies "
                              f"[heads, head size] whose product is {attention_width}")
    return Sizes(layers, width, attention_width, heads, ffn_width, vocabulary, mixes_rank // len(MIXES), decay_rank,
                 initial_state="blocks.0.att.time_state" in shapes)


def _shape(shapes: dict[str, tuple[int, ...]], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{path}: lacks the tensor {name}")
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        raise CheckpointError(f"{path}: {name} has shape {list(shapes[name])}, it should have {dimensions} dimensions, none of them 0")
    return shapes[name]


def _layers(shapes: dict[str, tuple[int, ...]], path: Path) -> int:
    found = {int(match[1]) for match in (re.match(r"blocks\.(\d{1,6})\.", name) for name in shapes) if match}
    for layer in range(len(found)):
        if layer not in found:
            raise CheckpointError(f"{path}: lacks the tensors of blocks.{layer}, but has blocks.{max(found)}")
    return len(found)


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    """Some files keep the (1, 1, C) tensors as (C,); the `rwkv` package squeezes them all."""
    return [size for size in shape if size != 1]
