"""Training is the same at every ZeRO stage, world size and cut into micro-batches."""

import math

import pytest
import torch
import zero_runs
from safetensors.torch import load_file
from zero_runs import STAGES, WORLD_SIZES

FP32_TOLERANCE = 1e-5
LEAST_FALL = 0.1
"""Of the loss over a run: 10,000 times the tolerance, so that runs which learn nothing don't pass for equal."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return zero_runs.outcomes(tmp_path_factory.getbasetemp() / "zero_runs")


def everywhere(stages=STAGES):
    return pytest.mark.parametrize(("stage", "world_size"), [(stage, size) for size in WORLD_SIZES for stage in stages])


def assert_equal_training(run, reference, tolerance=FP32_TOLERANCE, masters=True):
    assert len(run["losses"]) == len(reference["losses"])
    assert run["losses"][0] - run["losses"][-1] > LEAST_FALL
    assert run["losses"] == pytest.approx(reference["losses"], rel=0, abs=tolerance)
    assert run["norms"] == pytest.approx(reference["norms"], rel=0, abs=tolerance)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=0, abs=tolerance)
    if masters:
        torch.testing.assert_close(load_file(run["masters"]), load_file(reference["masters"]), rtol=0, atol=tolerance)


@everywhere()
def test_every_stage_trains_alike_in_fp32(runs, stage, world_size):
    assert_equal_training(runs[f"row-{stage}-fp32", world_size], runs["row-0-fp32", 1])


@everywhere()
def test_every_stage_trains_alike_in_bf16(runs, stage, world_size):
    """Compared with fp32, so masters may differ by AdamW's steps on gradients that rounding has turned around."""
    assert_equal_training(runs[f"row-{stage}-bf16", world_size], runs["row-0-fp32", 1], tolerance=5e-3, masters=False)


@everywhere()
@pytest.mark.parametrize("dtype", zero_runs.DTYPES)
def test_the_gradients_asked_for_are_those_of_the_step(runs, stage, world_size, dtype):
    run = runs[f"row-{stage}-{dtype}", world_size]
    assert run["first_gradients_norm"] == pytest.approx(run["norms"][0], rel=1e-5)


def test_norms_by_tensor_are_those_of_the_step_and_of_the_masters(runs):
    """At every stage, where shards are uneven and where a tensor has none on a rank."""
    trained = {key: run for key, run in runs.items() if "error" not in run and key[0] != "spoilt"}
    assert len(trained) > 60
    for (name, _), run in trained.items():
        masters = load_file(run["masters"])
        assert run["gradient_norms"].keys() == run["adapter_norms"].keys() == masters.keys()
        assert sum(norm**2 for norm in run["gradient_norms"].values())**0.5 == pytest.approx(run["norms"][-1], rel=1e-5), name
        expected = {tensor: float(torch.linalg.vector_norm(master)) for tensor, master in masters.items()}
        assert run["adapter_norms"] == pytest.approx(expected, rel=2e-3 if "bf16" in name else 1e-5), name


@pytest.mark.parametrize("name", ["row-3-fp32", "row-3-fp32-resumed", "col-3", "idle-3"])
def test_zero3_keeps_no_frozen_weight_whole_after_a_step_or_an_evaluation(runs, name):
    assert runs[name, 2]["gathered"] == 0
    assert runs["row-3-bf16", 2]["gathered"] > 0, "the shipped configuration keeps small ones, so whole ones are noticed"


@pytest.mark.parametrize("stage", STAGES)
def test_bone_col_with_layers_recomputed(runs, stage):
    assert_equal_training(runs[f"col-{stage}", 2], runs["col-0", 1])


@pytest.mark.parametrize("stage", [2, 3])
def test_bone_col_built_and_recomputed(runs, stage):
    assert_equal_training(runs[f"built-{stage}", 2], runs["built-0", 1])
    assert_equal_training(runs[f"built-{stage}", 2], runs["col-0", 1])


