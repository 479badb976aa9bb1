"""Random adapters on tiny RWKV6 models, and the `rwkv` package as the judge of what a merged file computes."""

import functools
import os

import tiny_rwkv
import torch

from bone_ds import adapter_file, checksums
from bone_ds.checksums import Checksums
from bone_ds.config import RunConfig
from bone_ds.inject import inject
from rwkv_adapters import ARCHITECTURE


def random_adapter(base, path, dtype="fp32", **adapter):
    """A random adapter for the base at `base`, written to `path`; returns the base with it, through our own forward."""
    config = RunConfig.model_validate({
        "model": {"path": str(base), "dtype": dtype, "wkv": "naive"}, "adapter": adapter, "data": {"train": "train.jsonl"},
        "output": {"directory": "run"}})
    source, base = ARCHITECTURE.open(config.model), Checksums()
    model = tiny_rwkv.built_and_loaded(source, checksums=base)
    trainable = inject(model, ARCHITECTURE, config.adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapter_file.write(path, adapter_file.header_of(config, ARCHITECTURE, source, 3, checksums.record(base.values)), trainable)
    return model


@torch.no_grad()
def logits(model, tokens: list[int]) -> torch.Tensor:
    """(T, V)"""
    return tiny_rwkv.logits(model, torch.tensor([tokens]))


def package_logits(path, tokens: list[int]) -> torch.Tensor:
    """(T, V) of the model in a .pth as the `rwkv` package computes them, on a CPU in fp32."""
    return _package()(model=str(path), strategy="cpu fp32", verbose=False).forward(tokens, None, full_output=True)[0]


@functools.cache
def _package():
    os.environ |= {"RWKV_V7_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}  # read when it is imported
    from rwkv.model import RWKV

    return RWKV
