"""Everything that can be wrong with an RWKV6 file is refused in one line, before a weight is read; nothing in it is run."""

import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from tiny_rwkv import opened, random_tensors, tiny_sizes, write

from bone_ds.errors import CheckpointError

ATT = "blocks.0.att."


@pytest.fixture
def tensors():
    return random_tensors(tiny_sizes())


def refused(path, message, **config):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(path, **config)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert path.name in text or "revision" in text


BOTH = pytest.mark.parametrize("ending", ["pth", "safetensors"])


@BOTH
@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("emb.weight"), "lacks the tensor emb.weight"),
    (lambda t: t.pop(ATT + "time_maa_w1"), "lacks the tensor blocks.0.att.time_maa_w1"),
    (lambda t: t.pop("blocks.1.ffn.value.weight"), "lacks the tensor blocks.1.ffn.value.weight"),
    (lambda t: t.pop("blocks.0.ln0.bias"), "lacks the tensor blocks.0.ln0.bias"),
    (lambda t: t.pop("head.weight"), "lacks the tensor head.weight"),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.0.")], "lacks the tensors of blocks.0, but has blocks.1"),
    (lambda t: t.update({"blocks.7.ln1.weight": torch.ones(32)}), "lacks the tensors of blocks.2, but has blocks.7"),
    (lambda t: t.update({ATT + "gate_w1": torch.ones(32)}), "blocks.0.att.gate_w1 is no part of an RWKV6 model of 2 layers"),
    (lambda t: t.update({"blocks.1.ln0.weight": torch.ones(32)}), "blocks.1.ln0.weight is no part"),
    (lambda t: t.update({"blocks.1234567890123.ln1.weight": torch.ones(32)}), "blocks.1234567890123.ln1.weight is no part"),
    (lambda t: t.update({"blocks.x.ln1.weight": torch.ones(32)}), "blocks.x.ln1.weight is no part"),
    (lambda t: t.update({"blocks.0.att.time_state": torch.ones(4, 8, 8)}), "lacks the tensor blocks.1.att.time_state"),
    (lambda t: t.update({"head.weight": torch.ones(95, 32)}),
     r"head.weight has shape \[95, 32\], the other tensors imply \[96, 32\]"),
    (lambda t: t.update({"blocks.1.att.key.weight": torch.ones(32, 31)}),
     r"blocks.1.att.key.weight has shape \[32, 31\], the other tensors imply \[32, 32\]"),
    (lambda t: t.update({"blocks.1.att.time_faaaa": torch.ones(8, 4)}),
     r"blocks.1.att.time_faaaa has shape \[8, 4\], the other tensors imply \[4, 8\]"),
    (lambda t: t.update({ATT + "time_faaaa": torch.ones(4, 7)}), r"time_faaaa has shape \[4, 7\], .* product is 32"),
    (lambda t: t.update({"emb.weight": torch.ones(96)}), r"emb.weight has shape \[96\], it should have 2 dimensions"),
    (lambda t: t.update({"emb.weight": torch.ones(96, 0)}), r"emb.weight has shape \[96, 0\], .* none of them 0"),
    (lambda t: t.update({ATT + "time_maa_w1": torch.ones(32, 21)}),
     r"blocks.0.att.time_maa_w1 has shape \[32, 21\], the other tensors imply \[32, 20\]"),
    (lambda t: t.update({"ln_out.bias": torch.ones(32, dtype=torch.int32)}), "ln_out.bias is int32, weights must be plain float32"),
    (lambda t: t.update({"ln_out.bias": torch.ones(32, dtype=torch.uint8)}), "ln_out.bias is uint8"),
    (lambda t: t.update({"emb.weight": torch.ones(96, 32).double()}), "emb.weight is float64, weights must be plain"),
    (lambda t: t.clear(), "holds no tensors"),
])
def test_wrong_tensors(tmp_path, tensors, change, message, ending):
    change(tensors)
    write(tmp_path / f"m.{ending}", tensors)
    refused(tmp_path / f"m.{ending}", message)


@BOTH
@pytest.mark.parametrize(("names", "kind"), [
    (["emb.weight", "blocks.0.att.time_decay", "blocks.0.att.time_first", "blocks.0.att.time_mix_k", "head.weight"], "RWKV-4"),
    (["emb.weight", "blocks.0.att.time_faaaa", "blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"], "RWKV-5"),
    (["emb.weight", "blocks.0.att.x_r", "blocks.0.att.r_k", "blocks.0.att.ln_x.weight"], "RWKV-7"),
    (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], r"a Hugging Face model \(give its directory\)"),
    (["blocks.0.att.time_state", "blocks.1.att.time_state"], "a state file"),
    (["blocks.0.att.key.bone"], "an adapter"), (["blocks.0.att.key.disha"], "an adapter")], ids=lambda value: str(value)[-20:])
