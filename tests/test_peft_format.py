"""PEFT's directories: to the bit both ways, computing what PEFT computes, with files that real releases wrote, and bad ones refused.

Directories of MiSS are written and read by the PEFT that is installed; those of older ones lie in fixtures/peft, see write.py there.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from linear_net import LLAMA_SIZES, linear_net
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import random_adapter, save_tiny
from tiny_rwkv import save_tiny as save_tiny_rwkv
from tiny_rwkv_adapter import random_adapter as random_rwkv_adapter
from transformers import LlamaForCausalLM

from bone_ds import BoneConfig, BoneModel, adapter_file
from bone_ds.cli import main
from bone_ds.errors import CheckpointError
from llama_adapters import ARCHITECTURE

# Raised inside PEFT's own __init__.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FIXTURES = Path(__file__).parent / "fixtures/peft"
TOKENS = torch.arange(3, 43)[None]
KINDS = {"miss": True, "col": "bat"}
"""Groupings by PEFT's init_weights."""
WRITTEN = {"bone": ("miss", 8), "bone-padded": ("miss", 12), "bone-bat": ("col", 8),
           "miss": ("miss", 8), "miss-padded": ("miss", 12), "miss-bat": ("col", 8)}
"""Grouping and r of the fixtures that are read."""


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base")
    return tmp_path / "base"


def plain(base, dtype=torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=dtype)


