"""RWKV6 trains the same at every ZeRO stage and world size: adapters, states and all weights, whole and in chunks."""

import pytest
import ranks
import tiny
import tiny_rwkv
import torch
from safetensors.torch import load_file
from test_zero import FP32_TOLERANCE, LEAST_FALL
from zero_runs import STAGES, WORLD_SIZES

# Blocks of 9 cut every layer, and two ranks can't share 7 x 9 x 9 values, nor many of the small tensors, evenly.
SIZES = {"width": 36, "head_size": 12, "ffn_width": 63, "vocabulary": 256, "mix_rank": 3, "decay_rank": 5}
STEPS = 5
SLOWLY = {"steps": STEPS, "learning_rate": 3e-3}
IN_CHUNKS = SLOWLY | {"chunk_length": 16}
METHODS = {
    "row": {"adapter": {"rank": 9}},
    "col": {"adapter": {"rank": 9, "grouping": "col"}, "train": SLOWLY | {"activation_checkpointing": "layer"}},
    "lora": {"adapter": {"method": "lora", "rank": 3}},
    "state": {"adapter": {"method": "state"}, "train": {"learning_rate": 0.3, "steps": STEPS}},
    "full": {"adapter": {"method": "full"}, "train": SLOWLY},
    "l2wrap": {"adapter": {"rank": 9}, "train": SLOWLY | {"l2wrap": 0.1}},
    "packed": {"adapter": {"rank": 9}, "data": {"packing": True, "train_samples": 40}},
    "chunks": {"adapter": {"rank": 9}, "data": {"packing": True}, "train": IN_CHUNKS},
    "chunks-of-samples": {"adapter": {"rank": 9}, "train": IN_CHUNKS | {"activation_checkpointing": "layer"}},
}

# Adapter and train sections: each is run with what it says of checkpointing and without.
RECOMPUTED = {
    "modules": ({"rank": 9}, {"recompute_modules": ["att", "ffn"]}),
    "built": ({"rank": 9, "strategy": "materialized"}, {"activation_checkpointing": "bone+layer"}),
}


def _stages(name, world_size):
    if name == "row":
        return STAGES
    return (3,) if world_size == 2 else (0,)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("zero_rwkv")
    model, rows, zero3 = directory / "tiny.pth", directory / "rows.jsonl", directory / "zero3.json"
    tiny_rwkv.save_tiny(model, **SIZES)
    tiny.write_rows(rows)
    tiny.write_zero3(zero3)
    outcomes = {}
    for world_size in WORLD_SIZES:
        beside = directory / f"world-{world_size}"
        beside.mkdir()
        cases = {}
        for name, sections in METHODS.items():
            for stage in _stages(name, world_size):
                ds = {"config": str(zero3) if stage == 3 else f"zero{stage}"}
                config = tiny.config_tree(model, rows, beside / f"{name}-{stage}", **{"train": SLOWLY} | sections, deepspeed=ds)
                cases[f"{name}-{stage}"] = {"run": "train", "config": config}
        for name, (adapter, policy) in RECOMPUTED.items() if world_size == 2 else ():
            for how, train in (("kept", {}), ("recomputed", policy)):
                config = tiny.config_tree(model, rows, beside / f"{name}-{how}", adapter=adapter, train=SLOWLY | {"steps": 2} | train,
                                          deepspeed={"config": str(zero3)})
                cases[f"{name}-{how}"] = {"run": "train", "config": config}
        outcomes |= {(name, world_size): outcome for name, outcome in ranks.run(cases, world_size, beside).items()}
    return outcomes


@pytest.mark.parametrize(("name", "stage", "world_size"), [
    (name, stage, world_size) for name in METHODS for world_size in WORLD_SIZES for stage in _stages(name, world_size)])
def test_every_stage_and_world_size_trains_alike(runs, name, stage, world_size):
    run = runs[f"{name}-{stage}", world_size]
    assert "error" not in run, run
    reference = runs[f"{name}-0", 1]
    assert run["losses"][0] - run["losses"][-1] > LEAST_FALL
    assert run["losses"] == pytest.approx(reference["losses"], rel=0, abs=FP32_TOLERANCE)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=0, abs=FP32_TOLERANCE)
    assert run["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    if name != "full":  # AdamW's first steps are as large for a rounding error as for a gradient, and some of all weights have none
        torch.testing.assert_close(load_file(run["masters"]), load_file(reference["masters"]), rtol=0, atol=1e-4)
    if stage == 3 and name != "full":
        assert run["gathered"] == 0, "frozen weights were whole after a step"


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_recomputed_under_zero3_is_equal_to_the_bit(runs, name):
    kept, recomputed = runs[f"{name}-kept", 2], runs[f"{name}-recomputed", 2]
    for figure in ("losses", "norms", "evaluations"):
        assert recomputed[figure] == kept[figure]
    assert recomputed["losses"][0] - recomputed["losses"][1] > 0.05
    assert recomputed["gathered"] == 0
    torch.testing.assert_close(load_file(recomputed["masters"]), load_file(kept["masters"]), rtol=0, atol=0)


def test_l2wrap_changes_the_gradient_alone(runs):
    wrapped, plain = runs["l2wrap-0", 1], runs["row-0", 1]
    assert wrapped["losses"][0] == pytest.approx(plain["losses"][0], abs=1e-7)
    assert abs(wrapped["norms"][0] - plain["norms"][0]) > 1e-3


def test_chunks_change_the_gradient_alone(runs):
    """The forward pass goes on from the carried state, so the first loss is that of whole rows; the gradient is cut there."""
    chunked, whole = runs["chunks-0", 1], runs["packed-0", 1]
    assert chunked["losses"][0] == pytest.approx(whole["losses"][0], abs=1e-5)
    assert chunked["evaluations"][0] == pytest.approx(whole["evaluations"][0], abs=1e-5)
    assert abs(chunked["norms"][0] - whole["norms"][0]) > 1e-4
