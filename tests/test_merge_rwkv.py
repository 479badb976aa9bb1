"""A merged RWKV6 file is what the `rwkv` package makes of it: the base with its adapter, in the official layout."""

import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rwkv import built_and_loaded, opened, save_tiny
from tiny_rwkv_adapter import logits, package_logits, random_adapter

from bone_ds.errors import CheckpointError, ConfigError
from bone_ds.merge import merge
from rwkv_adapters import rewriting

ROOT = Path(__file__).parents[1]
TOKENS = [5, 17, 3, 88, 41, 2, 2, 60, 33]
ADAPTERS = {
    "row": {"rank": 8},
    "col": {"grouping": "col", "rank": 4},
    "left": {"grouping": "left", "rank": 8},
    "some layers and targets": {"rank": 8, "targets": ["att.key", "ffn.value"], "layers": [1, 2]},
    "lora": {"method": "lora", "rank": 4, "alpha": 10.0},
    "full": {"method": "full"},
}


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base.pth")
    return tmp_path / "base.pth"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_package_gives_base_plus_adapter(tmp_path, base, adapter):
    model = random_adapter(base, tmp_path / "adapter.safetensors", **ADAPTERS[adapter])
    source = merge(tmp_path / "adapter.safetensors", tmp_path / "merged.pth")
    assert source.origin == str(base)
    adapted, merged = logits(model, TOKENS), package_logits(tmp_path / "merged.pth", TOKENS)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - logits(built_and_loaded(source), TOKENS)).abs().max() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.pth", "merged.pth"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", [".pth", ".safetensors"])
@pytest.mark.parametrize("origin", [".pth", ".safetensors"])
def test_layout_and_unchanged_tensors_to_the_bit(tmp_path, origin, target, dtype):
    before = save_tiny(tmp_path / f"base{origin}", dtype=dtype)
    model = random_adapter(tmp_path / f"base{origin}", tmp_path / "adapter.safetensors", rank=8, targets=["att.gate"])
    merge(tmp_path / "adapter.safetensors", tmp_path / f"merged{target}")
    after = torch.load(tmp_path / "merged.pth", weights_only=True) if target == ".pth" else load_file(tmp_path / "merged.safetensors")
    assert type(after) is dict and {tensor.dtype for tensor in after.values()} == {dtype}
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{layer}.att.gate.weight" for layer in range(2)}
    assert torch.equal(after["blocks.1.att.gate.weight"], model.get_submodule("blocks.1.att.gate").merged_weight(dtype))
    if origin == target == ".pth":
        assert list(after) == list(before)


def test_the_archive_is_like_that_of_torch(tmp_path, base):
    rewriting.rewrite(opened(base), tmp_path / "again.pth", lambda name, weight: weight, {})
    with zipfile.ZipFile(tmp_path / "again.pth") as archive:
        assert archive.testzip() is None and {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    mapped = torch.load(tmp_path / "again.pth", mmap=True, weights_only=True)
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in mapped.values())
    assert opened(tmp_path / "again.pth").fingerprint == opened(base).fingerprint
    assert (tmp_path / "again.pth").stat().st_size < 1.05 * base.stat().st_size


def test_records_with_64_bit_sizes(tmp_path, base, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 5_000)
    rewriting.rewrite(opened(base), tmp_path / "again.pth", lambda name, weight: weight, {})
    before, after = torch.load(base), torch.load(tmp_path / "again.pth", mmap=True)
    assert all(torch.equal(before[name], after[name]) and after[name].data_ptr() % 64 == 0 for name in before)


