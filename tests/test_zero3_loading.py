"""ZeRO-3 loads a model share by share: no rank ever holds all of it."""

import pytest
import ranks
import tiny
import tiny_rwkv
import torch

from bone_ds.config import ModelConfig
from llama_adapters import ARCHITECTURE

MIB = 1024**2
SLACK_BYTES = 10 * MIB


@pytest.mark.slow
def test_a_rank_needs_its_share_and_one_tensor(smollm2_gguf, tmp_path):
    ARCHITECTURE.open(ModelConfig(path=str(smollm2_gguf), cache_dir=str(tmp_path)))  # converts
    assert_shares(tmp_path, {"path": str(smollm2_gguf), "dtype": "bf16", "cache_dir": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_so_does_one_of_an_rwkv6(tmp_path, ending):
    sizes = {"layers": 8, "width": 1024, "head_size": 64, "ffn_width": 3584, "vocabulary": 16384, "mix_rank": 32, "decay_rank": 64}
    tiny_rwkv.save_tiny(tmp_path / f"model{ending}", dtype=torch.bfloat16, **sizes)
    assert_shares(tmp_path, {"path": str(tmp_path / f"model{ending}"), "dtype": "bf16"})


def assert_shares(tmp_path, model):
    config = tiny.config_tree("unset", tmp_path / "no-rows", tmp_path / "run", model=model, deepspeed={"config": "zero3"})
    memory = ranks.run({"load": {"run": "load_memory", "config": config}}, 2, tmp_path)["load"]
    assert memory["weights_bytes"] > 250 * MIB
    bound = memory["weights_bytes"] / 2 + memory["largest_bytes"] + SLACK_BYTES
    assert max(memory["rises_bytes"]) <= bound, memory
