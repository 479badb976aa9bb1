"""Linear layers by their names alone: what an adapter is put on, without a model around it."""

import torch
from torch import nn

LLAMA_SIZES = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 64)}.items()}
"""(out, in) of some layers of the tiny Llama."""


def linear_net(sizes: dict[str, tuple[int, int]] = LLAMA_SIZES, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    root = nn.Module()
    for name, (out_features, in_features) in sizes.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(in_features, out_features, bias=False))
    return root
