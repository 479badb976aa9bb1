"""Random weights for training a model from nothing, as upstream draws them.

BlinkDL/RWKV-LM, RWKV-v5/src/model.py at 033ce84: `RWKV_Tmix_x060.__init__` and `RWKV_CMix_x060.__init__` for what is named
`time_*`, `generate_init_weight` for the rest; the ranks by width are those of RWKV-PEFT (rwkvt/rwkv6/att.py at 801e5df).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bone_ds.errors import CheckpointError, ConfigError
from rwkv_adapters.model import Sizes, parameter_shapes

_ZERO = (".att.output.", ".ffn.value.", ".ffn.receptance.")
"""Every block adds nothing at first."""
_SMALL = (".att.key.", ".att.gate.")
_EMBEDDING_RANGE = 1e-4
_LOW_RANK_RANGE = 0.01
_LARGEST = {"layers": 1024, "width": 2**16, "vocabulary": 2**20, "head size": 2**16, "ffn width": 2**18}
_WIDE = 4096
"""From this width on the low ranks are twice as large."""


def sizes(layers: int, width: int, vocabulary: int, head_size: int = 64, ffn_width: int | None = None) -> Sizes:
    """Of a model as upstream would make it. Raises ConfigError where the heads don't divide the width."""
    ffn_width = max(32, int(width * 3.5) // 32 * 32) if ffn_width is None else ffn_width
    given = {"layers": layers, "width": width, "vocabulary": vocabulary, "head size": head_size, "ffn width": ffn_width}
    for what, value in given.items():
        if value < 1:
            raise ConfigError(f"the {what} of a new model is {value}, it must be at least 1")
        if value > _LARGEST[what]:
            raise ConfigError(f"the {what} of a new model is {value}, it may be {_LARGEST[what]} at most")
    if width % head_size:
        raise ConfigError(f"the width {width} of a new model is no multiple of its head size {head_size}")
    scale = 2 if width >= _WIDE else 1
    return Sizes(layers, width, width, width // head_size, ffn_width, vocabulary, mix_rank=32 * scale, decay_rank=64 * scale)


def initial_weights(sizes: Sizes, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in the model's order, fp32, equal for equal sizes and seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(sizes).items():
        yield name, _weight(name, shape, sizes, generator)


def write(path: Path, sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """A .pth in the official layout; it appears whole or not at all. Raises ConfigError, or CheckpointError for a full disk."""
    if path.suffix != ".pth":
        raise ConfigError(f"{path}: a new model is written as .pth, give a name that ends so")
    if path.exists():
        raise ConfigError(f"{path}: exists already; remove it or give another name")
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: weight.to(dtype) for name, weight in initial_weights(sizes, seed)}, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError for a full disk
        raise CheckpointError(f"{path}: can't be written: {str(error).splitlines()[0]}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _weight(name: str, shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
    last = name.rpartition(".")[2]
    if last.startswith("time_"):
        return _time_weight(name, shape, sizes, generator)
    if name.endswith(".ln_x.weight"):
        return torch.full(shape, ((1 + _layer(name)) / sizes.layers) ** 0.7)
    if len(shape) == 1:
        return torch.ones(shape) if last == "weight" else torch.zeros(shape)
    if any(part in name for part in _ZERO):
        return torch.zeros(shape)
    if name == "emb.weight":
        return _uniform(shape, _EMBEDDING_RANGE, generator)
    return torch.nn.init.orthogonal_(torch.empty(shape), _gain(name, sizes), generator=generator)


def _gain(name: str, sizes: Sizes) -> float:
    """Of the orthogonal matrices."""
    if name == "head.weight":
        return 0.5 * math.sqrt(max(1.0, sizes.vocabulary / sizes.width))
    return 0.1 if any(part in name for part in _SMALL) else 1.0


def _time_weight(name: str, shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
    """The `time_*` parameters: ramps over the channels, bent by the depth of the layer."""
    layer, (part, last) = _layer(name), name.split(".")[2:]
    depth = layer / max(1, sizes.layers - 1)  # 0 to 1
    height = 1 - layer / sizes.layers  # 1 to almost 0
    if last in ("time_maa_w1", "time_decay_w1", "time_state"):
        return torch.zeros(shape)
    if last in ("time_maa_w2", "time_decay_w2"):
        return _uniform(shape, _LOW_RANK_RANGE, generator)
    if last == "time_decay":
        return (-6 + 5 * _ramp(sizes.attention_width) ** (0.7 + 1.3 * depth)).view(shape)
    if last == "time_faaaa":
        zigzag = (torch.arange(1, sizes.attention_width + 1) % 3 - 1) * 0.1
        return (depth * (1 - _ramp(sizes.attention_width)) + zigzag).view(shape)
    if part == "att" and last in ("time_maa_r", "time_maa_g"):
        height *= 0.5
    lowered = 0.3 * depth if last == "time_maa_v" else 0.0
    channel = torch.arange(sizes.width) / sizes.width
    return (1 - (channel ** height + lowered)).view(shape)


def _ramp(count: int) -> Tensor:
    """From 0 to 1."""
    return torch.arange(count) / max(1, count - 1)


def _uniform(shape: tuple[int, ...], limit: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-limit, limit, generator=generator)


def _layer(name: str) -> int:
    return int(name.split(".")[1])
