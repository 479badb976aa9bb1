"""A model, data and configs small enough to train in a blink."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny

# Bone blocks of 9 cut every layer, and give down_proj 7 x 9 x 9 values, which two ranks can't share evenly.
ODD_SIZES = {"hidden_size": 36, "intermediate_size": 63, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18}
RANK = 9


def write_model(directory: Path) -> Path:
    save_tiny(directory, tie_word_embeddings=True, **ODD_SIZES)
    return directory


def write_model_with(directory: Path, original: Path, tensor: str, value: float) -> Path:
    """The model with every value of one tensor replaced."""
    directory.mkdir()
    for path in original.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    assert tensor in tensors
    save_file(tensors | {tensor: torch.full_like(tensors[tensor], value)}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_rows(path: Path, count: int = 40) -> Path:
    """Questions of random letters, answered by their letters from a to c in order: at least the three are learnt at once."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        letters = generator.choices("abcdefgh", k=generator.randint(3, 12)) + generator.choices("abc")
        rows.append({"q": "".join(letters), "a": "".join(sorted(letter for letter in letters if letter < "d"))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_tree(model_path: Path, rows: Path, output: Path, **sections: dict) -> dict:
    """A config as YAML holds it: 6 steps of 8 samples in fp32 at ZeRO stage 0, two samples in a forward pass.

    Gradients are clipped in every step and weights decay: neither is alike by itself at all stages.
    """
    tree = {
        "model": {"path": str(model_path), "dtype": "fp32"},
        "adapter": {"rank": RANK},
        "data": {"train": str(rows), "eval": str(rows), "prompt": "template", "template": "{q}=", "completion": "{a}", "max_length": 64,
                 "packing": False},
        "train": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.01, "max_grad_norm": 0.3,
                  "weight_decay": 0.1, "eval_every": 3},
        "deepspeed": {"config": "zero0"},
        "output": {"directory": str(output)},
    }
    for section, fields in sections.items():
        tree[section] |= fields
    if tree["adapter"].get("method") in ("state", "full"):
        del tree["adapter"]["rank"]
    return tree


def write_zero3(path: Path) -> Path:
    """ZeRO-3 that keeps no parameter a moment longer than its module runs, and steps the adapter in several parts."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
            "sub_group_size": 1000}
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    return path
