"""The plan: what it counts against hand counts, the real engine and real files; what it says of runs that can't fit."""

import json
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import config_tree, write_model, write_rows, write_zero3
from tiny_llama import save_tiny

import ds_configs
from bone_ds import arch, ds_json, plan
from bone_ds.cli import main
from bone_ds.config import dump_yaml, load_config, validate
from bone_ds.data import Samples
from bone_ds.errors import CheckpointError, ConfigError, DataError
from bone_ds.plan import changes, process, trace, workload, zero
from bone_ds.plan.process import parse_bytes
from bone_ds.train import train

MILLION = 10**6
# Sections of a config and of its JSON.
WHOLE = {"adapter": {"method": "full"}}
FUSED = {"train": {"optimizer": "adamw_fused"}}
IN_FP32 = {"data_types": {"grad_accum_dtype": "float32"}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
OFFLOAD_ALL = {"zero_optimization": OFFLOAD["zero_optimization"] | {"offload_param": {"device": "cpu"}}}


def config_of(path: str, **sections):
    tree = {"model": {"path": path}, "adapter": {}, "data": {"train": "absent.jsonl"}, "train": {"steps": 3}, "deepspeed": {},
            "output": {"directory": "run"}}
    for section, fields in sections.items():
        tree[section] |= fields
    return validate(tree, "case")


@pytest.fixture
def tiny(tmp_path):
    """A config tree of a tiny Llama with data."""
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    return config_tree(model, rows, tmp_path / "run", train={"steps": 2, "eval_every": 0})


@pytest.mark.parametrize("model, adapter, trainable", [
    ("meta-llama/Llama-2-7b-hf", {"grouping": "col"}, 87_031_808),
    ("meta-llama/Llama-2-7b-hf", {"grouping": "row"}, 72_876_032),
    ("meta-llama/Llama-2-7b-hf", {"grouping": "row", "rank": 32, "form": "unconstrained"}, 72_876_032),
    ("meta-llama/Llama-2-7b-hf", {"grouping": "col", "form": "hadamard"}, 87_031_808),
    ("meta-llama/Llama-2-7b-hf", {"grouping": "miss"}, 87_031_808),
    ("meta-llama/Llama-2-7b-hf", {"method": "lora", "rank": 36}, 89_948_160),
    ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", {"grouping": "row"}, 33_030_144),
    ("RWKV-x060-World-3B-v2.1.pth", {"method": "lora", "rank": 32}, 55_050_240),
    ("models/RWKV-x060-World-7B.pth", {"grouping": "row"}, 88_080_384)])
def test_published_sizes(model, adapter, trainable):
    planned = plan.plan(config_of(model, adapter=adapter), 1, "cuda")
    assert planned.trainable_parameters == trainable
    assert sum(planned.by_component.values()) == planned.peak_bytes > planned.live_peak_bytes
    assert sum(planned.live_by_component.values()) == planned.live_peak_bytes
    # at 512 tokens and without recomputation, forward is twice the parameters a token but for the embedding
    assert 0.8 < planned.flops.forward / (8 * 2 * planned.parameters * 512) < 1.25
    assert len(planned.notes) == 2 and "is not there" in planned.notes[1]


def test_an_unknown_model_is_refused():
    for path, known in (("somebody/unheard-of", "Llama-2-7b"), ("unheard-of.pth", "RWKV-x060-World-1B6")):
        with pytest.raises(CheckpointError, match=f"{path}.*{known}"):
            plan.plan(config_of(path), 1)


def test_config_json_alone_is_enough(tmp_path):
    save_tiny(tmp_path / "model")
    whole = plan.plan(config_of(str(tmp_path / "model"), adapter={"rank": 8}), 1)
    for path in [*(tmp_path / "model").glob("*.safetensors"), *(tmp_path / "model").glob("tokenizer*")]:
        path.unlink()
    alone = plan.plan(config_of(str(tmp_path / "model"), adapter={"rank": 8}), 1)
    assert alone.by_component == whole.by_component and alone.flops == whole.flops
    assert "config.json" in alone.notes[0]


def test_flops_of_a_llama_by_hand(tmp_path):
    """One document of T tokens: every linear 2 in out a token, attention 4 T^2 C, the head two products a label in forward."""
    save_tiny(tmp_path / "model")
    config = config_of(str(tmp_path / "model"), model={"dtype": "fp32"}, adapter={"method": "lora", "rank": 4})
    architecture = arch.resolve(config.model)
    tokens, labels, width, ffn, kv, vocabulary, layers, rank = 48, 20, 32, 64, 16, 96, 2, 4
    traced = trace.trace(config, architecture, architecture.open(config.model), ds_json.activation_policy(ds_json.resolve(config, 1)),
                         trace.Shape((tokens,), labels), "cpu")
    shapes = [(width, width), (width, kv), (width, kv), (width, width), (width, ffn), (width, ffn), (ffn, width)]
    linear = sum(a * b + rank * (a + b) for a, b in shapes)
    forward = layers * (2 * tokens * linear + 4 * tokens**2 * width) + 2 * 2 * labels * width * vocabulary
    assert traced.flops == {"forward": forward, "backward": traced.flops["backward"], "recomputed": 0}
    # The gradients of inputs but the first layer's three, of LoRA's two factors, and attention's five products.
    needless = 2 * tokens * sum((a * b) + rank * a for a, b in shapes[:3])
    backward = layers * (2 * tokens * (linear + sum(rank * (a + b) for a, b in shapes)) + 10 * tokens**2 * width)
    assert traced.flops["backward"] == backward - needless


@pytest.mark.parametrize("adapter, thin_products", [
    ({"grouping": "row"}, lambda out, in_, tokens: tokens * in_ * 8),
    ({"grouping": "row", "form": "unconstrained"}, lambda out, in_, tokens: 2 * tokens * in_ * 8),
    ({"grouping": "col", "form": "unconstrained"}, lambda out, in_, tokens: out * in_ * 8),
    ({"grouping": "col", "form": "hadamard"}, lambda out, in_, tokens: 0),
    ({"grouping": "free", "groups": 4}, lambda out, in_, tokens: tokens * in_ * 8),
    ({"grouping": "free", "groups": 8, "strategy": "fused"}, lambda out, in_, tokens: out * in_ * 8),
    ({"grouping": "miss"}, lambda out, in_, tokens: tokens * out * 8),
], ids=lambda value: None if callable(value) else str(value))
def test_flops_of_the_groupings_and_forms(tmp_path, adapter, thin_products):
    """In forward: the frozen products, attention and the head, and the thin products of r = 8 or what building W' takes."""
    save_tiny(tmp_path / "model")
    config = config_of(str(tmp_path / "model"), adapter={"rank": 8} | adapter)
    architecture = arch.resolve(config.model)
    tokens, labels, width, ffn, kv, vocabulary, layers = 48, 20, 32, 64, 16, 96, 2
    traced = trace.trace(config, architecture, architecture.open(config.model), ds_json.activation_policy(ds_json.resolve(config, 1)),
                         trace.Shape((tokens,), labels), "cpu")
    shapes = [(width, width), (kv, width), (kv, width), (width, width), (ffn, width), (ffn, width), (width, ffn)]
    products = sum(tokens * out * in_ + thin_products(out, in_, tokens) for out, in_ in shapes)
    head = 2 * 2 * labels * width * vocabulary
    assert traced.flops["forward"] == layers * (2 * products + 4 * tokens**2 * width) + head


@pytest.mark.parametrize("policy", ["none", "layer"])
def test_layers_that_are_left_out_count(tmp_path, monkeypatch, policy):
    save_tiny(tmp_path / "model", num_hidden_layers=7)
    config = config_of(str(tmp_path / "model"), adapter={"rank": 8, "layers": [1, 7]}, train={"activation_checkpointing": policy})
    architecture = arch.resolve(config.model)
    source, resolved = architecture.open(config.model), ds_json.resolve(config, 1)

    def traced():
        return trace.trace(config, architecture, source, ds_json.activation_policy(resolved), trace.Shape((40, 24), 30), "cpu")

    some = traced()
    monkeypatch.setattr(trace, "_RUN_OF_EACH", 99)
    assert some == traced()
    assert (some.flops["recomputed"] > 0) == (policy == "layer")


@pytest.mark.parametrize("text, size", [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("80G", 80 * 10**9), ("1.5 gib", 1.5 * 2**30),
                                        ("1024", 1024)])
def test_sizes_of_memory(text, size):
    assert parse_bytes("--device-memory", text) == size


@pytest.mark.parametrize("text", ["24 apples", "", "GiB", "-3GiB", "0GiB", "24GiBs"])
def test_no_size_of_memory(text):
    with pytest.raises(ConfigError, match="--device-memory: '.*' is no amount of memory; write 24GiB"):
        parse_bytes("--device-memory", text)


def test_a_run_that_fits_says_so_and_leaves_files_of_the_planned_size(tiny, alone, capsys):
    config = validate(tiny, "case")
    planned = plan.plan(config, 1, "cpu")
    train(config, alone)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan: ") and " GiB a rank (" in lines[0]
    assert lines[0].endswith(f"{planned.trainable_parameters:,} trainable")
    run = Path(config.output.directory)
    checkpoint_bytes = sum(file.stat().st_size for file in run.glob("checkpoints/*/*.safetensors"))
    assert planned.checkpoint_bytes == pytest.approx(checkpoint_bytes, rel=0.1)
    assert planned.adapter_bytes == pytest.approx((run / "adapter.safetensors").stat().st_size, rel=0.1)
    assert planned.workload.steps == 2 and planned.workload.report["kept"] == 40
    assert (run / "log.txt").read_text().splitlines()[0] == lines[0]


def test_the_plan_is_said_before_the_weights_are_read(tiny, alone, monkeypatch, capsys):
    def read(*_):
        raise RuntimeError(capsys.readouterr().out)

    monkeypatch.setattr("bone_ds.train.build_engine", read)
    with pytest.raises(RuntimeError, match="plan: .* GiB a rank"):
        train(validate(tiny, "case"), alone)


def test_a_run_that_cannot_fit_is_refused_and_writes_nothing(tiny, tmp_path, alone, monkeypatch, capsys):
    config = validate(tiny, "case")
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    monkeypatch.setattr(plan.process, "capacity_bytes", lambda device, ranks: -2**33)
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert re.search(r"this run needs .* GiB a rank.*are there(.|\n)*--force", capsys.readouterr().err)
    assert not Path(config.output.directory).exists()
    assert train(config, alone, force=True).steps == 2


def test_a_run_that_may_not_fit_is_warned_of(tiny, alone, monkeypatch, capsys):
    """The few tensors fit into 50 MiB, the slack that a process may take doesn't."""
    monkeypatch.setattr(plan.process, "capacity_bytes", lambda device, ranks: 50 * 2**20)
    assert train(validate(tiny, "case"), alone).steps == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan: ") and lines[1].startswith("may not fit: ")


def test_a_plan_that_fails_does_not_end_a_training(tiny, alone, monkeypatch, capsys):
    def of_run(*_):
        raise NotImplementedError("no such\noperator")

    monkeypatch.setattr(plan, "of_run", of_run)
    assert train(validate(tiny, "case"), alone).steps == 2
    assert capsys.readouterr().out.splitlines()[0] == "plan: not possible: NotImplementedError: no such operator"


def test_verdicts():
    planned = plan.plan(config_of("RWKV-x060-World-1B6.pth"), 1, "cuda")
    assert planned.fits is planned.cannot_fit is None
    slack = planned.by_component["slack"]
    for capacity_bytes, fits, cannot_fit, word in (
            (planned.peak_bytes, True, False, "fits: "), (planned.peak_bytes - 1, False, False, "may not fit: "),
            (planned.peak_bytes - slack, False, False, "may not fit: "), (planned.peak_bytes - slack - 1, False, True, "does not fit: ")):
        told = replace(planned, capacity_bytes=capacity_bytes)
        assert (told.fits, told.cannot_fit) == (fits, cannot_fit)
        assert f"\n{word}" in plan.table(told)
    unsure = replace(planned, capacity_bytes=1, complete=False)
    assert unsure.cannot_fit is False and "may not fit: " in plan.table(unsure)


def as_changed(config, change, path):
    """The config after the words of a change, as the command line reads them."""
    path.write_text(dump_yaml(config))
    return load_config(path, [word for word in str(change).split() if "=" in word])


@pytest.mark.parametrize("model, device, share, sections", [
    ("SmolLM2-135M", "cuda", 0.6, {"adapter": {"strategy": "materialized"}, "train": {"micro_batch_size": 4}}),
    ("SmolLM2-135M", "cuda", 0.8, {"train": {"recompute_modules": ["mlp"], "micro_batch_size": 2}, "data": {"max_length": 2048}}),
    ("RWKV-x060-World-1B6.pth", "cuda", 0.985, {"train": {"chunk_length": 128, "micro_batch_size": 2, "global_batch_size": 2}})])
def test_changes_that_would_fit(tmp_path, model, device, share, sections):
    config = config_of(model, **sections)
    capacity_bytes = int(share * plan.plan(config, 1, device).peak_bytes)
    planned = plan.plan(config, 1, device, capacity_bytes)
    assert planned.fits is False and planned.changes
    costs = [(not change.same_results, change.flops_ratio) for change in planned.changes]
    assert costs == sorted(costs)
    assert "not fit" in plan.table(planned) and str(planned.changes[0]) in plan.refusal(planned)
    for change in (planned.changes[0], planned.changes[-1]):
        again = plan.plan(as_changed(config, change, tmp_path / "run.yaml"), change.overrides.get("--ranks", 1), device)
        assert again.peak_bytes == change.peak_bytes <= capacity_bytes
        assert change.flops_ratio == pytest.approx(again.flops.total * again.world_size / planned.flops.total, abs=0.01)
    if config.train.chunk_length:
        named = {field for change in planned.changes for field in change.overrides}
        assert "train.chunk_length" in named and not named & {"data.max_length", "train.micro_batch_size"}
    if config.train.recompute_modules:
        assert any("train.recompute_modules=null" in str(change) for change in planned.changes)


@pytest.mark.parametrize("packing", [True, False])
def test_changes_are_dealt_batches_of_their_own(tiny, tmp_path, packing):
    """Of real samples, whose lengths differ."""
    tiny["data"] |= {"packing": packing}
    tiny["train"] |= {"micro_batch_size": 4, "loss_chunk": 16}
    tiny["adapter"] = {"method": "lora", "rank": 4}
    config = validate(tiny, "case")
    planned = plan.plan(config, 1, "cpu", plan.plan(config, 1, "cpu").peak_bytes - 1)
    assert planned.changes and not any("--ranks" in change.overrides for change in planned.changes)  # they would share this memory
    half = next(change for change in planned.changes if change.overrides == {"train.micro_batch_size": 2})
    changed = plan.plan(as_changed(config, half, tmp_path / "run.yaml"), 1, "cpu")
    assert changed.peak_bytes == half.peak_bytes
    assert planned.workload.heaviest["tokens"] / 2 <= changed.workload.heaviest["tokens"] < planned.workload.heaviest["tokens"]


def test_a_shorter_length_that_changes_nothing_is_not_offered(tiny):
    """The longest sample has fewer tokens than half of data.max_length."""
    tiny["data"] |= {"max_length": 2048}
    tiny["train"] |= {"micro_batch_size": 1, "loss_chunk": 16}
    planned = plan.plan(validate(tiny, "case"), 1, "cpu")
    planned = plan.plan(validate(tiny, "case"), 1, "cpu", planned.peak_bytes - 1)
    assert planned.fits is False and not any("data.max_length" in change.overrides for change in planned.changes)


def test_cut_samples():
    def samples_with(*prompt_lengths):
        learnt = np.concatenate([np.arange(length) >= prompt for length, prompt in zip((10, 30, 20), prompt_lengths, strict=True)])
        return Samples(np.arange(60, dtype=np.int32), np.array([0, 10, 40, 60]), learnt, 0, None)

    for overlong in ("truncate", "drop"):
        cut = workload.cut(samples_with(4, 25, 2), config_of("m.pth", data={"max_length": 20, "overlong": overlong}).data)
        assert cut.lengths.tolist() == [10, 20] and cut.label_counts.tolist() == [6, 18]
        assert cut.tokens.tolist() == [*range(10), *range(40, 60)]
    cut = workload.cut(samples_with(4, 15, 2), config_of("m.pth", data={"max_length": 20}).data)
    assert cut.lengths.tolist() == [10, 20, 20] and cut.label_counts.tolist() == [6, 5, 18]
    with pytest.raises(DataError, match="data.max_length: 8 leaves no sample"):
        workload.cut(samples_with(9, 25, 12), config_of("m.pth", data={"max_length": 8}).data)


def test_a_hub_that_can_not_be_reached_ends_no_plan(tiny, monkeypatch):
    def unreachable(*_):
        raise DataError("owner/name: the hub doesn't give it")

    monkeypatch.setattr(plan, "load_samples", unreachable)
    tiny["data"]["train"] = "owner/name"
    assert any("the hub doesn't give it; planned for full packs" in note for note in plan.plan(validate(tiny, "case"), 1, "cpu").notes)


def test_documents_weigh_where_each_has_a_state():
    shapes = [trace.Shape((100,), 50), trace.Shape((24,) * 4, 60)]
    assert len(workload._heaviest(shapes, 0).document_lengths) == 1
    assert len(workload._heaviest(shapes, 16).document_lengths) == 4


def test_inputs_in_host_memory_are_not_the_device_s(tmp_path):
    def planned(device, **section):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}, "activation_checkpointing": section}))
        return plan.plan(config_of("SmolLM2-135M", deepspeed={"config": str(tmp_path / "ds.json")}), 1, device)

    kept, moved = planned("cuda", policy="layer"), planned("cuda", policy="layer", cpu_checkpointing=True)
    inputs_bytes = 30 * 512 * 576 * 2  # every layer's (T, C) in bf16
    assert kept.by_component["activations"] - moved.by_component["activations"] == pytest.approx(inputs_bytes, rel=0.1)
    assert moved.host_by_component == {"activations": pytest.approx(inputs_bytes, rel=0.1)} and not kept.host_bytes
    assert kept.flops == moved.flops
    kept, moved = planned("cpu", policy="layer"), planned("cpu", policy="layer", cpu_checkpointing=True)
    assert kept.by_component == moved.by_component and not moved.host_bytes


