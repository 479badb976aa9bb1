"""`bone-ds inspect` says what a file is and whether it is whole; what is damaged is named in a line, with exit code 2."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tiny
import tiny_llama
import tiny_rwkv
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_rwkv_adapter import random_adapter as random_rwkv_adapter

from bone_ds import BoneConfig, BoneModel, adapter_file
from bone_ds.cli import main
from bone_ds.formats import peft, rwkv_peft

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of everything."""
    directory = tmp_path_factory.mktemp("made")
    tiny_llama.save_tiny(directory / "llama", tie_word_embeddings=True)
    tiny_llama.save_tiny(directory / "sharded", max_shard_size="20KB", dtype=torch.bfloat16)
    tiny_llama.write_gguf(directory / "llama.gguf", tiny_llama.tiny_model(), quantised=gguf.GGMLQuantizationType.Q8_0)
    tiny_rwkv.save_tiny(directory / "rwkv.pth", vocabulary=256, initial_state=True)
    tiny_rwkv.save_tiny(directory / "rwkv.safetensors", vocabulary=256, dtype=torch.bfloat16)
    tiny_llama.random_adapter(directory / "llama", directory / "row.safetensors", rank=8, layers=[1, 2])
    tiny_llama.random_adapter(directory / "llama", directory / "lora.safetensors", method="lora", rank=4, targets=["q_proj"])
    tiny_llama.random_adapter(directory / "llama", directory / "full.safetensors", method="full")
    tiny_llama.random_adapter(directory / "llama", directory / "miss.safetensors", rank=8, grouping="miss")
    tiny_llama.random_adapter(directory / "llama", directory / "free.safetensors", rank=8, grouping="free", groups=2, form="unconstrained")
    random_rwkv_adapter(directory / "rwkv.safetensors", directory / "rwkv-row.safetensors", rank=8)
    random_rwkv_adapter(directory / "rwkv.safetensors", directory / "state.safetensors", method="state")
    peft.export_adapter(directory / "miss.safetensors", directory / "peft")
    rwkv_peft.export_adapter(directory / "rwkv-row.safetensors", directory / "rwkv-peft.pth")
    rows = tiny.write_rows(directory / "rows.jsonl")
    config = tiny.config_tree(directory / "llama", rows, directory / "run", adapter={"rank": 8}, train={"steps": 3, "save_every": 2})
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run([sys.executable, "-m", "bone_ds", "train", "run.yaml"], cwd=directory, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def inspected(capsys):
    """Path -> the JSON of what is whole."""
    def run(path) -> dict:
        assert main(["inspect", str(path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def copied(made, tmp_path):
    """Name -> a copy that a test may damage."""
    def copy(name: str) -> Path:
        source, target = made / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, target))

    return copy


@pytest.mark.parametrize("name", ["llama", "sharded", "llama.gguf"])
def test_llama(made, inspected, name):
    found = inspected(made / name)
    counted = sum(parameter.numel() for parameter in tiny_llama.tiny_model(tie_word_embeddings=name == "llama").parameters())
    assert (found["what"], found["whole"]) == ("Llama model", True)
    facts = found["facts"]
    kinds = {"attention": 2 * (2 * 32 * 32 + 2 * 32 * 16), "mlp": 2 * 3 * 32 * 64, "norm": 5 * 32, "embedding": 96 * 32}
    assert facts["parameters_by_kind"] == kinds | ({} if name == "llama" else {"head": 96 * 32})
    assert facts["parameters"] == sum(facts["stored_as"].values()) == counted
    assert facts["stored_as"] == {"llama": {"F32": counted}, "sharded": {"BF16": counted},
                                  "llama.gguf": {"Q8_0": counted - 160, "F32": 160}}[name]
    assert facts["sizes"]["num_hidden_layers"] == 2 and facts["sizes"]["vocab_size"] == 96
    assert bool(facts["fingerprint"]) == (name != "llama.gguf")
    assert facts["size_bytes"] >= counted


@pytest.mark.parametrize("name, dtype", [("rwkv.pth", "F32"), ("rwkv.safetensors", "BF16")])
def test_rwkv(made, inspected, name, dtype):
    found = inspected(made / name)
    tensors = torch.load(made / name) if name.endswith(".pth") else load_file(made / name)
    counted = sum(tensor.numel() for tensor in tensors.values())
    assert found["what"] == "RWKV6 model" and found["facts"]["stored_as"] == {dtype: counted}
    assert found["facts"]["parameters"] == sum(found["facts"]["parameters_by_kind"].values()) == counted
    assert found["facts"]["sizes"]["layers"] == 2 and found["facts"]["sizes"]["vocabulary"] == 256


ADAPTERS = {
    "row.safetensors": {"method": "bone", "grouping": "row", "form": "affine", "rank": 8, "layers": [1, 2]},
    "lora.safetensors": {"method": "lora", "grouping": None, "rank": 4, "targets": ["q_proj"], "layers": "all"},
    "full.safetensors": {"method": "full", "rank": None, "layers": "all"},
    "miss.safetensors": {"method": "bone", "grouping": "miss", "rank": 8},
    "free.safetensors": {"method": "bone", "grouping": "free", "groups": 2, "form": "unconstrained", "rank": 8},
    "rwkv-row.safetensors": {"method": "bone", "grouping": "row", "rank": 8},
    "state.safetensors": {"method": "state", "grouping": None, "targets": []},
    "rwkv-peft.pth": {"method": "bone", "grouping": "row", "rank": 8, "layers": [0, 2]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(made, inspected, name):
    found = inspected(made / name)
    tensors = torch.load(made / name) if name.endswith(".pth") else load_file(made / name)
    facts = found["facts"]
    assert found["whole"] and {field: facts[field] for field in ADAPTERS[name]} == ADAPTERS[name]
    assert facts["parameters"] == sum(facts["parameters_by_kind"].values()) == sum(tensor.numel() for tensor in tensors.values())
    assert facts["tensors"] == len(tensors)
    if name.endswith(".safetensors"):
        base = made / ("rwkv.safetensors" if "rwkv" in name or "state" in name else "llama")
        assert facts["base"]["path"] == str(base) and facts["base"]["now"] == "the same model lies there" and facts["step"] == 3
        assert facts["base"]["fingerprint"] == inspected(base)["facts"]["fingerprint"]


def test_peft_directories(made, inspected):
    facts = inspected(made / "peft")["facts"]
    assert (facts["peft_type"], facts["init_weights"], facts["r"], facts["base"]["path"]) == ("MISS", True, 8, str(made / "llama"))
    assert inspected(made / "peft/adapter_model.safetensors")["facts"] == facts
    for directory in sorted((ROOT / "tests/fixtures/peft").glob("*/")):
        assert inspected(directory)["what"] == f"PEFT adapter, {'BONE' if directory.name.startswith('bone') else 'MISS'}"


BONE_MODELS = {
    "row": {"grouping": "row"}, "col": {"init_weights": "bat"}, "left": {"grouping": "left"}, "miss": {},
    "free": {"grouping": "free", "groups": 2}, "unconstrained": {"grouping": "row", "form": "unconstrained"},
    "hadamard": {"grouping": "col", "form": "hadamard"}}


def bone_model(**options) -> BoneModel:
    return BoneModel(tiny_llama.tiny_model(), BoneConfig(r=8, target_modules=["q_proj", "down_proj", "c_attn"], **options))


@pytest.mark.parametrize("name", BONE_MODELS)
def test_directories_of_bone_model(tmp_path, inspected, name):
    bone_model(modules_to_save=["lm_head"], **BONE_MODELS[name]).save_pretrained(tmp_path)
    found = inspected(tmp_path)
    facts = found["facts"]
    asked = {"grouping": {"unconstrained": "row", "hadamard": "col"}.get(name, name), "groups": BONE_MODELS[name].get("groups"),
             "form": name if name in ("unconstrained", "hadamard") else "affine", "r": 8, "modules_to_save": ["lm_head"]}
    assert found["what"] == "PEFT adapter, BONE" and {field: facts[field] for field in asked} == asked
    assert facts["targets_without_tensors"] == ["c_attn"], "a model may lack a target"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values()) > 96 * 32


def test_adapters_by_name(tmp_path, inspected, refused):
    model = bone_model()
    model.add_adapter("second", BoneConfig(r=4, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    facts, second = (inspected(path)["facts"] for path in (tmp_path, tmp_path / "second"))
    assert facts["further_adapters"] == ["second"] and (second["r"], second["tensors"]) == (4, 2)
    for path in tmp_path.glob("adapter_*"):
        path.unlink()
    refused(tmp_path, "inspect one of them: second")


@pytest.mark.parametrize("options, changes, says", [
    ({"grouping": "row"}, {"r": 4}, "r 4, grouping row"), ({"grouping": "row"}, {"grouping": "miss"}, "grouping miss"),
    ({"grouping": "row"}, {"form": "unconstrained"}, "form unconstrained"), ({}, {"groups": 2}, "groups: 2"),
    ({"grouping": "free", "groups": 2}, {"groups": 4}, "does not fit"),
    ({"grouping": "free", "groups": 2}, {"groups": None}, "groups: None"),
    ({}, {"grouping": "diagonal"}, "'diagonal' is unknown"), ({}, {"grouping": [1]}, "describes no adapter")])
def test_damaged_bone_model(tmp_path, refused, options, changes, says):
    bone_model(**options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    refused(tmp_path, str(tmp_path), says)


def test_run(made, inspected):
    facts = inspected(made / "run")["facts"]
    last = {event["event"]: event for event in map(json.loads, (made / "run/events.jsonl").read_text().splitlines())}
    assert facts["state"] == "ended after step 3 of 3" and facts["loss"] == last["step"]["loss"]
    assert facts["held_out_loss"] == last["eval"]["loss"] and facts["model"] == str(made / "llama")
    assert [one["step"] for one in facts["checkpoints"]] == [2, 3] and facts["adapter"]["step"] == 3
    (source,) = facts["trained_on"]
    assert source["samples"] == 40 and source["source"].endswith("rows.jsonl")
    checkpoint = inspected(made / "run/checkpoints/step-00000002")["facts"]
    adapter = inspected(made / "run/adapter.safetensors")["facts"]
    assert checkpoint["step"] == 2 and checkpoint["grouping"] == "row" and checkpoint["trained_on"] == adapter["trained_on"] == [source]
    assert checkpoint["parameters"] == adapter["parameters"] == facts["trainable_parameters"]


def test_text(made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    assert main(["inspect", "run/adapter.safetensors"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("run/adapter.safetensors: Bone adapter for llama, whole\n")
    assert "grouping            row\n" in text and f"source {made}/rows.jsonl, samples 40" in text and "lies there" in text
    assert "None" not in text
    base = text[text.index("  base"):text.index("  step")].splitlines()
    assert len(base) == 4 and {line.index(word) for line, word in zip(base, ("path", "dtype", "fingerprint", "now"))} == {22}


def test_a_range_of_layers_is_shown_as_one(made, capsys):
    assert main(["inspect", str(made / "row.safetensors")]) == 0
    assert re.search(r"^  layers +\[1, 2\)$", capsys.readouterr().out, re.MULTILINE)


def test_a_short_dictionary_stands_on_one_line(made, capsys):
    assert main(["inspect", str(made / "rwkv.pth")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  parameters by kind  \w+ [\d,]+, \w+ ", text, re.MULTILINE) and re.search(r"^ {22}width \d+$", text, re.MULTILINE)


def test_a_base_that_is_gone_or_another(made, copied, tmp_path, inspected):
    base = copied("llama")
    tiny_llama.random_adapter(base, tmp_path / "a.safetensors", rank=8)
    assert inspected(tmp_path / "a.safetensors")["facts"]["base"]["now"] == "the same model lies there"
    tiny.write_model_with(tmp_path / "other", base, "model.norm.weight", 2.0)
    shutil.rmtree(base)
    assert "not on this machine" in inspected(tmp_path / "a.safetensors")["facts"]["base"]["now"]
    base.mkdir()
    assert "no whole model" in inspected(tmp_path / "a.safetensors")["facts"]["base"]["now"]
    base.rmdir()
    (tmp_path / "other").rename(base)
    assert "another model lies there" in inspected(tmp_path / "a.safetensors")["facts"]["base"]["now"]


@pytest.fixture
def refused(capsys):
    def run(path, *says) -> None:
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 2
        output = capsys.readouterr()
        message = output.err.removesuffix("\n")
        assert output.out == "" and message.startswith("bone-ds: ") and "\n" not in message, message
        assert all(part in message for part in says), message

    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def without(path: Path, part: str) -> None:
    """The first tensor whose name holds the part is left out."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del tensors[next(name for name in tensors if part in name)]
    save_file(tensors, path, metadata)


def test_damaged_files(copied, refused):
    for name in ("llama.gguf", "rwkv.pth", "rwkv.safetensors", "row.safetensors", "rwkv-peft.pth"):
        path = copied(name)
        cut(path)
        refused(path, str(path))
        path.write_bytes(b"")
        refused(path, str(path))
    model = copied("sharded")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    cut(shard)
    refused(model, str(shard), "ends at byte")
    shard.unlink()
    refused(model, str(shard))


@pytest.mark.parametrize("name, part, says", [
    ("row.safetensors", "k_proj", "k_proj"), ("lora.safetensors", "lora_B", "lora_B: is missing"),
    ("rwkv-row.safetensors", "ffn.key", "ffn.key"),
    ("state.safetensors", "blocks.0", "layers [1, 2)"), ("rwkv.safetensors", "blocks.1.att.key", "blocks.1.att.key.weight"),
    ("full.safetensors", "norm", "norm")])
def test_a_tensor_is_missing(copied, refused, name, part, says):
    path = copied(name)
    without(path, part)
    refused(path, str(path), says)


def test_missing_without_the_base_to_tell_it(copied, tmp_path, refused):
    base = copied("llama")
    tiny_llama.random_adapter(base, tmp_path / "a.safetensors", rank=8)
    tiny_llama.random_adapter(base, tmp_path / "b.safetensors", rank=8, layers=[0, 2])
    shutil.rmtree(base)
    without(tmp_path / "a.safetensors", "layers.1.mlp.up_proj")
    refused(tmp_path / "a.safetensors", "model.layers.1.mlp.up_proj")
    tensors = load_file(tmp_path / "b.safetensors")
    for name in tensors:
        if "layers.1." in name:
            without(tmp_path / "b.safetensors", name)
    refused(tmp_path / "b.safetensors", "[0, 1)", "[0, 2]")


def test_damaged_peft(copied, refused):
    path = copied("peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    refused(path, "miss_block", "r 4")
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": None}))
    refused(path, "r: None is no block size")
    (path / "adapter_config.json").write_text("{")
    refused(path, "adapter_config.json")
    (path / "adapter_config.json").unlink()
    refused(path, "holds no adapter_config.json")
    (path / "adapter_config.json").write_text(json.dumps(config))
    cut(path / "adapter_model.safetensors")
    refused(path, "adapter_model.safetensors", "damaged")
    (path / "adapter_model.safetensors").unlink()
    refused(path, "holds no adapter_model.safetensors")


def test_blocks_are_missing(tmp_path, refused, inspected):
    model = bone_model(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    without(weights, "layers.1.mlp.down_proj.bone_block")
    refused(tmp_path, "down_proj of model.layers.1")
    model.save_pretrained(tmp_path)
    save_file({name: tensor for name, tensor in load_file(weights).items() if "bone_block" not in name}, weights)
    refused(tmp_path, "no tensor MODULE.bone_block")
    for targets in (".*layers.0.self_attn.q_proj|.*down_proj", ["0.self_attn.q_proj", "down_proj"]):
        BoneModel(tiny_llama.tiny_model(), BoneConfig(r=8, target_modules=targets)).save_pretrained(tmp_path)
        assert inspected(tmp_path)["facts"]["tensors"] == 3, "targets that may lie on any layers are no damage"


@pytest.mark.parametrize("target, part", [
    ("q_proj", "lora_A"), ("q_proj", "lora_B.weight"), ("embed_tokens", "lora_embedding_A"), ("embed_tokens", "lora_embedding_B")])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised inside PEFT's own __init__
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # it takes biases for weights that were cut
def test_half_a_lora(tmp_path, refused, inspected, target, part):
    options = LoraConfig(r=4, target_modules=[target], lora_bias=target == "q_proj")
    get_peft_model(tiny_llama.tiny_model(), options).save_pretrained(tmp_path, save_embedding_layers=False)
    assert inspected(tmp_path)["facts"]["peft_type"] == "LORA"
    without(tmp_path / "adapter_model.safetensors", part)
    refused(tmp_path, part, "is missing beside")


def test_nested_too_deeply(copied, refused):
    path = copied("peft")
    (path / "adapter_config.json").write_text("[" * 100_000)
    refused(path, "adapter_config.json is damaged")


@pytest.mark.parametrize("tensors, says", [
    ({"blocks.0.att.key.bone": ()}, "blocks.0.att.key.bone: has shape ()"), ({"blocks.0.att.key.disha": (4,)}, "has shape (4,)"),
    ({"blocks.0.att.time_state": (4, 8)}, "has shape (4, 8)"), ({"blocks.0.att.time_state": (4, 8, 4)}, "has shape (4, 8, 4)"),
    ({"blocks.0.att.time_state": (4, 8, 8), "blocks.1.att.time_state": (2, 16, 16)}, "blocks.1.att.time_state: has shape (2, 16, 16)")])
def test_shapes_that_rwkv_peft_has_not(tmp_path, refused, tensors, says):
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", str(tmp_path / "a.pth"), says)


def test_a_peft_directory_without_a_base_has_no_row_of_it(tmp_path, capsys):
    bone_model().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert re.search(r"^ +base *$", capsys.readouterr().out, re.MULTILINE) is None


def test_damaged_checkpoint(copied, refused):
    path = copied("run") / "checkpoints/step-00000002"
    size = (path / "state.safetensors").stat().st_size
    cut(path / "state.safetensors")
    refused(path, "state.safetensors", f"{size - 40} bytes", str(size))
    (path / "state.safetensors").unlink()
    refused(path, "state.safetensors: has no bytes")
    fresh = path.with_name("step-00000003")
    (fresh / "manifest.json").write_text((fresh / "manifest.json").read_text().replace('"step": 3', '"step": 2'))
    refused(fresh, "manifest.json: is damaged")
    (fresh / "manifest.json").unlink()
    refused(fresh, "manifest.json: is missing")


def test_a_checkpoint_beside_a_damaged_adapter(copied, inspected):
    run = copied("run")
    cut(run / "adapter.safetensors")
    assert inspected(run / "checkpoints/step-00000003")["facts"]["step"] == 3


def problems_of(run, capsys) -> list[str]:
    assert main(["inspect", str(run), "--json"]) == 2
    return json.loads(capsys.readouterr().out)["problems"]


def test_a_checkpoint_without_its_manifest(copied, capsys):
    run = copied("run")
    for step in (2, 3):
        (run / f"checkpoints/step-0000000{step}/manifest.json").unlink()
        problems = problems_of(run, capsys)
        assert len(problems) == step - 1 and f"step-0000000{step}/manifest.json: is missing" in problems[-1]


def with_header(path: Path, **changes) -> None:
    tensors = load_file(path)
    header, _ = adapter_file.read(path)
    adapter_file.write(path, replace(header, **changes), tensors)


def test_an_adapter_that_is_not_the_run_s(made, copied, capsys, inspected):
    run = copied("run")
    with_header(run / "adapter.safetensors", step=1)
    (problem,) = problems_of(run, capsys)
    assert "adapter.safetensors: is of step 1, the last checkpoint of step 3" in problem
    shutil.copy(made / "lora.safetensors", run / "adapter.safetensors")  # of step 3
    problems = problems_of(run, capsys)
    assert any("its method is lora, config.yaml's is bone" in line for line in problems)
    assert any("its rank is 4, config.yaml's is 8" in line for line in problems)


def test_a_run_that_was_killed_before_it_recorded_a_checkpoint(copied, inspected):
    run = copied("run")
    events = (run / "events.jsonl").read_text().splitlines(keepends=True)
    last = next(number for number, line in reversed(list(enumerate(events))) if json.loads(line)["event"] == "checkpoint")
    (run / "events.jsonl").write_text("".join(events[:last]))
    assert inspected(run)["facts"]["adapter"]["step"] == 3
    with_header(run / "adapter.safetensors", step=2)
    assert inspected(run)["facts"]["adapter"]["step"] == 2


def test_a_run_that_goes_on_from_an_earlier_step(copied, inspected):
    run = copied("run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = {event["event"]: event for event in events}

    def facts_after(event, **changes):
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps(last[event] | changes) + "\n")
        facts = inspected(run)["facts"]
        return facts["state"].partition(",")[0], facts["loss"]

    assert facts_after("start", step=3) == ("at step 3 of 3", last["step"]["loss"])
    assert facts_after("end") == ("ended after step 3 of 3", last["step"]["loss"])
    shutil.rmtree(run / "checkpoints/step-00000003")  # to go on from an earlier one
    with_header(run / "adapter.safetensors", step=2)
    assert facts_after("start", step=2) == ("at step 2 of 3", None)
    assert facts_after("step", step=3, loss=0.5) == ("at step 3 of 3", 0.5)


def test_what_an_adapter_was_trained_on_is_known_of_the_run_s_own(copied, inspected):
    run = copied("run")
    own, other = run / "adapter.safetensors", run / "other.safetensors"
    assert inspected(own)["facts"]["trained_on"]
    shutil.copy(own, other)
    assert inspected(other)["facts"]["trained_on"] is None
    with_header(own, base_fingerprint="0" * 64)
    assert inspected(own)["facts"]["trained_on"] is None


def test_a_run_that_is_not_whole_names_everything(copied, capsys):
    run = copied("run")
    cut(run / "checkpoints/step-00000002/state.safetensors")
    shutil.rmtree(run / "checkpoints/step-00000003")
    cut(run / "adapter.safetensors")
    (run / "deepspeed.json").unlink()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    (run / "checkpoints/step-00000004.partial").mkdir()
    assert main(["inspect", str(run)]) == 2
    text = capsys.readouterr().out
    assert text.startswith(f"{run}: run directory, not whole\n")
    problems = [line for line in text.splitlines() if line.startswith("  ! ")]
    assert len(problems) == 4
    for part in ("deepspeed.json: is missing", "step-00000002/state.safetensors", "step-00000003: is missing", "adapter.safetensors"):
        assert sum(part in line for line in problems) == 1, text
    assert "step-00000004.partial" in text and "torn lines" in text


def test_a_run_that_was_stopped(copied, inspected):
    run = copied("run")
    events = (run / "events.jsonl").read_text().splitlines()
    kept = [line for line in events if json.loads(line).get("step", 0) < 3 and json.loads(line)["event"] != "end"]
    (run / "events.jsonl").write_text("\n".join(kept) + "\n")
    assert inspected(run)["facts"]["state"].startswith("at step 2 of 3, not ended")


PAGES = [ROOT / name for name in ("docs/generate.md", "README.md")]
COMMANDS = sorted({line.partition("  #")[0].strip() for page in PAGES
                   for line in re.findall(r"^bone-ds inspect .*$", page.read_text(encoding="utf-8"), re.MULTILINE)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_runs(made, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rwkv6-metamath").symlink_to(made / "run")
    Path("RWKV-x060-World-1B6.pth").symlink_to(made / "rwkv.pth")
    assert len(COMMANDS) >= 3 and main(shlex.split(command)[1:]) == 0
    assert "whole" in capsys.readouterr().out


def test_what_is_unknown(tmp_path, refused):
    refused(tmp_path / "gone", "there is no such file or directory")
    refused(tmp_path, "none of the directories", "config.json", "adapter_config.json", "config.yaml", "manifest.json")
    (tmp_path / "notes.txt").write_text("notes")
    refused(tmp_path / "notes.txt", "none of the files", ".pth", ".gguf")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "is no RWKV6 model")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**40))
    refused(tmp_path / "b.safetensors", "no safetensors file")
    torch.save({"blocks.0.att.key.lora_A": torch.ones(2, 2)}, tmp_path / "lora.pth")
    refused(tmp_path / "lora.pth", "lora")
    torch.save({"a": subprocess.Popen}, tmp_path / "code.pth")
    refused(tmp_path / "code.pth", "Popen", "nothing in it was run")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path, "'gpt2'", "only 'llama'")
