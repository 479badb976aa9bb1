"""Every WKV6 operator against the loop over time, gradients of all six tensors included."""

import functools
import importlib
import importlib.machinery
import logging
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bone_ds.errors import ConfigError
from rwkv_adapters import wkv6
from rwkv_adapters.wkv6 import c, chunked, naive

needs_c = pytest.mark.skipif(c.missing() is not None, reason=f"the C kernel is not there: {c.missing()}")
FAST = [pytest.param(chunked.wkv6, id="chunked"), pytest.param(c.wkv6, id="c", marks=needs_c)]
ALL = [pytest.param(naive.wkv6, id="naive"), *FAST]
INPUTS = ("r", "k", "v", "log_decay", "bonus", "state")
ROWS = [(1,), (15,), (16,), (17,), (77,), (200,), (1, 1, 1), (65, 1, 64, 3, 67)]


def mixed(T, H, N, random):
    """From hardly any decay to a state that is gone within a few steps."""
    return -torch.exp(3 * random(T, H, N) - 1)


def poisonous(T, H, N, random):
    """One step in the midst of mild ones that leaves nothing."""
    log_decay = -0.1 * random(T, H, N).abs()
    log_decay[T // 2] = -1e4
    return log_decay


DECAYS = {
    "none": lambda T, H, N, random: torch.zeros(T, H, N),
    "mixed": mixed,
    "zero or all": lambda T, H, N, random: -50 * (random(T, H, N) > 0),
    "underflowing": lambda T, H, N, random: torch.full((T, H, N), -50.0),
    "one step of all": poisonous,
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that nobody wrote is NaN, so that it shows in results."""
    def poisoned(allocate):
        @functools.wraps(allocate)
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x
        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def make_inputs(lengths, H=2, N=8, decay="mixed", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    T = sum(lengths)
    tensors = [random(T, H, N), random(T, H, N), random(T, H, N), DECAYS[decay](T, H, N, random), random(H, N),
               random(len(lengths), H, N, N)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def results(operator, inputs, lengths) -> dict[str, torch.Tensor]:
    """y, final_state and the gradients of all inputs, both outputs having one."""
    y, final_state = operator(*inputs, lengths)
    generator = torch.Generator().manual_seed(99)
    g_outputs = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, final_state)]
    gradients = torch.autograd.grad((y, final_state), inputs, g_outputs)
    return {"y": y.detach(), "final_state": final_state.detach(), **dict(zip(INPUTS, gradients))}


def assert_close(found, expected, tolerance):
    """Largest error relative to the largest value, tensor by tensor; NaN and infinity fail."""
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        error = (found[name].double() - tensor.double()).abs().max() / tensor.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_lengths(operator, lengths):
    inputs = make_inputs(lengths)
    assert_close(results(operator, inputs, lengths), results(naive.wkv6, inputs, lengths), 1e-10)


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("N", [1, 5, 8, 16, 32, 64])
def test_head_sizes(operator, N):
    lengths = (17, 1, 70)
    inputs = make_inputs(lengths, N=N)
    assert_close(results(operator, inputs, lengths), results(naive.wkv6, inputs, lengths), 1e-10)


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(operator, decay):
    lengths = (100, 3)
    inputs = make_inputs(lengths, decay=decay)
    assert_close(results(operator, inputs, lengths), results(naive.wkv6, inputs, lengths), 1e-10)


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("N", [5, 8, 16, 32, 64, 128])
def test_fp32_is_near_fp64(operator, decay, N):
    """Also where log_decay is large: its gradient reaches a parameter multiplied by log_decay, so small errors would not stay small."""
    lengths = (70, 1)
    inputs = make_inputs(lengths, N=N, decay=decay, dtype=torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert_close(results(operator, inputs, lengths), results(c.wkv6 if not c.missing() else chunked.wkv6, exact, lengths), 5e-6)


@pytest.mark.parametrize("operator", FAST)
def test_log_decay_has_no_gradient_where_nothing_is_left(operator):
    inputs = make_inputs((40,), decay="underflowing", dtype=torch.float32)
    assert results(operator, inputs, (40,))["log_decay"].abs().max() < 1e-15


@pytest.mark.parametrize("operator", ALL)
def test_gradcheck(operator):
    lengths = (3, 1)
    torch.autograd.gradcheck(lambda *inputs: operator(*inputs, lengths), make_inputs(lengths, H=1, N=2))


@pytest.mark.parametrize("operator", ALL)
def test_a_carried_state_continues_a_document(operator):
    lengths, first, second = (90, 7), (30, 5), (60, 2)
    inputs = make_inputs(lengths)
    halves = [torch.tensor([*range(30), *range(90, 95)]), torch.tensor([*range(30, 90), 95, 96])]

    def in_two(r, k, v, log_decay, bonus, state, lengths):
        parts = []
        for rows, part_lengths in zip(halves, (first, second)):
            part, state = operator(r[rows], k[rows], v[rows], log_decay[rows], bonus, state, part_lengths)
            parts.append(part)
        return torch.cat(parts)[torch.cat(halves).argsort()], state

    assert_close(results(in_two, inputs, lengths), results(operator, inputs, lengths), 1e-12)


@pytest.mark.parametrize("operator", ALL)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_are_independent(operator, changed):
    lengths = (20, 70, 5)
    inputs, others = make_inputs(lengths), make_inputs(lengths, seed=1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rows, states = document == changed, torch.arange(3) == changed
    other_document = [torch.where(where.view(-1, *[1] * (x.dim() - 1)), other, x).detach().requires_grad_()
                      for x, other, where in zip(inputs, others, (rows, rows, rows, rows, torch.tensor(False), states))]
    before, after = results(operator, inputs, lengths), results(operator, other_document, lengths)
    for name in ("y", "r", "k", "v", "log_decay"):
        assert torch.equal(before[name][~rows], after[name][~rows]), name
        assert not torch.equal(before[name][rows], after[name][rows]), name
    for name in ("final_state", "state"):
        assert torch.equal(before[name][~states], after[name][~states]), name


@pytest.mark.parametrize("operator", ALL)
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_gives_gradients(operator, used):
    lengths = (20, 3)
    inputs = make_inputs(lengths)
    found, expected = (torch.autograd.grad(op(*inputs, lengths)[used].square().sum(), inputs, materialize_grads=True)
                       for op in (operator, naive.wkv6))
    assert_close(dict(zip(INPUTS, found)), dict(zip(INPUTS, expected)), 1e-10)


@pytest.mark.parametrize("operator", ALL)
def test_frozen_inputs_and_no_gradient_at_all(operator):
    lengths = (20, 3)
    inputs = make_inputs(lengths)
    expected = torch.autograd.grad(naive.wkv6(*inputs, lengths)[0].sum(), inputs[0])[0]
    frozen = [inputs[0], *(x.detach() for x in inputs[1:])]
    y, final_state = operator(*frozen, lengths)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs[0])[0], expected)
    with torch.no_grad():
        y_alone, final_alone = operator(*inputs, lengths)
    assert not y_alone.requires_grad
    assert torch.equal(y_alone, y) and torch.equal(final_alone, final_state)


@pytest.mark.parametrize("operator", ALL)
def test_inputs_need_not_be_contiguous(operator):
    lengths = (20, 66)
    inputs = make_inputs(lengths)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    assert_close(results(operator, strided, lengths), results(operator, inputs, lengths), 1e-14)


@pytest.mark.parametrize("operator", ALL)
def test_inputs_are_left_as_they_were(operator):
    inputs = make_inputs((20, 66))
    before = [x.detach().clone() for x in inputs]
    results(operator, inputs, (20, 66))
    assert all(map(torch.equal, inputs, before))


@needs_c
@pytest.mark.parametrize("lengths", [(40,), (1, 2, 80, 3), (1,) * 9], ids=str)
def test_threads_give_equal_results(lengths, monkeypatch):
    monkeypatch.setattr(c, "VALUES_PER_THREAD", 1)
    inputs = make_inputs(lengths, H=3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(c.wkv6, inputs, lengths))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@needs_c
def test_without_torch_s_threads_it_runs_on_one(monkeypatch):
    lengths = (300, 20)
    inputs = make_inputs(lengths, dtype=torch.float32)
    expected = c.wkv6(*inputs, lengths)
    monkeypatch.setattr(c, "_parallel", lambda: None)
    for got, wanted in zip(c.wkv6(*inputs, lengths), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 1), (7, 7, 7, 100)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_shares_cover_every_pair_once(lengths, threads):
    cuts = list(c._shares(lengths, 3, threads))
    assert len(cuts) == threads + 1
    assert [pair for share in pairwise(cuts) for pair in range(*share)] == list(range(3 * len(lengths)))


@pytest.mark.parametrize("name", ["naive", "chunked", "c", "fla"])
def test_fake_tensors_pass(name):
    operator = importlib.import_module(f"rwkv_adapters.wkv6.{name}").wkv6
    lengths = (70, 1, 3)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x.detach()).requires_grad_() for x in make_inputs(lengths, dtype=torch.float32)]
        y, final_state = operator(*inputs, lengths)
        (y.sum() + final_state.sum()).backward()
    assert y.shape == inputs[0].shape and final_state.shape == inputs[5].shape
    assert y.dtype == final_state.dtype == torch.float32
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in inputs)


@needs_c
def test_the_c_operator_is_what_it_says_to_torch():
    inputs = make_inputs((5, 2), dtype=torch.float32)
    torch.library.opcheck(c._forward, (*inputs, [5, 2], True), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("operator", FAST)
def test_little_is_kept_for_backward(operator):
    """Inputs, and one state for 64 steps."""
    inputs = make_inputs((128,), N=64, dtype=torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        operator(*inputs, (128,))
    beyond_inputs = [x for x in kept.values() if x.data_ptr() not in {x.data_ptr() for x in inputs}]
    assert sum(x.nbytes for x in beyond_inputs) == 2 * 2 * 64 * 64 * 4


def test_auto_takes_the_c_kernel_or_says_why_not(monkeypatch, caplog):
    monkeypatch.setattr(c, "missing", lambda: None)
    assert wkv6.resolve("auto", torch.device("cpu")) is c.wkv6
    monkeypatch.setattr(c, "missing", lambda: "it was not compiled at installation")
    wkv6._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bone_ds"):
        assert wkv6.resolve("auto", torch.device("cpu")) is chunked.wkv6
        assert wkv6.resolve("auto", torch.device("cpu")) is chunked.wkv6
    assert [record.getMessage() for record in caplog.records] == [
        "WKV6 is computed by the chunked operator, a few times slower than the C kernel: it was not compiled at installation"]
    wkv6._say_once.cache_clear()


def test_auto_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(wkv6, "_has_fla", lambda: True)
    assert wkv6.resolve("auto", torch.device("cuda", 0)).__module__ == "rwkv_adapters.wkv6.fla"
    monkeypatch.setattr(wkv6, "_has_fla", lambda: False)
    wkv6._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bone_ds"):
        assert wkv6.resolve("auto", torch.device("cuda", 0)) is chunked.wkv6
    assert "bone_ds[gpu]" in caplog.text
    wkv6._say_once.cache_clear()


def test_what_is_asked_for_and_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(c, "missing", lambda: "it was not compiled at installation")
    monkeypatch.setattr(wkv6, "_has_fla", lambda: False)
    with pytest.raises(ConfigError, match="model.wkv: 'c' can't be used: it was not compiled.*C compiler"):
        wkv6.resolve("c", "cpu")
    with pytest.raises(ConfigError, match="model.wkv: 'c' runs on a CPU, the model is on cuda"):
        wkv6.resolve("c", "cuda:1")
    with pytest.raises(ConfigError, match="model.wkv: 'fla' needs fla-core"):
        wkv6.resolve("fla", "cuda")
    with pytest.raises(ConfigError, match="model.wkv: 'fla' runs on a GPU"):
        wkv6.resolve("fla", "cpu")
    with pytest.raises(ConfigError, match="model.wkv: 'cc' is unknown"):
        wkv6.resolve("cc", "cpu")
    assert wkv6.resolve("naive", "cpu") is naive.wkv6


@pytest.fixture
def library_is_looked_for(monkeypatch):
    """Nothing of earlier tries is remembered."""
    monkeypatch.setattr(c, "_library", c._library.__wrapped__)
    monkeypatch.setattr(c, "missing", c.missing.__wrapped__)


def test_a_library_that_does_not_load_is_missing(library_is_looked_for, monkeypatch, tmp_path):
    monkeypatch.setattr(c, "__file__", str(tmp_path / "c.py"))
    assert c.missing() == "it was not compiled at installation"
    path = tmp_path / f"kernel{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"no library")
    assert str(path) in c.missing()


@needs_c
def test_a_library_of_another_version_is_missing(library_is_looked_for, monkeypatch):
    monkeypatch.setattr(c, "VERSION", -1)
    assert "is of version 2, this needs -1" in c.missing()