def test_what_is_not_planned_is_said_and_nothing_refused(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}')
    planned = plan.plan(config_of("SmolLM2-135M", deepspeed={"config": str(tmp_path / "ds.json")}), 2, "cuda")
    planned = replace(planned, capacity_bytes=2**20)
    assert planned.fits is False and planned.cannot_fit is False
    assert any("not planned: zero_optimization.zero_hpz_partition_size" in note for note in planned.notes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_offloaded_is_in_host_memory(tmp_path, ranks):
    """Llama2-7B at stage 3: weights in powers of two where they are pinned, 12 bytes an element of masters and moments."""
    def planned(**offload):
        config = ds_configs.read("zero3_offload")
        config["zero_optimization"] = {key: value for key, value in config["zero_optimization"].items() if "offload" not in key} | offload
        (tmp_path / "ds.json").write_text(json.dumps(config))
        return plan.plan(config_of("meta-llama/Llama-2-7b-hf", deepspeed={"config": str(tmp_path / "ds.json")}), ranks, "cuda")

    none, both = planned(), planned(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert none.host_bytes == 0 and none.by_component["optimizer"] == 12 * 72_876_032 / ranks
    assert all(both.by_component[part] == 0 for part in ("adapter", "optimizer", "gradients"))
    buffers_bytes = both.by_component["weights"]
    assert buffers_bytes < 1000
    # 4096 x 4096 is a power of two; 4096 x 11008 and the vocabulary's 32000 x 4096 are rounded up to 2^26 and 2^27, the norms are as large.
    elements = 32 * (4 * 2**24 + 3 * 2**26 + 2 * 2**12) + 2 * 2**27 + 2**12
    assert both.host_by_component["weights"] == 2 * elements / ranks
    assert both.host_by_component["optimizer"] == 12 * 72_876_032 / ranks
    assert 0 < both.by_component["gathered"] < 0.1 * none.by_component["weights"] * ranks
    assert both.peak_bytes < none.peak_bytes - 0.7 * none.by_component["weights"]
    assert "host memory of one rank beside it" in plan.table(both) and "of host memory, " in plan.line(both)
    both = replace(both, host_capacity_bytes=2**33)
    assert "of 8.000 that are there" in plan.table(both) and "of host memory (8.00 are there), " in plan.line(both)
    unpinned = planned(offload_param={"device": "cpu", "pin_memory": False})
    assert unpinned.host_by_component["weights"] == none.by_component["weights"] - buffers_bytes
    assert "optimizer" not in unpinned.host_by_component
    assert unpinned.by_component["optimizer"] == none.by_component["optimizer"]


def test_offload_is_proposed_where_the_device_has_memory_of_its_own():
    config = config_of("SmolLM2-135M")
    planned = plan.plan(config, 1, "cuda")
    planned = replace(planned, capacity_bytes=planned.peak_bytes - 1)

    def again(changed, ranks):
        fits = changed.deepspeed.config == "zero3_offload"
        return replace(planned, peak_bytes=planned.peak_bytes - fits, host_by_component={"weights": fits * 2**31})

    change, = changes.that_fit(planned, config, again)
    assert change.overrides == {"deepspeed.config": "zero3_offload"} and change.host_bytes == 2**31 and change.same_results
    told = replace(planned, changes=(change,))
    assert "2.00 GiB of host memory a rank, no more FLOPs; every weight is copied" in plan.table(told)
    for line in (plan.refusal(told), plan.warning(told)):
        assert "2.00 GiB of host memory a rank, no more FLOPs, every weight is copied from host memory twice a micro-batch)" in line
    assert changes.that_fit(replace(planned, host_capacity_bytes=2**31), config, again) == (change,)
    assert not changes.that_fit(replace(planned, host_capacity_bytes=2**31 - 1), config, again)
    assert not changes.that_fit(replace(planned, device="cpu"), config, again)


def test_an_optimizer_in_host_memory_at_stage_2():
    planned = plan.plan(config_of("SmolLM2-135M", deepspeed={"config": "zero2_offload"}), 2, "cuda")
    there, here = planned.host_by_component, plan.plan(config_of("SmolLM2-135M"), 2, "cuda").by_component
    part = planned.trainable_parameters // 2
    assert there["adapter"] == 2**24 > 2 * part and there["optimizer"] == 2**25 + 8 * part > 12 * part
    assert planned.by_component["optimizer"] == 0 and here["optimizer"] == 12 * part
    assert planned.by_component["weights"] == here["weights"]


@pytest.mark.parametrize("text, field", [
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": null}}', "zero_optimization.reduce_bucket_size"),
    ('{"zero_optimization": {"stage": 2}, "data_types": null}', "data_types"),
    ('{"zero_optimization": {"stage": 2}, "data_types": "fp32"}', "data_types")])
def test_null_in_the_json_is_refused(tmp_path, text, field):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=f"ds.json: {field}: "):
        plan.plan(config_of("RWKV-x060-World-1B6.pth", deepspeed={"config": str(tmp_path / "ds.json")}), 1)


def test_chunks():
    """A chunk's memory is that of so many tokens, a step's work that of all."""
    model, length = "RWKV-x060-World-1B6.pth", {"max_length": 512}
    whole, chunked = (plan.plan(config_of(model, data=length, train=train), 1, "cuda") for train in ({}, {"chunk_length": 64}))
    assert chunked.by_component["activations"] == pytest.approx(whole.by_component["activations"] / 8, rel=0.2)
    assert chunked.flops.total == pytest.approx(whole.flops.total, rel=0.05)
    with pytest.raises(ConfigError, match="train.chunk_length: 64 needs an architecture that carries a state"):
        plan.plan(config_of("SmolLM2-135M", data=length, train={"chunk_length": 64}), 1)


def test_a_named_tokenizer_that_is_not_there_is_refused(tmp_path):
    data = {"train": str(write_rows(tmp_path / "rows.jsonl")), "prompt": "template", "template": "{q}=", "completion": "{a}"}
    with pytest.raises(CheckpointError, match="nowhere.txt"):
        plan.plan(config_of("RWKV-x060-World-1B6.pth", model={"tokenizer": str(tmp_path / "nowhere.txt")}, data=data), 1)
    assert "no tokenizer: " in plan.plan(config_of("meta-llama/Llama-2-7b-hf", data=data), 1).notes[1]


@pytest.mark.parametrize("group, stat", [(0, "anon 5\ninactive_file 300\nactive_file 200\n"),
                                         (1, "inactive_file 7\ntotal_inactive_file 300\ntotal_active_file 200\n")])
def test_pages_of_files_are_free_in_a_control_group(tmp_path, group, stat):
    group = replace(process._CONTROL_GROUPS[group], directory=tmp_path)
    assert process._control_group_bytes(group) is None
    for name, text in {group.limit: "1000\n", group.used: "900\n", "memory.stat": stat}.items():
        (tmp_path / name).write_text(text)
    assert process._control_group_bytes(group) == 600
    (tmp_path / group.limit).write_text("max\n")
    assert process._control_group_bytes(group) is None


@pytest.mark.parametrize("version, memberships", [(0, "0::/job_7/step_0\n"), (1, "5:cpu,cpuacct:/\n4:memory:/job_7/step_0\n0::/x\n")])
def test_the_groups_around_a_process_have_limits_too(tmp_path, version, memberships):
    outermost = replace(process._CONTROL_GROUPS[version], directory=tmp_path)
    groups = process._groups_of_process(outermost, memberships)
    assert [group.directory for group in groups] == [tmp_path / "job_7/step_0", tmp_path / "job_7", tmp_path]
    (tmp_path / "job_7").mkdir()  # the step's is not there, as in a container
    for name, text in {outermost.limit: "1000\n", outermost.used: "900\n", "memory.stat": ""}.items():
        (tmp_path / "job_7" / name).write_text(text)
    assert [process._control_group_bytes(group) for group in groups] == [None, 100, None]
    assert [group.directory for group in process._groups_of_process(outermost, "")] == [tmp_path]


def test_all_ranks_share_the_memory_of_a_cpu(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(dump_yaml(config_of("RWKV-x060-World-1B6.pth")))
    monkeypatch.setattr("bone_ds.launch.count_gpus", lambda: 1)
    monkeypatch.setattr(process, "capacity_bytes", lambda device, ranks: {("cpu", 4): 2**50}[device, ranks])
    assert main(["plan", str(tmp_path / "run.yaml"), "--device", "cpu", "--ranks", "4"]) == 0
    assert f"of {2**20:.1f} GiB" in capsys.readouterr().out


def test_json(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {path: RWKV-x060-World-1B6.pth}\ndata: {train: a.jsonl}\noutput: {directory: run}\n")
    assert main(["plan", str(tmp_path / "run.yaml"), "train.steps=5", "--device-memory", "24GiB", "--ranks", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {
        *asdict(plan.plan(config_of("RWKV-x060-World-1B6.pth"), 2)), "fits", "cannot_fit", "needed_bytes", "host_bytes"}
    assert told["fits"] is True and told["workload"]["steps"] == 5 and told["device"] == "cuda" and told["world_size"] == 2
    assert sum(told["by_component"].values()) == told["peak_bytes"]
    assert told["flops"]["total"] == sum(told["flops"][part] for part in ("forward", "backward", "recomputed"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch and deepspeed
@pytest.mark.parametrize("stage, dtype, sections", [
    (0, "bf16", {}), (1, "fp32", {}), (2, "bf16", {}), (3, "fp32", {}), (1, "bf16", IN_FP32),
    (1, "bf16", WHOLE | FUSED), (3, "fp32", WHOLE | FUSED),
    (1, "bf16", WHOLE | OFFLOAD), (1, "bf16", WHOLE | OFFLOAD | IN_FP32), (2, "fp32", WHOLE | OFFLOAD | FUSED),
    (2, "bf16", WHOLE | OFFLOAD), (2, "bf16", WHOLE | OFFLOAD | IN_FP32),
    (3, "bf16", WHOLE | OFFLOAD), (3, "bf16", WHOLE | OFFLOAD_ALL | FUSED)], ids=str)
def test_against_the_engine(tiny, alone, tmp_path, stage, dtype, sections):
    """Live bytes of the real engine on one rank, in a step of several micro-batches; with all weights trained the optimizer weighs most."""
    from bone_ds import engine as engines
    from bone_ds.data import GlobalOrder, collate, deal, load_samples
    from bone_ds.live import LiveMemory
    from bone_ds.step import optimizer_step
    from bone_ds.train import build_engine

    zero_section = json.loads(write_zero3(tmp_path / "ds.json").read_text())["zero_optimization"] if stage == 3 else {"stage": stage}
    zero_section |= {"reduce_bucket_size": 2000} | sections.get("zero_optimization", {})  # buckets are not to hide the rest
    (tmp_path / "ds.json").write_text(json.dumps(
        {"zero_optimization": zero_section} | {key: sections[key] for key in ("data_types",) if key in sections}))
    tiny["deepspeed"]["config"], tiny["model"]["dtype"] = str(tmp_path / "ds.json"), dtype
    tiny["adapter"] = sections.get("adapter", tiny["adapter"])
    tiny["train"] |= sections.get("train", {})
    config = validate(tiny, "case")
    planned = plan.plan(config, 1, "cpu")
    live = LiveMemory()
    with engines.distributed(alone):
        architecture = arch.resolve(config.model)
        source = architecture.open(config.model)
        samples = load_samples(config.data, architecture.tokenizer(source))
        order = GlobalOrder(samples, False, config.data.max_length, 8, 0)
        with live:
            engine = build_engine(config, architecture, source, ds_json.resolve(config, 1), torch.device("cpu"))
            live.reset_peak()
            for step in range(2):
                window = order.window(step)
                batches = [collate(samples, hand.units, "cpu") for hand in deal(window, 0, 1, 2, 8)]
                optimizer_step(engine, batches, window.label_tokens, 0.01)
        engine.deepspeed.destroy()
    assert planned.live_peak_bytes == pytest.approx(live.peak_bytes, rel=0.03)


def test_stage_3_shares_and_gathers():
    modules = [[("embedding", 5 * MILLION)], *([(f"{layer}", 10 * MILLION), (f"{layer}.norm", 1000)] for layer in range(4))]
    zero_section = {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    ds = {"zero_optimization": zero_section}
    gathered = partial(zero.gathered, forward=modules, backward=modules[::-1])
    assert gathered(ds, 1).most == 0
    assert gathered(ds, 2).most < 2 * 10 * MILLION + 3000  # a module's flat buffer and its copies
    zero_section["stage3_max_reuse_distance"] = 10**9
    assert gathered(ds, 2).in_forward[-1] >= 45 * MILLION
    halves = [zero.engine_memory(ds, ranks, [4 * MILLION], [MILLION], 2, True).fixed["weights"] for ranks in (1, 2)]
    assert halves == [8 * MILLION, 4 * MILLION]


def test_stage_3_gathers_again_what_is_recomputed():
    layers = [[[(f"{layer}.{part}", 10 * MILLION)] for part in range(6)] for layer in range(3)]
    forward = [module for layer in layers for module in layer]
    again = [module for layer in reversed(layers) for module in (*layer, *reversed(layer))]
    ds = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 65 * MILLION,
                                "stage3_param_persistence_threshold": 0}}
    plain, recomputed = zero.gathered(ds, 2, forward, forward[::-1]), zero.gathered(ds, 2, forward, again)
    assert plain.at_start_of_backward == 40 * MILLION  # 65 million later it is needed again: three modules and the one that runs
    assert recomputed.at_start_of_backward == 60 * MILLION  # the whole last layer


def test_the_parts_of_memory_add_up(tiny):
    for device in ("cpu", "cuda"):
        planned = plan.plan(validate(tiny, "case"), 2, device)
        assert list(planned.by_component) == list(plan.report.COMPONENTS)
        assert sum(planned.by_component.values()) == planned.peak_bytes
        assert all(size >= 0 for size in planned.by_component.values())
