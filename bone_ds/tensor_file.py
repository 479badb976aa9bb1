"""Files of tensors: written so that they are readable as the user's umask says, read through mapped memory that is given back."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bone_ds.errors import CheckpointError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
           "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
           "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool}
"""By safetensors' names; the packed and complex ones that are left are told apart by no one here."""
LARGEST_HEADER_BYTES = 2**24
"""About a hundred thousand tensors. The library takes 100 MB, which can be a million of them."""


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises CheckpointError where the disk is full or the place can't be written to."""
    try:
        path.touch()
        mode = path.stat().st_mode & 0o777
        safetensors.torch.save_file(dict(tensors), path, metadata)
        path.chmod(mode)  # the library makes it the owner's alone
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written: {str(error).splitlines()[0]}") from None


def check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads back what `save_file` wrote. Raises CheckpointError unless every tensor is there to the bit."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            differing = sorted(names ^ tensors.keys())
            for name in names & tensors.keys():
                read = file.get_tensor(name)
                if read.shape != tensors[name].shape or not np.array_equal(as_bytes(read), as_bytes(tensors[name])):
                    differing.append(name)
                drop_pages(read)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: was written and can't be read back: {str(error).splitlines()[0]}") from None
    if differing:
        raise CheckpointError(f"{path}: was written, but {differing[0]} reads back as something else; the disk or its driver is at fault")


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The elements of a CPU tensor as they lie in memory, not copied if they lie in order."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def open_file(path: Path) -> safetensors.safe_open:
    """A safetensors file in mapped memory. Raises SafetensorError and OSError, also for a header that is longer than any file needs."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER_BYTES:
        raise SafetensorError(f"its header claims {length} bytes, no file needs more than {LARGEST_HEADER_BYTES}")
    return safetensors.safe_open(path, framework="pt")


def unreadable(error: SafetensorError | OSError) -> str:
    """What is said of a file, behind its name, where `open_file` or what is read then raises this."""
    if isinstance(error, PermissionError):
        return f"can't be read: {error.strerror}"
    return f"is no safetensors file, or a damaged one: {str(error).splitlines()[0]}"


def outline(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file without their data, on the meta device, and its metadata: its header alone is read.

    Raises CheckpointError where the file is none, or cut off.
    """
    if path.is_dir() or not path.exists():
        raise CheckpointError(f"{path}: {'is a directory' if path.is_dir() else 'there is no such file'}")
    try:
        with open_file(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            tensors = {name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
                       for name, part in slices.items()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {unreadable(error)}") from None


def drop_pages(tensor: Tensor) -> None:
    """Takes the pages of a mapped tensor that was used out of this process's memory; used again they are read again."""
    page_bytes = mmap.PAGESIZE
    begin = math.ceil(tensor.data_ptr() / page_bytes) * page_bytes
    end = (tensor.data_ptr() + tensor.nbytes) // page_bytes * page_bytes
    if end > begin and tensor.is_contiguous() and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED))
