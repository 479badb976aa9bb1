"""RWKV6 files: opened without reading, loaded tensor by tensor, and made from nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_rwkv import WholeOnCpu, built_and_loaded, logits, opened, oracle, random_tensors, save_tiny, tiny_sizes, write

from bone_ds.errors import CheckpointError, ConfigError
from rwkv_adapters import ARCHITECTURE, initialise, weights
from rwkv_adapters.model import parameter_shapes

TOKENS = torch.arange(12)[None]


def test_open_reads_the_sizes_from_the_tensors(tmp_path):
    save_tiny(tmp_path / "m.pth", layers=3, width=24, attention_width=40, head_size=8, ffn_width=50, vocabulary=70, mix_rank=2,
              decay_rank=5)
    source = opened(tmp_path / "m.pth", tokenizer="bytes", wkv="chunked")
    assert source.sizes == tiny_sizes(layers=3, width=24, attention_width=40, head_size=8, ffn_width=50, vocabulary=70, mix_rank=2,
                                      decay_rank=5)
    assert (source.sizes.heads, source.sizes.head_size) == (5, 8)
    assert (source.path, source.origin, source.revision) == (tmp_path / "m.pth", str(tmp_path / "m.pth"), None)
    assert (source.tokenizer, source.wkv) == ("bytes", "chunked")
    assert ARCHITECTURE.build(source, torch.float32).blocks[0].att.wkv == "chunked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_forms_of_a_file_are_the_same_model(tmp_path, dtype):
    tensors = save_tiny(tmp_path / "m.pth", dtype=dtype)
    save_tiny(tmp_path / "m.safetensors", dtype=dtype)
    sources = [opened(tmp_path / name) for name in ("m.pth", "m.safetensors")]
    assert sources[0].fingerprint == sources[1].fingerprint and len(sources[0].fingerprint) == 64
    for source in sources:
        model = built_and_loaded(source)
        assert [name for name, _ in model.named_parameters()] == list(tensors)
        for name, param in model.named_parameters():
            assert torch.equal(param, tensors[name].float()), name


def test_the_weights_come_in_the_models_dtype(tmp_path):
    save_tiny(tmp_path / "m.pth")
    model = built_and_loaded(opened(tmp_path / "m.pth"), torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["emb.weight", "blocks.1.ffn.value.weight", "blocks.0.att.time_maa_x"])
@pytest.mark.parametrize("position", [0, -1])
def test_the_fingerprint_sees_other_values(tmp_path, name, position):
    tensors = save_tiny(tmp_path / "a.pth")
    tensors[name].view(-1)[position] += 1
    write(tmp_path / "b.pth", tensors)
    assert opened(tmp_path / "a.pth").fingerprint != opened(tmp_path / "b.pth").fingerprint


def test_the_order_of_a_file_is_no_matter(tmp_path):
    tensors = save_tiny(tmp_path / "a.pth")
    write(tmp_path / "b.pth", dict(reversed(tensors.items())))
    assert opened(tmp_path / "a.pth").fingerprint == opened(tmp_path / "b.pth").fingerprint
    assert torch.equal(*(logits(built_and_loaded(opened(tmp_path / name)), TOKENS) for name in ("a.pth", "b.pth")))


@pytest.mark.parametrize("heads", [1, 4])
def test_squeezed_tensors_are_read(tmp_path, heads):
    """The package squeezes every time_ tensor when it loads, so files without the dimensions of size 1 are RWKV6 too."""
    tensors = save_tiny(tmp_path / "a.pth", head_size=32 // heads)
    bonus = "time_faaaa"  # the number of heads is read from its shape, by the package too
    write(tmp_path / "b.pth", {name: tensor.squeeze() if ".time_" in name and bonus not in name else tensor
                               for name, tensor in tensors.items()})
    assert torch.equal(*(logits(built_and_loaded(opened(tmp_path / name)), TOKENS) for name in ("a.pth", "b.pth")))


def test_views_and_parameters_in_a_file_are_read(tmp_path):
    tensors = save_tiny(tmp_path / "a.pth")
    changed = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    changed["head.weight"] = tensors["head.weight"].T.contiguous().T
    write(tmp_path / "b.pth", changed)
    assert torch.equal(*(logits(built_and_loaded(opened(tmp_path / name)), TOKENS) for name in ("a.pth", "b.pth")))
    assert opened(tmp_path / "a.pth").fingerprint == opened(tmp_path / "b.pth").fingerprint


def test_tensors_come_one_by_one_in_the_order_of_the_parameters(tmp_path):
    save_tiny(tmp_path / "m.pth")
    source = opened(tmp_path / "m.pth")
    model, placement = ARCHITECTURE.build(source, torch.float32), WholeOnCpu()
    ARCHITECTURE.load(model, source, placement)
    assert [id(param) for param in placement.assigned] == [id(param) for param in model.parameters()]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_file_is_never_in_memory_as_a_whole(tmp_path, ending):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("memory is read from Linux's /proc")

    def file_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) * 1024

    class Watching(WholeOnCpu):
        most_bytes = 0

        def assign(self, param, tensor):
            super().assign(param, tensor)
            self.most_bytes = max(self.most_bytes, file_bytes() - before_bytes)

    save_tiny(tmp_path / f"m.{ending}", layers=6, width=512, head_size=64, ffn_width=1792, vocabulary=4096)
    before_bytes = file_bytes()
    source = opened(tmp_path / f"m.{ending}")
    opening_bytes = file_bytes() - before_bytes
    model, placement = ARCHITECTURE.build(source, torch.float32), Watching()
    ARCHITECTURE.load(model, source, placement)
    whole_bytes, largest_bytes = (tmp_path / f"m.{ending}").stat().st_size, 4096 * 512 * 4
    assert whole_bytes > 80e6
    assert opening_bytes < whole_bytes / 4
    assert largest_bytes < placement.most_bytes < 3 * largest_bytes


def test_a_model_is_built_where_the_context_says(tmp_path):
    save_tiny(tmp_path / "m.pth")
    with torch.device("meta"):
        model = ARCHITECTURE.build(opened(tmp_path / "m.pth"), torch.bfloat16)
    assert all(param.is_meta and param.dtype == torch.bfloat16 for param in model.parameters())


def test_a_state_in_the_file_is_loaded(tmp_path):
    tensors = save_tiny(tmp_path / "m.pth", initial_state=True)
    model = built_and_loaded(opened(tmp_path / "m.pth"))
    assert torch.equal(model.blocks[1].att.time_state, tensors["blocks.1.att.time_state"])


def test_a_file_that_was_replaced_meanwhile_is_refused(tmp_path):
    save_tiny(tmp_path / "m.pth")
    source = opened(tmp_path / "m.pth")
    model = ARCHITECTURE.build(source, torch.float32)
    save_tiny(tmp_path / "m.pth", ffn_width=40)
    with pytest.raises(CheckpointError, match="other tensors than when it was opened"):
        ARCHITECTURE.load(model, source, WholeOnCpu())


def test_layers_are_the_blocks(tmp_path):
    save_tiny(tmp_path / "m.pth", layers=3)
    model = built_and_loaded(opened(tmp_path / "m.pth"))
    assert [name for name, _ in ARCHITECTURE.layers(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert ARCHITECTURE.head(model) is model.head.weight


def initial(seed=0, **sizes):
    return dict(initialise.initial_weights(tiny_sizes(**sizes), seed))


def test_initial_weights_are_those_of_upstream():
    """Values worked out by hand from RWKV_Tmix_x060, RWKV_CMix_x060 and generate_init_weight."""
    w = initial(layers=4, width=32, head_size=8, ffn_width=128, vocabulary=128)
    att, ffn = "blocks.2.att.", "blocks.2.ffn."  # depth 2/3, height 1/2
    assert w[att + "time_maa_x"][0, 0, 8] == w[att + "time_maa_w"][0, 0, 8] == w[att + "time_maa_k"][0, 0, 8] == 1 - 0.25 ** 0.5
    assert w[att + "time_maa_v"][0, 0, 8].item() == pytest.approx(1 - (0.25 ** 0.5 + 0.3 * 2 / 3))
    assert w[att + "time_maa_r"][0, 0, 8].item() == w[att + "time_maa_g"][0, 0, 8].item() == pytest.approx(1 - 0.25 ** 0.25)
    assert w[ffn + "time_maa_k"][0, 0, 8] == w[ffn + "time_maa_r"][0, 0, 8] == 1 - 0.25 ** 0.5
    assert w[att + "time_decay"][0, 0, [0, 31]].tolist() == [-6, -1]
    assert w[att + "time_decay"][0, 0, 10].item() == pytest.approx(-6 + 5 * (10 / 31) ** (0.7 + 1.3 * 2 / 3))
    faaaa = w[att + "time_faaaa"].flatten()  # (n + 1) % 3 - 1 is 0, 1, -1, 0, ...
    assert faaaa[[0, 1, 2]].tolist() == pytest.approx([2 / 3, 2 / 3 * (30 / 31) + 0.1, 2 / 3 * (29 / 31) - 0.1])
    assert w[att + "ln_x.weight"].unique().item() == pytest.approx(0.75 ** 0.7)
    for name in (att + "time_maa_w1", att + "time_decay_w1", att + "output.weight", ffn + "value.weight", ffn + "receptance.weight",
                 att + "ln_x.bias", "blocks.0.ln0.bias"):
        assert not w[name].any(), name
    for name in ("blocks.0.ln0.weight", "ln_out.weight", "blocks.2.ln1.weight"):
        assert (w[name] == 1).all(), name
    for name, limit in (("emb.weight", 1e-4), (att + "time_maa_w2", 0.01), (att + "time_decay_w2", 0.01)):
        assert 0.9 * limit < w[name].abs().max() <= limit and abs(w[name].mean()) < 0.1 * limit, name
    for name, gain in ((att + "receptance", 1), (att + "value", 1), (att + "key", 0.1), (att + "gate", 0.1), (ffn + "key", 1),
                       ("head", 0.5 * math.sqrt(128 / 32))):
        matrix = w[name + ".weight"]
        torch.testing.assert_close(matrix.T @ matrix, gain ** 2 * torch.eye(32), rtol=1e-4, atol=1e-4 * gain ** 2)


def test_initial_weights_follow_from_the_seed():
    assert all(torch.equal(a, b) for a, b in zip(initial(1).values(), initial(1).values()))
    assert not torch.equal(initial(1)["emb.weight"], initial(2)["emb.weight"])
    assert {name: tuple(tensor.shape) for name, tensor in initial(layers=1).items()} == parameter_shapes(tiny_sizes(layers=1))
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in initial(layers=1).values())


@pytest.mark.parametrize(("given", "expected"), [
    (dict(layers=24, width=2048, vocabulary=65536), dict(heads=32, ffn_width=7168, mix_rank=32, decay_rank=64)),
    (dict(layers=32, width=4096, vocabulary=65536), dict(heads=64, ffn_width=14336, mix_rank=64, decay_rank=128)),
    (dict(layers=2, width=96, vocabulary=256, head_size=8), dict(heads=12, ffn_width=320)),
    (dict(layers=2, width=64, vocabulary=256, ffn_width=100), dict(heads=1, ffn_width=100))], ids=str)
def test_sizes_of_a_new_model(given, expected):
    sizes = initialise.sizes(**given)
    assert {name: getattr(sizes, name) for name in expected} == expected
    assert (sizes.layers, sizes.width, sizes.attention_width, sizes.vocabulary) == (
        given["layers"], given["width"], given["width"], given["vocabulary"])


@pytest.mark.parametrize(("given", "message"), [
    (dict(layers=2, width=100, vocabulary=256), "width 100 of a new model is no multiple of its head size 64"),
    (dict(layers=0, width=64, vocabulary=256), "the layers of a new model is 0, it must be at least 1"),
    (dict(layers=1, width=64, vocabulary=256, ffn_width=-1), "the ffn width of a new model is -1"),
    (dict(layers=1, width=8, vocabulary=256, head_size=8, ffn_width=0), "the ffn width of a new model is 0")], ids=str)
def test_impossible_sizes_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        initialise.sizes(**given)


def test_a_new_model_is_written_in_the_official_layout(tmp_path):
    path = tmp_path / "new" / "model.pth"
    sizes = tiny_sizes(vocabulary=50)
    initialise.write(path, sizes, seed=3, dtype=torch.bfloat16)
    assert [file.name for file in path.parent.iterdir()] == ["model.pth"]
    stored = torch.load(path, weights_only=True)
    assert type(stored) is dict and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    source = opened(path)
    assert source.sizes == sizes
    got = logits(built_and_loaded(source), TOKENS)
    initialise.write(tmp_path / "fp32.pth", sizes, seed=3, dtype=torch.float32)
    expected, _ = oracle(tmp_path / "fp32.pth").forward(TOKENS[0].tolist(), None, full_output=True)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_a_new_model_replaces_no_file_and_needs_its_ending(tmp_path):
    (tmp_path / "old.pth").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="old.pth: exists already"):
        initialise.write(tmp_path / "old.pth", tiny_sizes())
    with pytest.raises(ConfigError, match="is written as .pth"):
        initialise.write(tmp_path / "new.safetensors", tiny_sizes())
    assert (tmp_path / "old.pth").read_bytes() == b"mine"


def test_a_new_model_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="m.pth: can't be written: PytorchStreamWriter failed"):
        initialise.write(tmp_path / "m.pth", tiny_sizes())
    assert not list(tmp_path.iterdir())


def test_sources_are_frozen_and_compare_by_value(tmp_path):
    save_tiny(tmp_path / "m.pth")
    source = opened(tmp_path / "m.pth")
    assert source == opened(tmp_path / "m.pth") and replace(source, wkv="naive") != source
    assert weights.fingerprint(random_tensors(tiny_sizes())) == source.fingerprint