@pytest.mark.parametrize("name", zero_runs.RECOMPUTED)
def test_what_is_recomputed_under_zero3_is_equal_to_the_bit(runs, name):
    kept, recomputed = runs[f"{name}-kept", 2], runs[f"{name}-recomputed", 2]
    for figure in ("losses", "norms", "evaluations"):
        assert recomputed[figure] == kept[figure]
    assert recomputed["losses"][0] - recomputed["losses"][1] > 0.05
    assert recomputed["gathered"] == 0
    torch.testing.assert_close(load_file(recomputed["masters"]), load_file(kept["masters"]), rtol=0, atol=0)


@pytest.mark.parametrize("name", zero_runs.FORMS)
def test_groupings_and_forms_with_layers_recomputed_under_zero3(runs, name):
    assert_equal_training(runs[f"{name}-form-3", 2], runs[f"{name}-form-0", 1])
    assert runs[f"{name}-form-3", 2]["gathered"] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_lora(runs, stage):
    assert_equal_training(runs[f"lora-{stage}", 2], runs["lora-0", 1])


@pytest.mark.parametrize("name", [*(f"fused-{stage}" for stage in STAGES), *zero_runs.OFFLOADED])
def test_fused_and_offloaded_optimizers_train_alike_and_go_on_to_the_bit(runs, name):
    whole, resumed = runs[name, 2], runs[f"{name}-resumed", 2]
    assert_equal_training(whole, runs["row-0-fp32", 1])
    assert (resumed["losses"], resumed["norms"]) == (whole["losses"][3:], whole["norms"][3:])
    torch.testing.assert_close(load_file(resumed["masters"]), load_file(whole["masters"]), rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_full_training_with_a_tied_head(runs, stage):
    """AdamW's first steps are as large for a rounding error as for a gradient, so the weights are compared by what they do."""
    assert_equal_training(runs[f"full-{stage}", 2], runs["full-0", 1], masters=False)


@everywhere(stages=(0, 3))
@pytest.mark.parametrize("packing", ["packs", "samples"])
def test_micro_batches_do_not_matter(runs, packing, stage, world_size):
    """A rank's whole share in one forward pass, and one sample at a time."""
    for size in (1, 8 // world_size):
        assert_equal_training(runs[f"{packing}-of-{size}-{stage}", world_size], runs[f"{packing}-of-1-0", 1])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "left"), [("ragged", 3), ("idle", 1)])
def test_ranks_with_unequal_shares(runs, name, left, stage):
    """The end of an epoch gives one rank two samples and the other one, or one and none."""
    run = runs[f"{name}-{stage}", 2]
    assert run["units"] == [8, left, 8, left]
    assert_equal_training(run, runs[f"{name}-0", 1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_layer_without_gradient_is_named(runs, world_size):
    """Behind an output projection of zeros, queries, keys and values change nothing."""
    error = runs["starved", world_size]["error"]
    assert error.startswith("InjectionError: model.layers.1.self_attn.q_proj: its adapter received no gradient")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_that_are_nan_change_nothing(runs, world_size):
    run = runs["spoilt", world_size]
    assert all(not math.isfinite(loss) for loss in run["losses"]) and len(run["losses"]) == 6
    assert not any(tensor.any() for tensor in load_file(run["masters"]).values())  # as it began


@pytest.mark.parametrize("name", zero_runs.FAULTY)
def test_a_step_that_is_not_finite_on_one_rank_is_as_if_it_had_not_been(runs, name):
    """Weights, moments and AdamW's count, to the bit; the rate is that of the step's number."""
    bad, without = runs[f"bad-{name}", 2], runs[f"without-{name}", 2]
    assert math.isfinite(bad["losses"][1]) == ("fp32" not in name) and not math.isfinite(bad["norms"][1])
    for figure in ("losses", "norms"):
        assert bad[figure][:1] + bad[figure][2:] == without[figure]
    torch.testing.assert_close(load_file(bad["masters"]), load_file(without["masters"]), rtol=0, atol=0)