def test_views_and_squeezed_tensors_keep_their_shapes(tmp_path):
    tensors = save_tiny(tmp_path / "base.pth")
    odd = {name: tensor.squeeze() if "time_maa" in name else tensor for name, tensor in tensors.items()}
    odd["head.weight"] = odd["head.weight"].T.contiguous().T
    both = torch.stack([odd["ln_out.weight"], odd["ln_out.bias"]])
    odd["ln_out.weight"], odd["ln_out.bias"] = both
    torch.save(odd, tmp_path / "odd.pth")
    random_adapter(tmp_path / "odd.pth", tmp_path / "adapter.safetensors", method="full")
    merge(tmp_path / "adapter.safetensors", tmp_path / "merged.pth")
    after = torch.load(tmp_path / "merged.pth")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in odd.items()}
    assert not torch.equal(after["head.weight"], odd["head.weight"])


@pytest.mark.parametrize("name", ["merged", "merged.pt", "merged.gguf", "merged.PTH"])
def test_other_endings_are_refused(tmp_path, base, name):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    with pytest.raises(ConfigError, match=rf"--out: .*{name}: .*\.pth or \.safetensors"):
        merge(tmp_path / "adapter.safetensors", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.pth"]


@pytest.mark.parametrize("has_states", [False, True], ids=["a base without states", "a base with states"])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_states_become_part_of_the_model(tmp_path, layers, has_states, ending):
    save_tiny(tmp_path / "base.pth", initial_state=has_states)
    model = random_adapter(tmp_path / "base.pth", tmp_path / "adapter.safetensors", method="state", layers=layers)
    source = merge(tmp_path / "adapter.safetensors", tmp_path / f"merged{ending}")
    adapted = logits(model, TOKENS)
    torch.testing.assert_close(logits(built_and_loaded(opened(tmp_path / f"merged{ending}")), TOKENS), adapted, rtol=1e-5, atol=1e-5)
    if ending == ".pth":
        torch.testing.assert_close(package_logits(tmp_path / "merged.pth", TOKENS), adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - logits(built_and_loaded(source), TOKENS)).abs().max() > 1e-3


def test_another_base_is_refused(tmp_path, base):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    save_tiny(tmp_path / "other.pth", seed=1)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        merge(tmp_path / "adapter.safetensors", tmp_path / "merged.pth", base=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("target", ["merged.pth", "merged.safetensors"])
def test_a_full_disk_leaves_nothing(tmp_path, base, target):
    random_adapter(base, tmp_path / "adapter.safetensors", rank=8)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
    try:
        with pytest.raises(ConfigError, match=f"--out: .*{target}: can't be written: .*File too large"):
            merge(tmp_path / "adapter.safetensors", tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.pth"]


def test_an_interruption_leaves_nothing(tmp_path, base):
    def interrupt(name, weight):
        if name == "head.weight":
            raise KeyboardInterrupt
        return weight

    for target in ("merged.pth", "merged.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            rewriting.rewrite(opened(base), tmp_path / target, interrupt, {})
    assert [path.name for path in tmp_path.iterdir()] == ["base.pth"]


PEAK = """
from pathlib import Path
from bone_ds.config import ModelConfig
from rwkv_adapters import ARCHITECTURE, rewriting

def resident_bytes(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def rewrite(source):
    for ending in (".pth", ".safetensors"):
        rewriting.rewrite(source, source.path.with_name(f"{source.path.stem}-again{ending}"),
                          lambda name, weight: weight.float() + 1 if weight.dim() == 2 else weight, {})

small, large = (ARCHITECTURE.open(ModelConfig(path=name)) for name in ("small.pth", "large.pth"))
rewrite(small)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew: opening has read a little of every tensor
before = resident_bytes("VmRSS")
rewrite(large)
print(resident_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory is taken from /proc")
def test_memory_holds_one_tensor(tmp_path):
    save_tiny(tmp_path / "small.pth")
    tensors = save_tiny(tmp_path / "large.pth", layers=24, width=256, head_size=64, ffn_width=1024, dtype=torch.bfloat16)
    whole_bytes = sum(tensor.nbytes for tensor in tensors.values())
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert whole_bytes > 40e6 and int(done.stdout) < whole_bytes / 3, (int(done.stdout), whole_bytes)
