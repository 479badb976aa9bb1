"""Sizes of published RWKV6 models, so that a run can be planned before the weights are here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bone_ds.arch import Source
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from rwkv_adapters import weights
from rwkv_adapters.model import Sizes
from rwkv_adapters.weights import RwkvSource


def _world(layers: int, width: int, ffn_width: int, scale: int = 1) -> Sizes:
    return Sizes(layers, width, width, width // 64, ffn_width, 65536, mix_rank=32 * scale, decay_rank=64 * scale)


SIZES = {
    "1B6": _world(24, 2048, 7168),
    "3B": _world(32, 2560, 8960),
    "7B": _world(32, 4096, 14336, scale=2),
}
"""Of https://huggingface.co/BlinkDL/rwkv-6-world, by the size in the file's name."""
_NAME = re.compile(rf"RWKV-x060-World-({'|'.join(SIZES)})\b", re.IGNORECASE)


def outline(model: ModelConfig) -> Source:
    """As `weights.open`; of a file that is not there, the published sizes. Raises CheckpointError."""
    if Path(os.path.expanduser(model.path)).exists():
        return weights.open(model)
    named = _NAME.search(Path(model.path).name)
    if named is None:
        known = ", ".join(f"RWKV-x060-World-{size}...pth" for size in SIZES)
        raise CheckpointError(f"model.path: {model.path}: there is no such file, and the sizes of that name are not known; known are "
                              f"{known}")
    return RwkvSource(path=Path(model.path), origin=f"RWKV-x060-World-{named[1]}", revision=None, fingerprint="",
                      sizes=SIZES[named[1].upper()], tokenizer=model.tokenizer, wkv=model.wkv)
