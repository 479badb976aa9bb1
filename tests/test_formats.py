"""RWKV-PEFT's files: what it would compute is what an imported adapter computes, every bit survives, and bad files are refused."""

import os
import resource

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_rwkv import built_and_loaded, opened, save_tiny
from tiny_rwkv_adapter import logits, package_logits, random_adapter

from bone_ds import adapter_file
from bone_ds.cli import main
from bone_ds.inject import inject
from bone_ds.merge import merge
from rwkv_adapters import ARCHITECTURE

TOKENS = [5, 17, 3, 88, 41, 2, 2, 60, 33]
MODULES = {"att.receptance": (32, 32), "att.key": (32, 32), "att.value": (32, 32), "att.gate": (32, 32), "att.output": (32, 32),
           "ffn.key": (56, 32), "ffn.receptance": (32, 32), "ffn.value": (32, 56)}
"""(out, in) of the tiny model's."""


def theirs(name="bone", modules=MODULES, layers=range(2), rank=8, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """What RWKV-PEFT saves of a model with the tiny one's sizes."""
    torch.manual_seed(2)
    return {f"blocks.{layer}.{module}.{name}": (0.1 * torch.randn(MODULES[module][1] // rank, rank, rank)).to(dtype)
            for layer in layers for module in modules}


def their_linear(x, weight, bone):
    """RWKV-PEFT's forward: its einops patterns '(a r1) (b r2) -> a b r1 r2' and back, index by index."""
    r = bone.shape[-1]
    adapted = weight.clone()
    for a in range(weight.shape[0] // r):
        for b in range(weight.shape[1] // r):
            rows, columns = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
            adapted[rows, columns] += weight[rows, columns] @ bone[b] + bone[b]
    return F.linear(x, adapted)


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base.pth")
    return tmp_path / "base.pth"


def imported(base, tensors):
    """The adapter file that `bone-ds import` makes of RWKV-PEFT's tensors."""
    torch.save(tensors, base.parent / "theirs.pth")
    out = base.parent / "adapter.safetensors"
    assert main(["import", "--from", "rwkv-peft", str(base.parent / "theirs.pth"), "--base", str(base), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["bone", "disha"])
def test_an_imported_adapter_computes_what_rwkv_peft_does(base, name):
    tensors = theirs(name)
    header, ours = adapter_file.read(imported(base, tensors))
    assert (header.method, header.grouping, header.rank, header.layers, header.step) == ("bone", "row", 8, None, 0)
    assert header.targets == list(ARCHITECTURE.targets) and header.base_fingerprint == opened(base).fingerprint
    model = built_and_loaded(opened(base))
    plain = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    trainable = inject(model, ARCHITECTURE, header.adapter)
    assert trainable.keys() == ours.keys()
    for key, parameter in trainable.items():
        parameter.data.copy_(ours[key])
        module = key.removesuffix(".bone")
        x = torch.randn(5, plain[module].shape[1])
        wanted = their_linear(x, plain[module], tensors[f"{module}.{name}"].float())
        torch.testing.assert_close(model.get_submodule(module)(x), wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - F.linear(x, plain[module])).abs().max() > 0.1


def shards(rank=8, modules=MODULES, layers=range(2)) -> dict[str, torch.Tensor]:
    """What RWKV-PEFT saves in its mode `bone` since the tensors are called disha."""
    torch.manual_seed(3)
    return {f"blocks.{layer}.{module}.disha": (0.1 * torch.randn(rank, MODULES[module][0])).bfloat16()
            for layer in layers for module in modules}


def their_sharded_linear(x, weight, disha):
    """Its forward: the inputs filled up with zeros to whole shards, and these summed."""
    r = disha.shape[0]
    x_sum = F.pad(x, (0, -x.shape[1] % r)).reshape(len(x), -1, r).sum(-2)
    return F.linear(x, weight) + x_sum @ disha


@pytest.mark.parametrize("rank", [8, 12])
def test_two_dimensional_disha_is_miss_both_ways(base, tmp_path, rank):
    tensors = shards(rank)
    adapter = imported(base, tensors)
    header, ours = adapter_file.read(adapter)
    assert (header.method, header.grouping, header.form, header.rank) == ("bone", "miss", "affine", rank)
    model = built_and_loaded(opened(base))
    plain = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for key, parameter in inject(model, ARCHITECTURE, header.adapter).items():
        parameter.data.copy_(ours[key])
        module = key.removesuffix(".bone")
        x = torch.randn(5, plain[module].shape[1])
        wanted = their_sharded_linear(x, plain[module], tensors[f"{module}.disha"].float())
        torch.testing.assert_close(model.get_submodule(module)(x), wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - F.linear(x, plain[module])).abs().max() > 0.1
    merge(adapter, tmp_path / "merged.pth")
    torch.testing.assert_close(package_logits(tmp_path / "merged.pth", TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-5)
    assert main(["export", "--to", "rwkv-peft", str(adapter), "--out", str(tmp_path / "back.pth"), "--name", "disha"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("change, says", [
    (lambda t: t.update({"blocks.0.att.key.disha": torch.ones(4, 32)}), ["blocks.0.att.key.disha", "(4, 32)", "needs (8, 32)"]),
    (lambda t: t.update({"blocks.1.ffn.key.disha": torch.ones(8, 32)}), ["blocks.1.ffn.key.disha", "(8, 32)", "needs (8, 56)"]),
    (lambda t: t.update({"blocks.1.ffn.key.disha": torch.ones(4, 8, 8)}), ["blocks.1.ffn.key.disha", "(4, 8, 8)", "needs (8, 56)"]),
    (lambda t: t.update({name: torch.ones(33, tensor.shape[1]) for name, tensor in t.items()}), ["(33, 32)", "1 to 32 inputs"]),
    (lambda t: t.update({name: torch.ones(0, tensor.shape[1]) for name, tensor in t.items()}), ["(0, 32)", "1 to 32 inputs"]),
])
def test_two_dimensional_tensors_that_are_refused(refuse, base, tmp_path, change, says):
    change(tensors := shards())
    torch.save(tensors, tmp_path / "theirs.pth")
    message = refuse("import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base)).replace(".bone", ".disha")
    assert "theirs.pth: " in message and all(part in message for part in says), message


def test_miss_has_one_name_in_their_files(refuse, base, tmp_path):
    random_adapter(base, tmp_path / "ours.safetensors", grouping="miss", rank=8)
    message = refuse("export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"))
    assert "--name: 'bone'" in message and "add --name disha" in message


def test_an_imported_adapter_merges(base, tmp_path):
    adapter = imported(base, theirs())
    merge(adapter, tmp_path / "merged.pth")
    header, ours = adapter_file.read(adapter)
    model = built_and_loaded(opened(base))
    for key, parameter in inject(model, ARCHITECTURE, header.adapter).items():
        parameter.data.copy_(ours[key])
    torch.testing.assert_close(package_logits(tmp_path / "merged.pth", TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-5)


def test_some_layers_and_modules(base):
    header, ours = adapter_file.read(imported(base, theirs(modules=["ffn.value", "att.key"], layers=[1])))
    assert header.targets == ["att.key", "ffn.value"] and header.layers == [1, 2]
    assert sorted(ours) == ["blocks.1.att.key.bone", "blocks.1.ffn.value.bone"]


@pytest.mark.parametrize("name", ["bone", "disha"])
@pytest.mark.parametrize("dtype, chosen", [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)])
def test_a_round_trip_keeps_every_bit(base, tmp_path, dtype, chosen, name):
    tensors = theirs(name, dtype=dtype)
    tensors[f"blocks.0.att.key.{name}"][0, 0, :4] = torch.tensor([0.0, -0.0, 1e-40, torch.finfo(dtype).max])
    adapter = imported(base, tensors)
    assert main(["export", "--to", "rwkv-peft", str(adapter), "--out", str(tmp_path / "back.pth"), "--name", name]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert type(back) is dict and back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == chosen
        assert torch.equal(back[key].to(dtype).view(torch.uint8), tensor.view(torch.uint8)), key
        assert torch.equal(back[key].float(), tensor.float())


def test_an_adapter_of_ours_and_back(base, tmp_path):
    model = random_adapter(base, tmp_path / "ours.safetensors", rank=4, layers=[0, 1])
    assert main(["export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "out/theirs.pth")]) == 0
    exported = torch.load(tmp_path / "out/theirs.pth", weights_only=True)
    bone = model.get_submodule("blocks.0.ffn.key").bone
    assert torch.equal(exported["blocks.0.ffn.key.bone"], bone) and len(exported) == 8
    again, before = imported(base, exported), tmp_path / "ours.safetensors"
    with safe_open(again, "pt") as one, safe_open(before, "pt") as other:
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in other.keys())
    (here, _), (there, _) = adapter_file.read(again), adapter_file.read(before)
    assert (here.adapter, here.base_fingerprint) == (there.adapter, there.base_fingerprint)


def test_bf16_when_asked_for(base, tmp_path):
    random_adapter(base, tmp_path / "ours.safetensors", rank=4)
    command = ["export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "b.pth")]
    assert main([*command, "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in torch.load(tmp_path / "b.pth").values()} == {torch.bfloat16}


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_states_both_ways(base, tmp_path, layers, capsys):
    random_adapter(base, tmp_path / "ours.safetensors", method="state", layers=layers)
    assert main(["export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "state.pth")]) == 0
    exported = torch.load(tmp_path / "state.pth", weights_only=True)
    assert sorted(exported) == [f"blocks.{layer}.att.time_state" for layer in range(*(layers or (0, 2)))]
    header, tensors = adapter_file.read(imported(base, exported))
    before, originals = adapter_file.read(tmp_path / "ours.safetensors")
    assert header.adapter == before.adapter and tensors.keys() == originals.keys()
    assert all(torch.equal(tensors[key], originals[key]) for key in tensors)
    assert "initial states" in capsys.readouterr().out


def test_a_state_file_begins_as_in_the_rwkv_package(base, tmp_path):
    """Its users put blocks.N.att.time_state, transposed, in the state's place of layer N."""
    from rwkv.model import RWKV

    model = random_adapter(base, tmp_path / "ours.safetensors", method="state")
    assert main(["export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "state.pth")]) == 0
    states = torch.load(tmp_path / "state.pth", weights_only=True)
    package_logits(base, TOKENS)
    package = RWKV(model=str(base), strategy="cpu fp32", verbose=False)
    state = [part for layer in range(2)
             for part in (torch.zeros(32), states[f"blocks.{layer}.att.time_state"].transpose(1, 2).contiguous(), torch.zeros(32))]
    wanted, _ = package.forward(TOKENS, state, full_output=True)
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def refuse(base, tmp_path, capsys):
    """A command that must be refused in one line and leave nothing -> the message."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "made.pth")]) == 2
        output = capsys.readouterr()
        message = output.err.removesuffix("\n")
        assert output.out == "" and message.startswith("bone-ds: ") and "\n" not in message, message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


K0, F1 = "blocks.0.att.key.bone", "blocks.1.ffn.value.bone"
BAD_TENSORS = {
    "a model's": (lambda t: t.update({"blocks.0.ln1.weight": torch.ones(32)}), ["blocks.0.ln1.weight", "--train_parts"]),
    "a LoRA's": (lambda t: t.update({"blocks.0.att.key.lora_A": torch.ones(4, 32)}), ["lora_A", "LoRA files are not read"]),
    "of a Hugging Face adapter": (lambda t: t.update({"base_model.model.q_proj.bone": torch.ones(4, 8, 8)}), ["base_model.model.q_proj"]),
    "of two programs": (lambda t: t.update({"blocks.0.att.key.disha": t.pop(K0)}), ["two kinds", "att.key.disha"]),
    "a state too": (lambda t: t.update({"blocks.0.att.time_state": torch.zeros(4, 8, 8)}), ["two kinds", "time_state"]),
    "mixed ranks": (lambda t: t.update({F1: torch.ones(14, 4, 4)}), [F1, "block size 4", "8"]),
    "two-dimensional": (lambda t: t.update({K0: torch.ones(8, 32)}), [K0, "(8, 32)", "additive method"]),
    "four-dimensional": (lambda t: t.update({K0: torch.ones(1, 4, 8, 8)}), [K0, "(1, 4, 8, 8)", "(in/r, r, r)"]),
    "no square": (lambda t: t.update({K0: torch.ones(4, 8, 4)}), [K0, "(4, 8, 4)", "(in/r, r, r)"]),
    "a scalar": (lambda t: (t.clear(), t.update({K0: torch.ones(())})), [f"{K0}: has shape ()"]),
    "a scalar called disha": (lambda t: (t.clear(), t.update({"blocks.0.att.key.disha": torch.ones(())})), ["key.disha: has shape ()"]),
    "empty": (lambda t: t.update({K0: torch.ones(4, 0, 0)}), [K0, "(4, 0, 0)", "(in/r, r, r)"]),
    "grouped by rows of outputs": (lambda t: t.update({F1: torch.ones(4, 8, 8)}), [F1, "(4, 8, 8)", "(32, 56)", "needs (7, 8, 8)"]),
    "a module that is no layer": (lambda t: [t.update({f"blocks.{n}.att.ln_x.bone": torch.ones(4, 8, 8)}) for n in (0, 1)],
                                  ["att.ln_x.bone", "no linear layer"]),
    "an unknown module": (lambda t: [t.update({f"blocks.{n}.att.mix.bone": torch.ones(4, 8, 8)}) for n in (0, 1)],
                          ["att.mix.bone", "no linear layer"]),
    "more layers": (lambda t: t.update(theirs(layers=[2])), ["3 layers", "has 2"]),
    "a layer left out": (lambda t: [t.pop(name) for name in list(t) if "blocks.1." in name] and t.update(theirs(layers=[2])),
                         ["blocks.1.", "range of layers"]),
    "a module left out": (lambda t: t.pop(F1), ["blocks.1.ffn.value", "range of layers"]),
    "NaN": (lambda t: t[K0][0, 1].fill_(float("nan")), [K0, "NaN"]),
    "infinite": (lambda t: t[F1][0, 1].fill_(float("inf")), [F1, "infinite"]),
    "integers": (lambda t: t.update({K0: torch.ones(4, 8, 8, dtype=torch.int8)}), [K0, "is int8"]),
    "double": (lambda t: t.update({K0: torch.ones(4, 8, 8).double()}), [K0, "is float64"]),
    "no tensor": (lambda t: t.update({K0: 3}), [K0, "int"]),
    "no name": (lambda t: t.update({3: torch.ones(4, 8, 8)}), ["'3'"]),
    "none": (lambda t: t.clear(), ["holds nothing"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_refused(refuse, base, tmp_path, case):
    change, says = BAD_TENSORS[case]
    change(tensors := theirs())
    torch.save(tensors, tmp_path / "theirs.pth")
    message = refuse("import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base))
    assert "theirs.pth: " in message and all(part in message for part in says), message


class Bomb:
    def __reduce__(self):
        return os.system, ("echo run > ran",)


BAD_FILES = {
    "absent": (lambda path: path.unlink(), ["no such file"]),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), ["is a directory"]),
    "empty": (lambda path: path.write_bytes(b""), ["no .pth file"]),
    "text": (lambda path: path.write_text("blocks.0.att.key.bone"), ["no .pth file"]),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-500]), ["cut-off"]),
    "a list": (lambda path: torch.save([torch.ones(2)], path), ["holds list"]),
    "one tensor": (lambda path: torch.save(torch.ones(2), path), ["holds Tensor"]),
    "a program": (lambda path: torch.save({K0: Bomb()}, path), ["nothing in it was run"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_refused(refuse, base, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, says = BAD_FILES[case]
    torch.save(theirs(), tmp_path / "theirs.pth")
    change(tmp_path / "theirs.pth")
    message = refuse("import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base))
    assert "theirs.pth: " in message and all(part in message for part in says), message


def test_a_state_of_another_shape(refuse, base, tmp_path):
    torch.save({f"blocks.{layer}.att.time_state": torch.zeros(4, 8, 4) for layer in range(2)}, tmp_path / "theirs.pth")
    message = refuse("import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base))
    assert "blocks.0.att.time_state: has shape (4, 8, 4), the base needs (4, 8, 8)" in message


def test_a_base_that_is_not_there(refuse, tmp_path):
    torch.save(theirs(), tmp_path / "theirs.pth")
    message = refuse("import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(tmp_path / "gone.pth"))
    assert "gone.pth" in message


@pytest.mark.parametrize("adapter, says", [
    ({"rank": 8, "form": "hadamard"}, "bone with grouping row and form hadamard"),
    ({"rank": 8, "form": "unconstrained"}, "bone with grouping row and form unconstrained"),
    ({"rank": 8, "grouping": "free", "groups": 2}, "bone with grouping free"),
    ({"rank": 8, "grouping": "col"}, "bone with grouping col"), ({"rank": 8, "grouping": "left"}, "bone with grouping left"),
    ({"method": "lora", "rank": 4}, "rwkv adapter, lora"), ({"method": "full"}, "rwkv adapter, full")], ids=str)
def test_adapters_that_have_no_such_form(refuse, base, tmp_path, adapter, says):
    random_adapter(base, tmp_path / "ours.safetensors", **adapter)
    message = refuse("export", "--to", "rwkv-peft", str(tmp_path / "ours.safetensors"))
    assert "ours.safetensors: " in message and says in message


def test_places_that_can_not_be_written(base, tmp_path, capsys):
    adapter = imported(base, theirs())
    (tmp_path / "file").touch()
    for command, out, says in [
            (["export", "--to", "rwkv-peft", str(adapter)], "file/a.pth", "file/a.pth: can't be written"),
            (["export", "--to", "rwkv-peft", str(adapter)], "a.safetensors", "give it that ending"),
            (["export", "--to", "rwkv-peft", str(adapter)], "base.pth", "exists already"),
            (["import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base)], "file", "exists already"),
            (["import", "--from", "rwkv-peft", str(tmp_path / "theirs.pth"), "--base", str(base)], "file/a", "can't be written")]:
        assert main([*command, "--out", str(tmp_path / out)]) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1, message


def test_a_full_disk_leaves_nothing(base, tmp_path, capsys):
    adapter = imported(base, theirs(rank=4, dtype=torch.float32))
    before = sorted(tmp_path.iterdir())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, unlimited[1]))
    try:
        assert main(["export", "--to", "rwkv-peft", str(adapter), "--out", str(tmp_path / "a.pth")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    message = capsys.readouterr().err
    assert "a.pth: can't be written" in message and message.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_what_lies_beside_is_left_alone(base, tmp_path):
    (tmp_path / "adapter.safetensors.partial").mkdir()
    (tmp_path / "adapter.safetensors.partial/mine").touch()
    imported(base, theirs())
    assert (tmp_path / "adapter.safetensors.partial/mine").exists() and not list(tmp_path.glob("*.partial-*"))
