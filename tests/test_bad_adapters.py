"""Each way an adapter file can be wrong ends `bone-ds merge` with exit code 2, one or two lines, and no directory."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_llama import random_adapter, save_tiny

from bone_ds import adapter_file
from bone_ds.cli import main
from bone_ds.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    save_tiny(directory / "base")
    random_adapter(directory / "base", directory / "row.safetensors", rank=8)
    random_adapter(directory / "base", directory / "lora.safetensors", method="lora", rank=4)
    random_adapter(directory / "base", directory / "free.safetensors", rank=8, grouping="free", groups=4)
    random_adapter(directory / "base", directory / "miss.safetensors", rank=8, grouping="miss")
    random_adapter(directory / "base", directory / "unconstrained.safetensors", rank=8, form="unconstrained")
    random_adapter(directory / "base", directory / "full.safetensors", method="full")
    return directory


@pytest.fixture
def refuse(tmp_path, capsys):
    """Merges the adapter at `path`, which must be refused -> the message."""

    def run(path, *options: str, out=tmp_path / "merged") -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["merge", str(path), "--out", str(out), *options]) == 2
        output = capsys.readouterr()
        message = output.err.removesuffix("\n")
        assert output.out == "" and message.startswith("bone-ds: ") and message.count("\n") < 2, message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def rewritten(source, target, header=None, tensors=None):
    """A copy with its header (or all metadata) and its tensors changed by functions, and without a digest, as older files are."""
    with safe_open(source, "pt") as file:
        metadata = json.loads(file.metadata()["bone_ds"])
        del metadata["sha256"]
        contents = {name: file.get_tensor(name) for name in file.keys()}
    text = header(metadata) if header else None
    if tensors:
        tensors(contents)
    save_file(contents, target, metadata={"bone_ds": text if isinstance(text, str) else json.dumps(metadata)})
    return target


def setting(**fields):
    return lambda header: header.update(fields)


HEADERS = {
    "damaged": (lambda header: "{'rank': 8", ["header is damaged", "{'rank': 8"]),
    "a list": (lambda header: "[1]", ["header is damaged", "[1]"]),
    "later version": (setting(format_version=2), ["format_version 2", "is not 1"]),
    "no version": (lambda header: header.pop("format_version") and None, ["header is damaged"]),
    "missing field": (lambda header: header.pop("grouping") and None, ["fields are wrong at grouping"]),
    "extra field": (setting(scale=2), ["fields are wrong at scale"]),
    "unknown method": (setting(method="dora"), ["method", "'dora'"]),
    "unknown grouping": (setting(grouping="left"), ["grouping", "'left'"]),
    "unknown architecture": (setting(architecture="rwkv9"), ["architecture", "'rwkv9'"]),
    "unknown dtype": (setting(base_dtype="fp16"), ["dtype", "'fp16'"]),
    "a base that is a number": (setting(base=3), ["path", "3"]),
    "no targets": (setting(targets=None), ["no adapter", "NoneType"]),
    "a target that is a number": (setting(targets=[3]), ["targets.0", "3"]),
    "layers that are a number": (setting(layers=1), ["no adapter", "int"]),
    "rank as text": (setting(rank="8"), ["rank", "'8'"]),
    "another rank": (setting(rank=16), ["down_proj.bone", "shape (8, 8, 8) does not fit rank 16"]),
    "grouping relabelled": (setting(grouping="col"), ["down_proj.bone", "(8, 8, 8)", "grouping 'col' needs (4, 8, 8)"]),
    "unknown form": (setting(form="hadamrd"), ["form", "'hadamrd'"]),
    "form relabelled": (setting(form="unconstrained"), ["down_proj.bone", "shape (8, 8, 8) does not fit rank 8", "unconstrained"]),
    "a form that the grouping lacks": (setting(grouping="left", form="hadamard"), ["does not fit", "form 'hadamard'", "'left'"]),
    "relabelled as miss": (setting(grouping="miss"), ["down_proj.bone", "shape (8, 8, 8) does not fit rank 8", "miss"]),
    "relabelled as free": (setting(grouping="free", groups=2), ["down_proj.bone", "(8, 8, 8)", "grouping 'free' needs (2, 8, 8)"]),
    "relabelled as free without groups": (setting(grouping="free"), ["adapter.groups: None"]),
    "groups that do not divide": (setting(grouping="free", groups=7), ["does not fit", "adapter.groups: 7"]),
    "groups of row": (setting(groups=2), ["does not fit", "'row' with groups=2"]),
    "groups as text": (setting(groups="2"), ["groups", "'2'"]),
    "method relabelled as state": (setting(method="state"), ["down_proj.bone", "'state' has no such tensor"]),
    "method relabelled as full": (setting(method="full"), ["lm_head.weight: is missing"]),
    "method relabelled": (setting(method="lora"), ["down_proj.bone", "'lora' has no such tensor"]),
    "unknown target": (setting(targets=["q_proj", "c_attn"]), ["does not fit", "'c_attn'", "choose among q_proj"]),
    "fewer targets": (setting(targets=["q_proj"]), ["layers.0.mlp.down_proj.bone", "targets and layers leave it out"]),
    "fewer layers": (setting(layers=[0, 1]), ["layers.1.mlp.down_proj.bone", "targets and layers leave it out"]),
    "more layers": (setting(layers=[0, 3]), ["does not fit", "[0, 3]", "2 layers"]),
    "another base": (setting(base_fingerprint="0" * 64), ["another base", "0" * 64]),
}
Q1, K0 = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
TENSORS = {
    "none": (lambda tensors: tensors.clear(), ["holds no tensors"]),
    "unknown layer": (lambda tensors: tensors.update({"model.layers.7.self_attn.q_proj.bone": torch.ones(4, 8, 8)}),
                      ["layers.7", "no such layer"]),
    "missing layer": (lambda tensors: tensors.pop(f"{Q1}.bone"), [f"{Q1}.bone: is missing"]),
    "other shape": (lambda tensors: tensors.update({f"{K0}.bone": torch.ones(3, 8, 8)}), [K0, "(3, 8, 8)", "needs (4, 8, 8)"]),
    "other blocks": (lambda tensors: tensors.update({f"{K0}.bone": torch.ones(4, 4, 4)}), [K0, "(4, 4, 4)", "rank 8"]),
    "flat": (lambda tensors: tensors.update({f"{K0}.bone": torch.ones(32)}), [K0, "(32,)", "rank 8"]),
    "NaN": (lambda tensors: tensors[f"{K0}.bone"][1, 2].fill_(float("nan")), [K0, "NaN"]),
    "infinite": (lambda tensors: tensors[f"{Q1}.bone"][0, 0].fill_(float("inf")), [Q1, "infinite"]),
    "other name": (lambda tensors: tensors.update({f"{K0}.disha": torch.ones(4, 8, 8)}), [f"{K0}.disha", "'bone' has no such tensor"]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(whole, tmp_path, refuse, case):
    header, says = HEADERS[case]
    message = refuse(rewritten(whole / "row.safetensors", tmp_path / "adapter.safetensors", header=header))
    assert "adapter.safetensors: " in message and all(part in message for part in says), message


def test_every_flipped_bit(whole, tmp_path, capsys):
    contents, path = (whole / "row.safetensors").read_bytes(), tmp_path / "adapter.safetensors"
    draw = random.Random(0)
    for _ in range(200):
        place, bit = draw.randrange(len(contents)), 1 << draw.randrange(8)
        path.write_bytes(contents[:place] + bytes([contents[place] ^ bit]) + contents[place + 1:])
        try:
            _, tensors = adapter_file.read(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and str(error).count("\n") < 2, (place, bit)
        else:
            pytest.fail(f"read with bit {bit} of byte {place} flipped")


def test_a_flipped_bit_is_refused_by_every_command(whole, tmp_path, refuse):
    path = tmp_path / "adapter.safetensors"
    contents = bytearray((whole / "row.safetensors").read_bytes())
    contents[-1000] ^= 1  # of a weight, which stays finite
    path.write_bytes(contents)
    assert "adapter.safetensors: is damaged: its contents are not what its sha256 says" in refuse(path)
    for command in (["generate", str(whole / "base"), "--adapter", str(path), "--prompt", "a"],
                    ["export", str(path), "--to", "bone-model", "--out", str(tmp_path / "out")]):
        assert main(command) == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(whole, tmp_path, refuse, case):
    tensors, says = TENSORS[case]
    message = refuse(rewritten(whole / "row.safetensors", tmp_path / "adapter.safetensors", tensors=tensors))
    assert "adapter.safetensors: " in message and all(part in message for part in says), message


@pytest.mark.parametrize("name, header, says", [
    ("free", setting(groups=2), ["(4, 8, 8)", "grouping 'free' needs (2, 8, 8)"]),
    ("free", setting(groups=None), ["adapter.groups: None"]),
    ("miss", setting(grouping="row"), ["(8, 32)", "does not fit rank 8"]),
    ("miss", setting(rank=4), ["(8, 32)", "does not fit rank 4"]),
    ("unconstrained", setting(form="affine"), ["(2, 8, 8, 8)", "does not fit rank 8"]),
    ("unconstrained", lambda header: header.pop("form") and None, ["(2, 8, 8, 8)", "does not fit rank 8"]),
    ("unconstrained", setting(grouping="col"), ["(2, 8, 8, 8)", "grouping 'col' and form 'unconstrained' needs (2, 4, 8, 8)"]),
], ids=lambda value: None if callable(value) else str(value))
def test_header_of_other_groupings_and_forms(whole, tmp_path, refuse, name, header, says):
    message = refuse(rewritten(whole / f"{name}.safetensors", tmp_path / "adapter.safetensors", header=header))
    assert "adapter.safetensors: " in message and all(part in message for part in says), message


@pytest.mark.parametrize("name", ["row", "lora", "full"])
def test_a_file_from_before_there_were_forms_still_merges(whole, tmp_path, name):
    def without_them(header):
        del header["form"], header["groups"]

    old = rewritten(whole / f"{name}.safetensors", tmp_path / "old.safetensors", header=without_them)
    for path, out in ((old, "old"), (whole / f"{name}.safetensors", "new")):
        assert main(["merge", str(path), "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "old/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()


def test_a_block_size_that_does_not_divide(whole, tmp_path, refuse):
    def shrink(tensors):
        for name, tensor in tensors.items():
            tensors[name] = torch.ones(tensor.shape[0] * 8 // 5, 5, 5)

    message = refuse(rewritten(whole / "row.safetensors", tmp_path / "adapter.safetensors", header=setting(rank=5), tensors=shrink))
    assert "adapter.safetensors: does not fit" in message and "rank: 5 does not divide" in message


@pytest.mark.parametrize("change, says", [
    (lambda tensors: tensors.pop(f"{Q1}.lora_B"), [f"{Q1}.lora_B: is missing"]),
    (lambda tensors: tensors.update({f"{K0}.lora_A": torch.ones(4, 16)}), [f"{K0}.lora_A", "(4, 16)", "(4, 32)"]),
    (lambda tensors: tensors.update({f"{K0}.lora_A": torch.ones(32, 4)}), [f"{K0}.lora_A", "(32, 4)", "rank 4"]),
])
def test_lora_tensors(whole, tmp_path, refuse, change, says):
    message = refuse(rewritten(whole / "lora.safetensors", tmp_path / "adapter.safetensors", tensors=change))
    assert all(part in message for part in says), message


@pytest.mark.parametrize("change, says", [
    (lambda tensors: tensors.pop(f"{Q1}.weight"), [f"{Q1}.weight: is missing"]),
    (lambda tensors: tensors.update({f"{Q1}.bias": torch.ones(32)}), [f"{Q1}.bias", "no such layer"]),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}), ["model.norm.weight", "(16,)", "needs (32,)"]),
    (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), ["model.norm.weight", "NaN"]),
])
def test_full_tensors(whole, tmp_path, refuse, change, says):
    message = refuse(rewritten(whole / "full.safetensors", tmp_path / "adapter.safetensors", tensors=change))
    assert all(part in message for part in says), message


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


NO_ADAPTER = {
    "absent": (lambda path: path.unlink(), ["no such adapter file"]),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), ["is a directory"]),
    "empty": (lambda path: path.write_bytes(b""), ["no safetensors file"]),
    "text": (lambda path: path.write_text("adapter of the run, do not delete"), ["no safetensors file"]),
    "a pickle": (lambda path: torch.save({"a": torch.ones(2)}, path), ["no safetensors file"]),
    "truncated": (cut, ["no safetensors file", "damaged"]),
    "no header": (lambda path: save_file({"a": torch.ones(2)}, path), ["no 'bone_ds' header"]),
    "another's header": (lambda path: save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"}), ["no 'bone_ds' header"]),
}


@pytest.mark.parametrize("case", NO_ADAPTER)
def test_no_adapter_file(whole, tmp_path, refuse, case):
    change, says = NO_ADAPTER[case]
    path = tmp_path / "adapter.safetensors"
    shutil.copy(whole / "row.safetensors", path)
    change(path)
    message = refuse(path)
    assert str(path) in message and all(part in message for part in says), message


def test_another_base(whole, tmp_path, refuse):
    save_tiny(tmp_path / "other", hidden_size=64)
    message = refuse(whole / "row.safetensors", "--base", str(tmp_path / "other"))
    assert "another base" in message and str(tmp_path / "other") in message


def test_base_missing(whole, tmp_path, refuse):
    message = refuse(whole / "row.safetensors", "--base", str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in message
    shutil.copytree(whole / "base", tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    assert "model.safetensors" in refuse(whole / "row.safetensors", "--base", str(tmp_path / "base"))


def test_out_exists(whole, tmp_path, refuse):
    (tmp_path / "merged").mkdir()
    assert "--out" in (message := refuse(whole / "row.safetensors")) and "exists already" in message


def test_out_in_a_file(whole, tmp_path, refuse):
    (tmp_path / "file").touch()
    message = refuse(whole / "row.safetensors", out=tmp_path / "file/merged")
    assert f"--out: {tmp_path}/file/merged" in message
