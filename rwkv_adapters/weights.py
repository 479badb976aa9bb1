"""RWKV6 models on disk: open, build, and stream their weights into place."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bone_ds.arch import Inventory, Placement, Source
from bone_ds.checksums import Checksums
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from bone_ds.tensor_file import drop_pages
from rwkv_adapters import checks
from rwkv_adapters.model import Rwkv6, Sizes, operator, parameter_shapes


@dataclass(frozen=True)
class RwkvSource(Source):
    """A .pth or .safetensors file."""

    sizes: Sizes
    tokenizer: str
    """As model.tokenizer names it, see `rwkv_adapters.tokenizer`."""
    wkv: str
    """As model.wkv names it, see `rwkv_adapters.wkv6.resolve`."""


def open(model: ModelConfig) -> RwkvSource:
    """Checks the file without reading its weights. Raises CheckpointError."""
    path = _find(model)
    tensors = checks.read_tensors(path)
    sizes = checks.check_tensors(tensors, path)
    return RwkvSource(path=path, origin=model.path, revision=None, fingerprint=fingerprint(tensors), sizes=sizes,
                      tokenizer=model.tokenizer, wkv=model.wkv)


def inventory(model: ModelConfig) -> Inventory:
    """The sizes and dtypes of the file's tensors. Raises CheckpointError where it is not whole."""
    source = open(model)
    counts: Counter[str] = Counter()
    for tensor in checks.read_tensors(source.path).values():
        counts[checks.DTYPE_NAMES[tensor.dtype]] += tensor.numel()
    sizes = asdict(source.sizes)
    del sizes["initial_state"]  # the parameters tell it
    return Inventory(source, sizes, dict(counts.most_common()))


def build(source: RwkvSource, dtype: torch.dtype) -> Rwkv6:
    """The model with unset weights of `dtype`; called under `Placement.empty()`."""
    with _default_dtype(dtype):
        return Rwkv6(source.sizes, source.wkv)


def load(model: Rwkv6, source: RwkvSource, placement: Placement, checksums: Checksums | None = None) -> None:
    """Streams the weights into the model, one tensor at a time, in the order of its parameters.

    A tensor's bytes leave memory once it is placed, so that the file is never there as a whole. Called outside
    `Placement.empty()`. Raises CheckpointError, and ConfigError for a WKV operator that is not to be had on this device.

    checksums: of the tensors as they are stored; of a .pth they are compared with the archive's own even where none are asked for.
    """
    operator(source.wkv, model.emb.weight.device)
    tensors = checks.read_tensors(source.path)
    if checks.check_tensors(tensors, source.path) != source.sizes:
        raise CheckpointError(f"{source.path}: has other tensors than when it was opened; start again")
    params, records = dict(model.named_parameters()), checks.Records(source.path)
    checksums = checksums or Checksums()
    for name, shape in parameter_shapes(source.sizes).items():
        tensor = tensors.pop(name)
        with checksums.taking(name, tensor) as taken:
            placement.assign(params[name], tensor.reshape(shape))
        records.check(name, tensor, taken)
        drop_pages(tensor)
    checksums.finish()


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and the first and last 4 KiB of each tensor; the form of the file is no part of it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {checks.DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)}\n".encode())
        digest.update(checks.sample(tensor))
    return digest.hexdigest()


def _find(model: ModelConfig) -> Path:
    path = Path(os.path.expanduser(model.path))
    if model.revision is not None:
        raise CheckpointError(f"model.revision: {model.revision!r} is for a hub id, an RWKV6 model is a file; remove it")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, an RWKV6 model is a {' or '.join(checks.SUFFIXES)} file; give its path")
    if path.suffix not in checks.SUFFIXES:
        raise CheckpointError(f"{path}: an RWKV6 model is a {' or '.join(checks.SUFFIXES)} file, this is neither")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file; an RWKV6 model is a {' or '.join(checks.SUFFIXES)} file on this machine")
    return path


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
