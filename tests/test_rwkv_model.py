"""The RWKV6 forward: as the `rwkv` package computes it, document by document, with every gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_rwkv import built_and_loaded, logits, opened, oracle, random_tensors, save_tiny, tiny_sizes, write
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bone_ds.config import AdapterConfig
from bone_ds.inject import inject
from rwkv_adapters import ARCHITECTURE
from rwkv_adapters.model import Rwkv6, parameter_shapes


def some_tokens(count, vocabulary=96, seed=0):
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def random_model(dtype=torch.float64, **sizes) -> Rwkv6:
    sizes = tiny_sizes(**sizes)
    model = Rwkv6(sizes, "naive").to(dtype)
    with torch.no_grad():
        for name, tensor in random_tensors(sizes).items():
            model.get_parameter(name).copy_(tensor)
    return model


def reference(w, tokens, heads):
    """Logits (T, V) of one document by the equations, one token at a time; w: tensors by their official names."""
    def shifted(x):
        return torch.cat((torch.zeros_like(x[:1]), x[:-1]))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    x = norm(w["emb.weight"][tokens[0]], "blocks.0.ln0")
    for layer in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        att = {name.split(".", 3)[3]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{layer}.att.")}
        ffn = {name.split(".", 3)[3]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{layer}.ffn.")}
        h = norm(x, f"blocks.{layer}.ln1")
        difference = shifted(h) - h
        low = torch.tanh((h + difference * att["time_maa_x"][0]) @ att["time_maa_w1"]).view(len(h), 5, -1)
        mixed = {mix: h + difference * (att[f"time_maa_{mix}"][0] + low[:, i] @ att["time_maa_w2"][i]) for i, mix in enumerate("wkvrg")}
        decay = att["time_decay"][0] + torch.tanh(mixed["w"] @ att["time_decay_w1"]) @ att["time_decay_w2"]
        r, k, v = (mixed[mix] @ att[f"{name}.weight"].T for mix, name in (("r", "receptance"), ("k", "key"), ("v", "value")))
        r, k, v, decay = (z.view(len(h), heads, -1) for z in (r, k, v, torch.exp(-torch.exp(decay))))
        state = torch.zeros(heads, r.shape[2], r.shape[2], dtype=x.dtype)
        rows = []
        for t in range(len(h)):
            product = k[t][:, :, None] * v[t][:, None, :]
            rows.append(torch.einsum("hk,hkv->hv", r[t], state + att["time_faaaa"][:, :, None] * product))
            state = decay[t][:, :, None] * state + product
        y = F.group_norm(torch.stack(rows).flatten(1), heads, att["ln_x.weight"], att["ln_x.bias"], eps=64e-5)
        x = x + (y * F.silu(mixed["g"] @ att["gate.weight"].T)) @ att["output.weight"].T
        h = norm(x, f"blocks.{layer}.ln2")
        difference = shifted(h) - h
        squared = torch.relu((h + difference * ffn["time_maa_k"][0]) @ ffn["key.weight"].T) ** 2
        x = x + torch.sigmoid((h + difference * ffn["time_maa_r"][0]) @ ffn["receptance.weight"].T) * (squared @ ffn["value.weight"].T)
    return norm(x, "ln_out") @ w["head.weight"].T


def package_state(state):
    """The package's list of three tensors a layer as ours of one document."""
    return torch.stack((torch.stack(state[0::3]), torch.stack(state[2::3])), 1)[None], torch.stack(state[1::3])[None]