def test_other_kinds_of_models(tmp_path, names, kind, ending):
    write(tmp_path / f"m.{ending}", {name: torch.ones(4, 4) for name in names})
    refused(tmp_path / f"m.{ending}", rf"m\.{ending}: looks like {kind}, it has .*; only RWKV6 \(x060\) models are read")


def test_something_else_altogether(tmp_path):
    write(tmp_path / "m.pth", {"layer1.conv.weight": torch.ones(4)})
    refused(tmp_path / "m.pth", "is no RWKV6 model, its first tensor is layer1.conv.weight")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, tensors):
    torch.save(tensors | {"evil": Evil(tmp_path / "was-run")}, tmp_path / "m.pth")
    refused(tmp_path / "m.pth", r"m.pth: asks for (posix|nt|os).system to be loaded; only files of plain tensors are read")
    assert not (tmp_path / "was-run").exists()
    torch.load(tmp_path / "m.pth", weights_only=False)  # the file is one that would have run it
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize(("content", "message"), [
    (lambda t: list(t.values()), "holds one list, not tensors by their names"),
    (lambda t: t["emb.weight"], "holds one Tensor, not tensors by their names"),
    (lambda t: {"model": t}, "holds 'model' of type dict, a model's file holds tensors alone"),
    (lambda t: t | {"step": 3}, "holds 'step' of type int"),
    (lambda t: t | {5: torch.ones(1)}, "holds '5' of type Tensor"),
    (lambda t: t | {"_strategy": "cuda fp16", "_version": "0.7"}, "was converted by the rwkv package for one strategy"),
    (lambda t: t | {"emb.weight": t["emb.weight"].to_sparse()}, "emb.weight is sparse_coo|can't read it"),
    (lambda t: t | {"emb.weight": t["emb.weight"].to("meta")}, "emb.weight is float32, weights must be plain|can't read it")])
def test_pickles_of_something_else(tmp_path, tensors, content, message):
    torch.save(content(tensors), tmp_path / "m.pth")
    refused(tmp_path / "m.pth", message)


def test_files_that_are_no_whole_archive(tmp_path, tensors):
    write(tmp_path / "whole.pth", tensors)
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content, message in (
            ("empty.pth", b"", "is empty, a .pth is a zip archive"),
            ("text.pth", b"<html>not found</html>", "is no PyTorch file, a .pth is a zip archive"),
            ("pickle.pth", pickle.dumps({"a": 1}), "is no PyTorch file, .* if PyTorch before 1.6 wrote it, load it there"),
            ("half.pth", whole[:len(whole) // 2], "is cut off, its end is missing; copy or download it again"),
            ("almost.pth", whole[:-10], "is cut off, its end is missing")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name}: {message}")
    torch.save(tensors, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "legacy.pth", "if PyTorch before 1.6 wrote it")


def test_archives_that_torch_did_not_write(tmp_path, tensors):
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.pth", "torch can't read it: .*readme.txt")
    write(tmp_path / "whole.pth", tensors)
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    refused(tmp_path / "packed.pth", "in it is compressed, PyTorch doesn't write such files")


def test_a_record_shorter_than_its_tensor(tmp_path, tensors):
    write(tmp_path / "whole.pth", tensors)
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "short.pth", "w") as short:
        for name in whole.namelist():
            content = whole.read(name)
            short.writestr(name, content[:-4000] if name.endswith("data/0") else content)
    refused(tmp_path / "short.pth", r"short.pth: is damaged, it holds no data of \d+ bytes for one of its tensors")


def test_broken_safetensors(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in (("empty", b""), ("half", whole[:len(whole) // 2]), ("longer", whole + b"x"), ("text", b"x" * 100),
                          ("header", whole[:8] + b"[" + whole[9:])):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        refused(tmp_path / f"{name}.safetensors", "is no whole safetensors file: ")


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path / "none.pth", r"none.pth: there is no such file; an RWKV6 model is a .pth or .safetensors file on this machine")
    (tmp_path / "directory.pth").mkdir()
    refused(tmp_path / "directory.pth", "is a directory, an RWKV6 model is a .pth or .safetensors file; give its path")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "an RWKV6 model is a .pth or .safetensors file, this is neither")


def test_a_revision_is_for_the_hub(tmp_path, tensors):
    write(tmp_path / "m.pth", tensors)
    refused(tmp_path / "m.pth", "model.revision: 'main' is for a hub id, an RWKV6 model is a file; remove it", revision="main")


def test_an_unreadable_file(tmp_path, tensors):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    write(tmp_path / "m.pth", tensors)
    (tmp_path / "m.pth").chmod(0)
    refused(tmp_path / "m.pth", "can't be read: Permission denied")
