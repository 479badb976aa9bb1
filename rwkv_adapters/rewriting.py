"""An RWKV6 model written again with changed weights: tensor by tensor, from mapped memory to the new file.

Of the weights no more is held than one tensor and what it is changed to, so both forms of a file are written here record by
record: `torch.save` and the safetensors library want all tensors at once.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bone_ds.arch import Source
from bone_ds.checksums import Checksums
from bone_ds.errors import ConfigError
from bone_ds.tensor_file import drop_pages
from rwkv_adapters import checks

_Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a file is to hold: dtype and shape by name, in order."""

_STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}
_ALIGNMENT_BYTES = 64
"""Of each tensor's data in a .pth, as PyTorch aligns it: mapped memory can then be computed with as it is."""


def rewrite(source: Source, out: Path, change: Callable[[str, Tensor], Tensor], added: Mapping[str, Tensor],
            checksums: Checksums | None = None) -> None:
    """Writes every tensor as change(name, tensor), in the source's order, dtypes and shapes, as .pth or .safetensors.

    Of `added`, those that the source lacks follow, in the embedding's dtype.

    Written aside and renamed. Raises ConfigError for another ending, and CheckpointError where the source is found damaged, by its own
    checksums or by those given.
    """
    if out.suffix not in _WRITERS:
        raise ConfigError(f"--out: {out}: an RWKV6 model is a {' or '.join(_WRITERS)} file, give it one of these endings")
    tensors = checks.read_tensors(source.path)
    dtype = tensors["emb.weight"].dtype
    lacking = {name: tensor.to(dtype) for name, tensor in added.items() if name not in tensors}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in (tensors | lacking).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".partial")
    try:
        _WRITERS[out.suffix](aside, layout, _changed(source, tensors, lacking, change, checksums or Checksums()))
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def _changed(source: Source, tensors: dict[str, Tensor], lacking: dict[str, Tensor], change: Callable[[str, Tensor], Tensor],
             checksums: Checksums) -> Iterator[memoryview]:
    """The bytes of each tensor in turn, then of those that the source lacks; the last one's pages leave memory before the next is read."""
    records = checks.Records(source.path)
    for name, tensor in tensors.items():
        with checksums.taking(name, tensor) as taken:
            content = _bytes(name, tensor, change)
        records.check(name, tensor, taken)
        yield content
        drop_pages(tensor)
    checksums.finish()
    for name, tensor in lacking.items():
        yield _bytes(name, tensor, change)


def _bytes(name: str, tensor: Tensor, change: Callable[[str, Tensor], Tensor]) -> memoryview:
    changed = change(name, tensor).to(tensor.dtype)
    assert changed.numel() == tensor.numel(), name
    return memoryview(changed.contiguous().flatten().view(torch.uint8).numpy())


def _write_safetensors(path: Path, layout: _Layout, contents: Iterator[memoryview]) -> None:
    """8 bytes of header length, a JSON header, then the tensors without gaps."""
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": checks.DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for content in contents:
            file.write(content)


def _write_pth(path: Path, layout: _Layout, contents: Iterator[memoryview]) -> None:
    """What `torch.save` makes of a dictionary: an uncompressed zip archive of a pickle and one record of data for each tensor."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", memoryview(_pickled(layout)))
        _add(archive, "archive/byteorder", memoryview(sys.byteorder.encode()))
        for key, content in enumerate(contents):
            _add(archive, f"archive/data/{key}", content)
        _add(archive, "archive/version", memoryview(b"3\n"))


_WRITERS = {".pth": _write_pth, ".safetensors": _write_safetensors}


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    entry = zipfile.ZipInfo(name)
    entry.file_size = content.nbytes
    entry.external_attr = 0o644 << 16
    large = content.nbytes > zipfile.ZIP64_LIMIT // 2
    # 30 bytes, the name, 20 of 64-bit sizes if need be, then a field of padding, whose own head takes 4.
    data_start = archive.fp.tell() + 30 + len(name) + 20 * large + 4
    padding = -data_start % _ALIGNMENT_BYTES
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as record:
        record.write(content)


@dataclass(frozen=True)
class _Storage:
    """One record of the archive, in the words of a pickle's persistent id."""

    kind: type
    key: str
    size: int


@dataclass(frozen=True)
class _Described:
    """A tensor that fills a storage."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self):
        strides = tuple(prod(self.shape[axis + 1:]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", obj.kind, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None


def _pickled(layout: _Layout) -> bytes:
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump({
        name: _Described(_Storage(_STORAGES[dtype], str(key), prod(shape)), shape)
        for key, (name, (dtype, shape)) in enumerate(layout.items())})
    return buffer.getvalue()
