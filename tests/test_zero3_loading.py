"""ZeRO-3 loads a model share by share: no rank ever holds all of it."""

import pytest
import ranks
import tiny

from bone_ds.config import ModelConfig
from llama_adapters import ARCHITECTURE

MIB = 1024**2
SLACK_BYTES = 10 * MIB


@pytest.mark.slow
def test_a_rank_needs_its_share_and_one_tensor(smollm2_gguf, tmp_path):
    ARCHITECTURE.open(ModelConfig(path=str(smollm2_gguf), cache_dir=str(tmp_path)))  # converts
    config = tiny.config_tree(smollm2_gguf, tmp_path / "no-rows", tmp_path / "run", model={"dtype": "bf16", "cache_dir": str(tmp_path)},
                              deepspeed={"config": "zero3"})
    memory = ranks.run({"smollm2": {"run": "load_memory", "config": config}}, 2, tmp_path)["smollm2"]
    assert memory["weights_bytes"] > 250 * MIB
    bound = memory["weights_bytes"] / 2 + memory["largest_bytes"] + SLACK_BYTES
    assert max(memory["rises_bytes"]) <= bound, memory
