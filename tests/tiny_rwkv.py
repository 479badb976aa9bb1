"""Tiny random RWKV6 models, saved as files; every term of the forward pass matters in them."""

import os
from contextlib import redirect_stdout
from io import StringIO

import safetensors.torch
import torch
from whole_on_cpu import WholeOnCpu

from bone_ds.config import ModelConfig
from rwkv_adapters import ARCHITECTURE
from rwkv_adapters.model import Sizes, parameter_shapes


def tiny_sizes(layers=2, width=32, head_size=8, ffn_width=56, vocabulary=96, mix_rank=4, decay_rank=6, attention_width=None,
               initial_state=False) -> Sizes:
    attention_width = attention_width or width
    return Sizes(layers, width, attention_width, attention_width // head_size, ffn_width, vocabulary, mix_rank, decay_rank,
                 initial_state)


def random_tensors(sizes: Sizes, seed=0) -> dict[str, torch.Tensor]:
    """By the official names and in the official order, fp32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in parameter_shapes(sizes).items()}


def save_tiny(path, *, seed=0, dtype=torch.float32, **sizes) -> dict[str, torch.Tensor]:
    """Writes a random model, as .pth or .safetensors by the path's ending; returns its tensors. sizes: see `tiny_sizes`."""
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(tiny_sizes(**sizes), seed).items()}
    write(path, tensors)
    return tensors


def write(path, tensors) -> None:
    if str(path).endswith(".safetensors"):
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def opened(path, **changes):
    return ARCHITECTURE.open(ModelConfig(path=str(path), **changes))


def built_and_loaded(source, dtype=torch.float32, checksums=None):
    placement = WholeOnCpu()
    with placement.empty():
        model = ARCHITECTURE.build(source, dtype)
    for param in model.parameters():
        param.data.fill_(float("nan"))
    ARCHITECTURE.load(model, source, placement, checksums)
    return model


def logits(model, tokens, document_lengths=None):
    """(T, V)"""
    hidden, _ = ARCHITECTURE.hidden(model, tokens, document_lengths or (tokens.shape[1],))
    return hidden @ ARCHITECTURE.head(model).T


def _random(name, shape, generator):
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith(("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_faaaa", "time_state")):
        return 0.5 * normal
    if "time_maa" in name:
        return uniform
    if name.endswith("time_decay"):
        return 6 * uniform - 5  # decays by 0.7% to 93% a token
    if ".ln" in name or name.startswith("ln"):
        return (1 if name.endswith("weight") else 0) + 0.2 * normal
    return normal if name == "emb.weight" else normal / shape[1] ** 0.5


def oracle(path):
    """The `rwkv` package's own model of a .pth, fp32: `forward(tokens, state, full_output=True)` -> logits, state."""
    os.environ.update(RWKV_V7_ON="0", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")  # read at import and in every forward
    from rwkv.model import RWKV

    with redirect_stdout(StringIO()):
        return RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")