@torch.no_grad()
def assert_equals_package(path, wkv, tolerance, lengths=(1, 15, 77, 500), vocabulary=96):
    package, model = oracle(path), built_and_loaded(opened(path, wkv=wkv))
    for length in lengths:
        tokens = some_tokens(length, vocabulary, seed=length)
        expected, expected_state = package.forward(tokens[0].tolist(), None, full_output=True)
        hidden, state = ARCHITECTURE.hidden(model, tokens, (length,), keep_state=slice(None))
        got = hidden @ ARCHITECTURE.head(model).T
        torch.testing.assert_close(got, expected.view_as(got), rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(state, package_state(expected_state), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("sizes", [
    dict(head_size=8), dict(head_size=32, width=96, ffn_width=100, layers=3), dict(head_size=64, width=128, ffn_width=77),
    dict(head_size=5, width=35, ffn_width=33, mix_rank=3, decay_rank=2)], ids=str)
def test_naive_equals_the_rwkv_package(tmp_path, sizes):
    save_tiny(tmp_path / "m.pth", **sizes)
    assert_equals_package(tmp_path / "m.pth", "naive", 1e-6)


def test_auto_equals_the_rwkv_package(tmp_path):
    save_tiny(tmp_path / "m.pth", head_size=8)
    assert_equals_package(tmp_path / "m.pth", "auto", 1e-5)


@pytest.mark.parametrize(("wkv", "tolerance", "lengths"), [("naive", 1e-6, (1, 77)), ("auto", 1e-5, (1, 15, 77, 500))])
def test_the_real_tiny_model_equals_the_rwkv_package(real_rwkv6, wkv, tolerance, lengths):
    assert_equals_package(real_rwkv6, wkv, tolerance, lengths, vocabulary=256)


def test_a_bf16_file_is_computed_with_as_it_is(tmp_path):
    """The package rounds the embedding after ln0 to the file's dtype; a file of the same numbers in fp32 it does not."""
    tensors = save_tiny(tmp_path / "bf16.pth", dtype=torch.bfloat16)
    write(tmp_path / "fp32.pth", {name: tensor.float() for name, tensor in tensors.items()})
    tokens = some_tokens(40)
    got = logits(built_and_loaded(opened(tmp_path / "bf16.pth", wkv="naive")), tokens)
    expected, _ = oracle(tmp_path / "fp32.pth").forward(tokens[0].tolist(), None, full_output=True)
    rounded, _ = oracle(tmp_path / "bf16.pth").forward(tokens[0].tolist(), None, full_output=True)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert 1e-4 < (rounded - expected).abs().max() < 0.2


def test_a_bf16_model_is_near_the_fp32_one(tmp_path):
    save_tiny(tmp_path / "m.pth", width=64, head_size=16, dtype=torch.bfloat16)
    tokens = some_tokens(60)
    exact = logits(built_and_loaded(opened(tmp_path / "m.pth", wkv="naive")), tokens)
    model = built_and_loaded(opened(tmp_path / "m.pth", wkv="naive"), torch.bfloat16)
    hidden, (shifts, wkv) = model.hidden(tokens, (60,), keep_state=slice(None))
    assert (hidden.dtype, shifts.dtype, wkv.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    difference = (hidden @ model.head.weight.T).float() - exact
    assert difference.norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("sizes", [dict(), dict(layers=1, width=24, attention_width=40, head_size=8), dict(head_size=32)], ids=str)
def test_values_and_every_gradient_are_those_of_the_equations(sizes):
    model = random_model(**sizes)
    tokens = some_tokens(21)
    weight = torch.randn(21, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    copies = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    expected = reference(copies, tokens, model.sizes.heads)
    got = logits(model, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for name, param in model.named_parameters():
        assert param.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(param.grad, copies[name].grad, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


LENGTHS = (5, 1, 12, 1, 1, 9)


def test_documents_of_a_row_are_each_as_if_alone():
    model = random_model()
    tokens = some_tokens(sum(LENGTHS))
    got, state = model.hidden(tokens, LENGTHS, keep_state=slice(None))
    got.square().sum().backward()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    alone = [model.hidden(document, (document.shape[1],), keep_state=slice(None)) for document in tokens.split(LENGTHS, dim=1)]
    torch.testing.assert_close(got, torch.cat([hidden for hidden, _ in alone]), rtol=1e-10, atol=1e-10)
    for index, part in enumerate(state):
        torch.testing.assert_close(part, torch.cat([kept[index] for _, kept in alone]), rtol=1e-10, atol=1e-10)
    torch.cat([hidden for hidden, _ in alone]).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9)


def test_a_changed_document_changes_no_other():
    model = random_model(torch.float32)
    tokens = some_tokens(sum(LENGTHS))
    before, _ = model.hidden(tokens, LENGTHS)
    tokens[0, 6:18] = (tokens[0, 6:18] + 1) % 96  # the third document
    after, _ = model.hidden(tokens, LENGTHS)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[18:], after[18:])
    assert not torch.equal(before[6:18], after[6:18])


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_going_on_from_a_state_equals_the_whole(cut):
    model = random_model()
    tokens = some_tokens(20)
    whole, end = model.hidden(tokens, (20,), keep_state=slice(None))
    first, state = model.hidden(tokens[:, :cut], (cut,), keep_state=slice(None))
    second, last = model.hidden(tokens[:, cut:], (20 - cut,), state, keep_state=slice(None))
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, end, rtol=1e-10, atol=1e-10)
    assert not any(part.requires_grad for part in (*state, *last))


def test_the_first_documents_go_on_and_the_others_begin():
    model = random_model(initial_state=True)
    _, state = model.hidden(some_tokens(9, seed=1), (4, 5), keep_state=slice(None))
    tokens = some_tokens(10, seed=2)
    got, after = model.hidden(tokens, (3, 1, 6), state, keep_state=slice(None))
    for index, (begin, end) in enumerate([(0, 3), (3, 4), (4, 10)]):
        own = tuple(part[index:index + 1] for part in state) if index < 2 else None
        expected, expected_after = model.hidden(tokens[:, begin:end], (end - begin,), own, keep_state=slice(None))
        torch.testing.assert_close(got[begin:end], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tuple(part[index:index + 1] for part in after), expected_after, rtol=1e-10, atol=1e-10)


def test_token_by_token_equals_the_whole():
    model = random_model()
    tokens = torch.cat([some_tokens(6, seed=seed) for seed in range(3)])
    whole, _ = model.hidden(tokens.view(1, -1), (6, 6, 6))
    state, rows = None, []
    for t in range(6):
        hidden, state = model.hidden(tokens[:, t][None], (1, 1, 1), state, keep_state=slice(None))
        rows.append(hidden)
    torch.testing.assert_close(torch.stack(rows, 1).flatten(0, 1), whole, rtol=1e-10, atol=1e-10)


def test_no_state_is_kept_unasked():
    assert random_model().hidden(some_tokens(3), (3,))[1] is None


def test_a_trained_state_is_one_that_the_package_begins_with(tmp_path):
    tensors = save_tiny(tmp_path / "m.pth", initial_state=True, head_size=16)
    assert "blocks.1.att.time_state" in tensors
    assert_equals_package(tmp_path / "m.pth", "naive", 1e-6, lengths=(1, 33))


def test_an_initial_state_begins_at_zero_and_learns():
    model = random_model()
    before, _ = model.hidden(some_tokens(12), (5, 7))
    model.requires_grad_(False)
    added = ARCHITECTURE.add_initial_state(model, 0, 1)
    assert [(name, tuple(param.shape), param.dtype) for name, param in added.items()] == [
        ("blocks.0.att.time_state", (4, 8, 8), torch.float64)]
    assert dict(model.named_parameters())["blocks.0.att.time_state"] is added["blocks.0.att.time_state"]
    after, _ = model.hidden(some_tokens(12), (5, 7))
    assert torch.equal(before, after)

    def loss(time_state):
        with torch.no_grad():
            model.blocks[0].att.time_state.copy_(time_state)
        return model.hidden(some_tokens(12), (5, 7))[0].square().sum()

    after.square().sum().backward()
    gradient = added["blocks.0.att.time_state"].grad
    step = torch.randn(4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1e-6
    measured = (loss(step) - loss(-step)) / 2
    torch.testing.assert_close((gradient * step).sum(), measured.detach(), rtol=1e-5, atol=0)
    assert gradient.abs().max() > 1e-3


def test_a_state_that_the_file_has_is_trained_further():
    model = random_model(initial_state=True).requires_grad_(False)
    before = model.blocks[1].att.time_state.clone()
    added = model.add_initial_state(1, 2)
    assert list(added) == ["blocks.1.att.time_state"] and added["blocks.1.att.time_state"].requires_grad
    assert torch.equal(added["blocks.1.att.time_state"], before) and before.any()


def test_recomputed_blocks_give_equal_gradients():
    plain, recomputed = random_model(), random_model()
    for _, block in ARCHITECTURE.layers(recomputed):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    _, state = plain.hidden(some_tokens(4), (4,), keep_state=slice(None))
    for model in (plain, recomputed):
        model.hidden(some_tokens(sum(LENGTHS)), LENGTHS, state)[0].square().sum().backward()
    for (name, param), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if name != "head.weight":
            assert torch.equal(param.grad, other.grad), name


@pytest.mark.parametrize("adapter", [dict(method="bone", rank=8), dict(method="bone", rank=8, grouping="col"), dict(method="lora", rank=3)],
                         ids=str)
def test_every_adapter_gets_its_gradient_and_the_base_none(adapter):
    model = random_model(torch.float32)
    trainable = inject(model, ARCHITECTURE, AdapterConfig(**adapter))
    assert len(trainable) == 2 * 8 * (2 if adapter["method"] == "lora" else 1)
    for param in trainable.values():
        torch.nn.init.normal_(param, std=0.02)
    model.hidden(some_tokens(sum(LENGTHS)), LENGTHS)[0].square().sum().backward()
    assert all(param.grad.abs().max() > 0 for param in trainable.values())
    assert {name for name, param in model.named_parameters() if param.grad is not None} == {
        name for name, param in model.named_parameters() if any(param is mine for mine in trainable.values())}


def test_fake_tensors_pass_forward_and_backward():
    with FakeTensorMode():
        model = Rwkv6(tiny_sizes(), "naive")
        model.add_initial_state(0, 2)
        tokens = torch.zeros(1, sum(LENGTHS), dtype=torch.int64)
        _, state = model.hidden(tokens[:, :2], (1, 1), keep_state=slice(None))
        hidden, (shifts, wkv) = model.hidden(tokens, LENGTHS, state, keep_state=slice(None))
        hidden.sum().backward()
    assert hidden.shape == (sum(LENGTHS), 32) and shifts.shape == (6, 2, 2, 32) and wkv.shape == (6, 2, 4, 8, 8)
    assert model.blocks[1].att.time_state.grad.shape == (4, 8, 8)


def test_the_head_is_not_touched():
    model = random_model()
    model.head.weight.data.fill_(float("nan"))
    assert model.hidden(some_tokens(4), (4,))[0].isfinite().all()


def test_lengths_that_are_no_tokens_are_refused():
    with pytest.raises(AssertionError, match="are no 4 tokens"):
        random_model().hidden(some_tokens(4), (3,))


def test_names_and_order_are_those_of_the_official_files(real_rwkv6):
    stored = torch.load(real_rwkv6, mmap=True, weights_only=True)
    shapes = parameter_shapes(opened(real_rwkv6).sizes)
    assert list(shapes.items()) == [(name, tuple(tensor.shape)) for name, tensor in stored.items()]


@pytest.mark.parametrize(("layers", "width", "ffn_width", "parameters"), [
    (24, 2048, 7168, 1_599_873_024), (32, 2560, 8960, 3_099_863_040), (32, 4096, 14336, 7_635_746_816)])
def test_the_official_sizes_have_their_parameters(layers, width, ffn_width, parameters):
    wide = width >= 4096
    shapes = parameter_shapes(tiny_sizes(layers=layers, width=width, ffn_width=ffn_width, head_size=64, vocabulary=65536,
                                         mix_rank=64 if wide else 32, decay_rank=128 if wide else 64))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_a_decay_beyond_all_bounds_has_a_gradient(tmp_path):
    """A diverging run may come there: the decay is 0, and so is its gradient, not NaN."""
    tensors = save_tiny(tmp_path / "tiny.pth")
    tensors["blocks.1.att.time_decay"].fill_(200.0)
    write(tmp_path / "beyond.pth", tensors)
    model = built_and_loaded(opened(tmp_path / "beyond.pth"))
    logits(model, some_tokens(9)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.blocks[1].att.time_decay.grad.abs().max() == 0