def theirs(base, directory, kind="miss", **options) -> PeftModel:
    """A MiSS adapter that PEFT made and saved."""
    config = MissConfig(**{"r": 8, "init_weights": KINDS[kind], "target_modules": list(ARCHITECTURE.targets)} | options)
    model = get_peft_model(plain(base), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    return model.eval()


def imported(base, directory) -> Path:
    out = base.parent / "imported.safetensors"
    assert main(["import", "--from", "peft", str(directory), "--base", str(base), "--out", str(out)]) == 0
    return out


def exported(adapter, out, *options: str) -> Path:
    assert main(["export", "--to", "peft", str(adapter), "--out", str(out), *options]) == 0
    return out


def same_bits(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert here.keys() == there.keys() and here
    for name, tensor in here.items():
        assert torch.equal(tensor.float(), there[name].float()) and torch.equal(tensor.signbit(), there[name].signbit()), name


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def logits_of_merged(adapter, out) -> torch.Tensor:
    assert main(["merge", str(adapter), "--out", str(out)]) == 0
    return logits_of(plain(out))


@pytest.mark.parametrize("options", [
    {}, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*mlp\.up_proj"}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_is_imported_to_the_bit_and_computes_the_same(base, tmp_path, kind, options):
    model = theirs(base, tmp_path / "theirs", kind, **options)
    adapter = imported(base, tmp_path / "theirs")
    header, ours = adapter_file.read(adapter)
    assert (header.method, header.grouping, header.rank) == ("bone", kind, 8)
    assert header.layers == ([1, 2] if "layers_to_transform" in options else None)
    saved = load_file(tmp_path / "theirs/adapter_model.safetensors")
    same_bits({f"base_model.model.{name.removesuffix('.bone')}.miss_block": tensor for name, tensor in ours.items()}, saved)
    wanted = logits_of(model)
    torch.testing.assert_close(logits_of_merged(adapter, tmp_path / "merged"), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(BoneModel.from_pretrained(plain(base), tmp_path / "theirs")), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits_of(plain(base))).abs().max() > 2e-3


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_peft_loads_to_the_bit_and_computes_the_same(base, tmp_path, kind, layers):
    random_adapter(base, tmp_path / "ours.safetensors", rank=8, grouping=kind, layers=layers)
    out = exported(tmp_path / "ours.safetensors", tmp_path / "deep/for-peft")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(plain(base), out)
    assert type(model.peft_config["default"]) is MissConfig and model.peft_config["default"].init_weights == KINDS[kind]
    _, ours = adapter_file.read(tmp_path / "ours.safetensors")
    loaded = {name.removeprefix("base_model.model.").removesuffix(".miss_block.default") + ".bone": parameter.data
              for name, parameter in model.named_parameters() if "miss_block" in name}
    same_bits(ours, loaded)
    assert len(ours) == (14 if layers is None else 7)
    torch.testing.assert_close(logits_of_merged(tmp_path / "ours.safetensors", tmp_path / "merged"), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_nothing(base, tmp_path, kind):
    random_adapter(base, tmp_path / "ours.safetensors", rank=8, grouping=kind, targets=["q_proj", "up_proj"])
    again = imported(base, exported(tmp_path / "ours.safetensors", tmp_path / "theirs"))
    (here, tensors), (there, originals) = adapter_file.read(again), adapter_file.read(tmp_path / "ours.safetensors")
    same_bits(tensors, originals)
    assert (here.adapter, here.base_fingerprint) == (there.adapter, there.base_fingerprint)
    back = exported(again, tmp_path / "back")
    same_bits(load_file(back / "adapter_model.safetensors"), load_file(tmp_path / "theirs/adapter_model.safetensors"))


def test_an_adapter_of_rwkv6_there_and_back(tmp_path):
    save_tiny_rwkv(tmp_path / "base.pth")
    random_rwkv_adapter(tmp_path / "base.pth", tmp_path / "ours.safetensors", rank=8, grouping="col", layers=[1, 2])
    out = exported(tmp_path / "ours.safetensors", tmp_path / "theirs")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["layers_pattern"]) == ([1], "blocks") and "att.key" in config["target_modules"]
    again = imported(tmp_path / "base.pth", out)
    (here, tensors), (there, originals) = adapter_file.read(again), adapter_file.read(tmp_path / "ours.safetensors")
    same_bits(tensors, originals)
    assert here.adapter == there.adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_value_survives_in_the_least_dtype_that_holds_it(base, tmp_path, dtype):
    theirs(base, tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    next(iter(tensors.values()))[0, :4] = torch.tensor([0.0, -0.0, 1e-40, torch.finfo(dtype).max])
    save_file(tensors, path, metadata={"format": "pt"})
    adapter = imported(base, tmp_path / "theirs")
    back = load_file(exported(adapter, tmp_path / "back") / "adapter_model.safetensors")
    same_bits(back, tensors)
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    forced = load_file(exported(adapter, tmp_path / "forced", "--dtype", "bf16") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in forced.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_bf16_model_peft_and_this_differ_by_rounding_alone(base, tmp_path, kind):
    random_adapter(base, tmp_path / "ours.safetensors", rank=8, grouping=kind)
    out = exported(tmp_path / "ours.safetensors", tmp_path / "theirs")
    exact = logits_of(PeftModel.from_pretrained(plain(base), out))
    models = [wrap.from_pretrained(plain(base, torch.bfloat16), out) for wrap in (PeftModel, BoneModel)]
    there, here = (logits_of(model).float() - exact for model in models)
    assert all({p.dtype for n, p in model.named_parameters() if "_block" in n} == {torch.float32} for model in models)
    assert 0 < here.norm() < 2 * there.norm() and there.norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("method", [{"grouping": grouping} for grouping in ("row", "left", "col", "miss")] + [
    {"grouping": "free", "groups": 4, "form": "affine"}, {"grouping": "col", "form": "unconstrained"}], ids=str)
def test_an_adapter_of_bone_model_becomes_one_of_bone_ds(base, tmp_path, method):
    model = BoneModel(plain(base), BoneConfig(r=8, target_modules="all-linear", **method))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "model")
    adapter = imported(base, tmp_path / "model")
    header = adapter_file.read(adapter)[0].adapter
    assert {field: getattr(header, field) for field in method} == method
    torch.testing.assert_close(logits_of_merged(adapter, tmp_path / "merged"), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [
    {"grouping": "row"}, {"grouping": "left", "layers": [1, 2]}, {"grouping": "col"}, {"grouping": "miss"},
    {"grouping": "free", "groups": 4}, {"grouping": "col", "form": "unconstrained"}], ids=str)
def test_an_adapter_of_bone_ds_becomes_one_of_bone_model(base, tmp_path, adapter):
    random_adapter(base, tmp_path / "ours.safetensors", rank=8, **adapter)
    command = ["export", "--to", "bone-model", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "model")]
    assert main(command) == 0
    model = BoneModel.from_pretrained(plain(base), tmp_path / "model")
    wanted = logits_of_merged(tmp_path / "ours.safetensors", tmp_path / "merged")
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    again = imported(base, tmp_path / "model")
    (here, tensors), (there, originals) = adapter_file.read(again), adapter_file.read(tmp_path / "ours.safetensors")
    same_bits(tensors, originals)
    assert here.adapter == there.adapter


def test_an_adapter_of_another_method_is_none_of_bone_model(base, tmp_path, refuse):
    random_adapter(base, tmp_path / "ours.safetensors", method="lora", rank=4)
    message = refuse("export", "--to", "bone-model", str(tmp_path / "ours.safetensors"))
    assert "is lora; bone-model has a form for bone alone" in message


# Fixtures


def test_the_fixtures_are_of_the_last_release_that_had_bone():
    assert (FIXTURES / "RELEASE").read_text().startswith("peft 0.18.")
    assert {path.name for path in FIXTURES.iterdir() if path.is_dir()} - {"__pycache__"} == {*WRITTEN, "miss-mini"}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_older_peft_wrote_is_loaded_and_computes_what_it_computed(name):
    net = linear_net()
    net.load_state_dict(load_file(FIXTURES / "weights.safetensors"))
    model = BoneModel.from_pretrained(net, FIXTURES / name)
    grouping, r = WRITTEN[name]
    assert model.peft_config["default"].method | {"r": r, "grouping": grouping} == model.peft_config["default"].method
    computed = load_file(FIXTURES / name / "computed.safetensors")
    for module in LLAMA_SIZES:
        layer = model.get_submodule(f"base_model.model.{module}")
        x, wanted = computed[f"{module}.x"], computed[f"{module}.y"]
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
        assert (layer.base_layer(x) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", WRITTEN)
def test_what_older_peft_wrote_is_imported_to_the_bit(base, name):
    header, ours = adapter_file.read(imported(base, FIXTURES / name))
    assert (header.grouping, header.rank) == WRITTEN[name] and header.targets == ["q_proj", "k_proj", "down_proj"]
    saved = load_file(FIXTURES / name / "adapter_model.safetensors")
    part = name.split("-")[0]
    same_bits({f"base_model.model.{key.removesuffix('.bone')}.{part}_block": tensor for key, tensor in ours.items()}, saved)


def test_mini_of_an_older_release_is_refused_by_name():
    with pytest.raises(CheckpointError, match="'mini' is a variant of MiSS that is not here"):
        BoneModel.from_pretrained(linear_net(), FIXTURES / "miss-mini")


# What is refused


@pytest.fixture
def refuse(tmp_path, capsys):
    """A command that must be refused in one line and leave nothing -> the message."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "made")]) == 2
        output = capsys.readouterr()
        message = output.err.removesuffix("\n")
        assert output.out == "" and message.startswith("bone-ds: ") and "\n" not in message, message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def setting(**fields):
    return lambda config: config.update(fields)


CONFIGS = {
    "mini": (setting(init_weights="mini"), ["init_weights: 'mini'", "variant of MiSS"]),
    "unknown": (setting(init_weights="pissa"), ["init_weights: 'pissa' is unknown"]),
    "of LoRA": (setting(peft_type="LORA"), ["peft_type 'LORA'", "MISS and BONE"]),
    "without a type": (lambda config: config.pop("peft_type"), ["peft_type None"]),
    "with modules": (setting(modules_to_save=["lm_head"]), ["modules_to_save: ['lm_head']", "BoneModel.from_pretrained"]),
    "with biases": (setting(bias="all"), ["bias: 'all'"]),
    "no rank": (setting(r=None), ["r: None"]),
    "a rank of bool": (setting(r=True), ["r: True"]),
    "an unknown grouping": (setting(grouping="bogus"), ["grouping: 'bogus'"]),
    "an unknown form": (setting(form="bogus"), ["form: 'bogus'"]),
    "groups of text": (setting(groups="x"), ["groups: 'x'"]),
    "free without groups": (setting(grouping="free"), ["groups: None with grouping 'free'"]),
    "another rank": (setting(r=16), ["q_proj.bone", "(8, 32)"]),
    "the other variant": (setting(init_weights="bat"), ["q_proj.bone", "(8, 32)"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(base, tmp_path, refuse, case):
    change, says = CONFIGS[case]
    theirs(base, tmp_path / "theirs", target_modules=["q_proj"])
    path = tmp_path / "theirs/adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    message = refuse("import", "--from", "peft", str(tmp_path / "theirs"), "--base", str(base))
    assert "theirs: " in message and all(part in message for part in says), message


Q0, Q1 = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.miss_block" for layer in (0, 1))
TENSORS = {
    "none": (lambda t: t.clear(), ["holds no tensors"]),
    "of LoRA": (lambda t: t.update({Q0.replace("miss_block", "lora_A.weight"): torch.ones(2, 2)}), ["lora_A.weight", "no tensor of Bone"]),
    "of a whole module": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), ["lm_head.weight", "no tensor of"]),
    "one layer less": (lambda t: (t.pop(Q1), t.update({Q1.replace("q_proj", "k_proj"): torch.ones(8, 16)})),
                       ["model.layers.0.k_proj", "range of layers"]),
    "an unknown layer": (lambda t: t.update({Q1.replace("layers.1", "layers.7"): torch.ones(8, 32)}),
                         ["layers.7", "no module of", "2 layers"]),
    "an unknown module": (lambda t: t.update({Q1.replace("q_proj", "c_attn"): torch.ones(8, 32)}), ["c_attn", "no module of"]),
    "of another size": (lambda t: t.update({Q1: torch.ones(8, 16)}), ["q_proj.bone", "(8, 16)", "(8, 32)"]),
    "NaN": (lambda t: t[Q0][0].fill_(float("nan")), [Q0, "NaN"]),
    "integers": (lambda t: t.update({Q0: torch.ones(8, 32, dtype=torch.int8)}), [Q0, "is int8"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(base, tmp_path, refuse, case):
    change, says = TENSORS[case]
    theirs(base, tmp_path / "theirs", target_modules=["q_proj"])
    path = tmp_path / "theirs/adapter_model.safetensors"
    change(tensors := load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    message = refuse("import", "--from", "peft", str(tmp_path / "theirs"), "--base", str(base))
    assert "theirs: " in message and all(part in message for part in says), message


DIRECTORIES = {
    "absent": (shutil.rmtree, ["holds no adapter_config.json"]),
    "a file": (lambda path: (shutil.rmtree(path), path.touch()), ["holds no adapter_config.json"]),
    "without a config": (lambda path: (path / "adapter_config.json").unlink(), ["holds no adapter_config.json"]),
    "a config cut off": (lambda path: (path / "adapter_config.json").write_text('{"peft_type": "MI'), ["adapter_config.json is damaged"]),
    "a config that is a list": (lambda path: (path / "adapter_config.json").write_text("[]"), ["holds a list"]),
    "without tensors": (lambda path: (path / "adapter_model.safetensors").unlink(), ["holds no adapter_model.safetensors"]),
    "pickled": (lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"), ["safe_serialization=True"]),
    "tensors cut off": (lambda path: (path / "adapter_model.safetensors").write_bytes(b"123"), ["no safetensors file"]),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories_that_are_refused(base, tmp_path, refuse, case):
    change, says = DIRECTORIES[case]
    theirs(base, tmp_path / "theirs", target_modules=["q_proj"])
    change(tmp_path / "theirs")
    message = refuse("import", "--from", "peft", str(tmp_path / "theirs"), "--base", str(base))
    assert "theirs: " in message and all(part in message for part in says), message


def test_a_lora_of_peft_is_refused(base, tmp_path, refuse):
    get_peft_model(plain(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    assert "peft_type 'LORA'" in refuse("import", "--from", "peft", str(tmp_path / "theirs"), "--base", str(base))


@pytest.mark.parametrize("adapter, says", [
    ({"rank": 8, "grouping": "row"},
     "is bone with grouping row and form affine; PEFT has bone with grouping miss or col and form affine alone; --to bone-model"),
    ({"rank": 8, "grouping": "left"}, "is bone with grouping left"),
    ({"rank": 8, "grouping": "col", "form": "hadamard"}, "grouping col and form hadamard"),
    ({"method": "lora", "rank": 4}, "is lora"), ({"method": "full"}, "is full")], ids=str)
def test_adapters_that_have_no_such_form(base, tmp_path, refuse, adapter, says):
    random_adapter(base, tmp_path / "ours.safetensors", **adapter)
    message = refuse("export", "--to", "peft", str(tmp_path / "ours.safetensors"))
    assert "ours.safetensors: " in message and says in message


def test_options_and_places_that_are_refused(base, tmp_path, refuse, capsys):
    random_adapter(base, tmp_path / "ours.safetensors", rank=8, grouping="col")
    export = ["export", "--to", "peft", str(tmp_path / "ours.safetensors")]
    assert "--name: 'disha' is for --to rwkv-peft" in refuse(*export, "--name", "disha")
    (tmp_path / "file").touch()
    for out, says in (("base", "exists already"), ("file/a", "file/a: can't be written")):
        assert main([*export, "--out", str(tmp_path / out)]) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1, message
