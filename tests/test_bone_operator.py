import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bone_ds.bone import (
    STRATEGIES,
    BoneLinear,
    adapted_weight,
    bone_linear,
    bone_shape,
    fits,
    fused,
    largest_common_block,
    resolve,
)
from bone_ds.bone.grouping import divisors, free_periods
from bone_ds.errors import InjectionError
from bone_ds.live import LiveMemory


class Case(NamedTuple):
    """A way to compute one grouping in one form."""

    grouping: str
    form: str
    strategy: str

    def __str__(self):
        return "-".join(self)

    @property
    def product(self):
        return resolve(self.strategy, self.grouping, self.form)

    def reference(self, x, W, B, bias=None):
        return bone_linear(x, W, B, self.grouping, bias, self.form)

    def operands(self, *size, **how):
        return operands(self.grouping, *size, form=self.form, **how)


CASES = [Case(*pair, strategy) for strategy, products in STRATEGIES.items() for pair in products]
CUSTOM = [case for case in CASES if case.strategy in ("fused", "factored")]
# (out, in, r): square, tall, wide, smallest block, one block, both.
SIZES = [(24, 24, 8), (40, 16, 8), (16, 40, 8), (5, 7, 1), (24, 8, 8), (6, 6, 6), (1, 1, 1)]


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Uninitialised memory is NaN: torch fills it when its algorithms are to be deterministic."""
    torch.manual_seed(0)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def groups_of(grouping, out_features, r):
    """As many matrices as rows of blocks: with most sizes here these rows don't have the same ones."""
    return out_features // r if grouping == "free" else None


def operands(grouping, out_features, in_features, r, lead=(2, 5), dtype=torch.float64, std=1.0, form="affine", groups=None):
    groups = groups or groups_of(grouping, out_features, r)
    x = torch.randn(*lead, in_features, dtype=dtype, requires_grad=True)
    W = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype), requires_grad=False)
    B = nn.Parameter(torch.randn(bone_shape(grouping, out_features, in_features, r, form, groups), dtype=dtype) * std)
    return x, W, B


def with_gradients(y, inputs, g=None):
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) if g is None else g
    return y, *torch.autograd.grad(y, inputs, g)


def assert_same(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance or {"rtol": 1e-10, "atol": 1e-10})


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operations return in storage of their own."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.numels.append(t.untyped_storage().nbytes() // t.element_size())
        return out


# Groupings


def test_bone_shapes_and_fit():
    assert bone_shape("row", 11008, 4096, 64) == (64, 64, 64)
    assert bone_shape("col", 11008, 4096, 64) == (172, 64, 64)
    assert bone_shape("row", 11008, 4096, 64, "hadamard") == (64, 64, 64)
    assert bone_shape("col", 11008, 4096, 64, "unconstrained") == (2, 172, 64, 64)
    assert bone_shape("free", 11008, 4096, 64, groups=7) == (7, 64, 64)
    assert bone_shape("miss", 11008, 4096, 64) == (64, 11008)
    for grouping in ("row", "col", "left"):
        assert fits(grouping, 11008, 4096, 64) and fits(grouping, 6, 4, 1)
        assert not fits(grouping, 11008, 4096, 512) and not fits(grouping, 4096, 11008, 512)
        assert not fits(grouping, 8, 8, 0) and not fits(grouping, 8, 8, 16)
    assert all(fits("free", 24, 16, 8, groups) == (6 % groups == 0) for groups in range(1, 20))
    assert not fits("free", 24, 16, 8) and not fits("free", 24, 16, 16, 1) and not fits("free", 24, 16, 0, 1)
    assert fits("miss", 7, 5, 5) and fits("miss", 7, 5, 3) and not fits("miss", 7, 5, 6) and not fits("miss", 7, 5, 0)


def test_divisors():
    assert divisors(12) == [12, 6, 4, 3, 2, 1] and divisors(1) == [1] and divisors(0) == []


def test_largest_common_block():
    assert largest_common_block([(11008, 4096), (4096, 4096)])[:3] == [256, 128, 64]
    assert largest_common_block([(6, 4), (10, 8)]) == [2, 1]
    assert largest_common_block([(7, 5)]) == [1]
    assert largest_common_block([]) == []


@pytest.mark.parametrize("pair", STRATEGIES["materialized"], ids="-".join)
def test_adapted_weight_block_by_block(pair):
    grouping, form = pair
    out_features, in_features, r = 12, 8, 4
    _, W, B = operands(grouping, out_features, in_features, r, form=form)
    if grouping == "miss":
        expected = torch.stack([W[:, i] + B[i % r] for i in range(in_features)], 1)
        assert_same([adapted_weight(W, B, grouping, form)], [expected])
        return
    expected = torch.zeros_like(W)
    for a in range(out_features // r):
        for b in range(in_features // r):
            here = slice(a * r, a * r + r), slice(b * r, b * r + r)
            index = {"row": b, "col": a, "left": a, "free": (a * (in_features // r) + b) % B.shape[-3]}[grouping]
            factor, term = (B[0, index], B[1, index]) if form == "unconstrained" else (B[index], B[index])
            if form == "hadamard":
                product = W[here] * factor
            else:
                product = factor @ W[here] if grouping == "left" else W[here] @ factor
            expected[here] = W[here] + product + term
    assert_same([adapted_weight(W, B, grouping, form)], [expected])


@pytest.mark.parametrize("size", [(7, 5, 3), (4, 10, 4), (6, 5, 5), (3, 7, 6), (2, 9, 2)], ids=str)
@pytest.mark.parametrize("strategy", [strategy for strategy, products in STRATEGIES.items() if ("miss", "affine") in products])
def test_miss_with_a_shorter_last_shard(strategy, size):
    x, W, D = operands("miss", *size)
    expected = torch.stack([W[:, i] + D[i % size[2]] for i in range(size[1])], 1)
    assert_same([adapted_weight(W, D, "miss")], [expected])
    bias = torch.randn(size[0], dtype=x.dtype, requires_grad=True)
    actual = with_gradients(resolve(strategy, "miss")(x, W, D, bias), (x, D, bias))
    assert_same(actual, with_gradients(F.linear(x, expected, bias), (x, D, bias)))


@pytest.mark.parametrize("form", ["affine", "unconstrained", "hadamard"])
@pytest.mark.parametrize("size", [(24, 24, 8), (16, 40, 8), (48, 32, 8), (12, 12, 1)], ids=str)
def test_free_of_every_number_of_groups(size, form):
    """Those that divide in/r, those that in/r divides, and neither."""
    out_features, in_features, r = size
    for groups in divisors(out_features * in_features // r**2):
        x, W, B = operands("free", *size, form=form, groups=groups)
        expected = with_gradients(bone_linear(x, W, B, "free", None, form), (x, B))
        for strategy in ("auto", "fused", "factored"):
            if ("free", form) in STRATEGIES[strategy]:
                assert_same(with_gradients(resolve(strategy, "free", form)(x, W, B), (x, B)), expected)


@pytest.mark.parametrize("form", ["affine", "unconstrained", "hadamard"])
def test_free_with_a_matrix_for_each_block_of_inputs_is_row_to_the_bit(form):
    x, W, B = operands("row", 48, 32, 8, form=form)
    assert torch.equal(adapted_weight(W, B, "free", form), adapted_weight(W, B, "row", form))
    for strategy in ("auto", "materialized", "fused"):
        free, row = (with_gradients(resolve(strategy, grouping, form)(x, W, B), (x, B)) for grouping in ("free", "row"))
        exactly = {"rtol": 0, "atol": 0} if strategy == "auto" and form != "hadamard" else {}  # else B's gradient has sums in another order
        assert_same(free, row, **exactly)


def test_free_takes_the_way_with_fewer_products(monkeypatch):
    """Through the input as long as its thin products come to less than the third large one that building takes."""
    taken = {}
    for strategy in ("factored", "fused"):
        for form in ("affine", "unconstrained"):
            monkeypatch.setitem(STRATEGIES[strategy], ("free", form), lambda *_, name=strategy: taken.update(last=name))
    out_features, in_features, r = 96, 64, 2
    rows = []
    for groups in divisors(48 * 32):
        x, W, B = operands("free", out_features, in_features, r, groups=groups)
        resolve("auto", "free")(x, W, B)
        rows.append((free_periods(in_features // r, groups), taken["last"]))
    assert {strategy for p, strategy in rows if p == 1} == {"factored"}
    assert {strategy for p, strategy in rows if 3 * p * r < out_features} == {"factored"}
    assert {strategy for p, strategy in rows if p > 1 and 3 * p * r >= out_features} == {"fused"}
    _, W, B = operands("free", 8, 4, 4, form="unconstrained", groups=1)
    resolve("auto", "free", "unconstrained")(torch.ones(3, 4, dtype=W.dtype), W, B)
    assert taken["last"] == "factored"


def test_paper_parameter_counts_llama2_7b():
    shapes = 32 * ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
    count = lambda grouping, r, *how: sum(math.prod(bone_shape(grouping, o, i, r, *how)) for o, i in shapes)
    assert [count("col", r) for r in (16, 32, 64, 128)] == [21_757_952, 43_515_904, 87_031_808, 174_063_616]
    assert count("row", 64) == count("row", 64, "hadamard") == 72_876_032
    assert count("row", 32, "unconstrained") == 72_876_032 and count("col", 32, "unconstrained") == 87_031_808
    assert count("free", 64, "affine", 4) == 7 * 32 * 4 * 64**2 and count("miss", 64) == 87_031_808


# Strategies against the reference


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, size):
    x, W, B = case.operands(*size)
    bias = torch.randn(size[0], dtype=x.dtype, requires_grad=True)
    product = case.product
    expected = with_gradients(case.reference(x, W, B, bias), (x, B, bias))
    assert_same(with_gradients(product(x, W, B, bias), (x, B, bias)), expected)
    without_bias = with_gradients(case.reference(x, W, B), (x, B))
    assert_same(with_gradients(product(x, W, B), (x, B)), without_bias)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3,), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_leading_dims(case, lead):
    x, W, B = case.operands(12, 8, 4, lead)
    actual = with_gradients(case.product(x, W, B), (x, B))
    assert_same(actual, with_gradients(case.reference(x, W, B), (x, B)))
    assert actual[0].shape == (*lead, 12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_not_contiguous(case):
    _, _, B = case.operands(12, 8, 4)
    W = torch.randn(8, 12, dtype=torch.float64).t()
    g = torch.randn(12, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    permuted = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    expanded = torch.randn(5, 1, 8, dtype=torch.float64).expand(5, 2, 8).transpose(0, 1)
    strided = torch.randn(2, 5, 16, dtype=torch.float64)[..., ::2]
    for x in (permuted, expanded, strided):
        assert not x.is_contiguous()
        x.requires_grad_()
        actual = with_gradients(case.product(x, W, B), (x, B), g)
        assert_same(actual, with_gradients(case.reference(x, W, B), (x, B), g))
    ones = torch.ones((), dtype=torch.float64).expand(2, 5, 12)
    actual = with_gradients(case.product(x, W, B), (x, B), ones)
    assert_same(actual, with_gradients(case.reference(x, W, B), (x, B), ones))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    x, W, B = case.operands(6, 4, 2, (3,))
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, B, bias: case.product(x, W, B, bias), (x, B, bias))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("wanted", ["x", "B", ""])
def test_only_wanted_gradients(case, wanted):
    x, W, B = case.operands(12, 8, 4)
    x.requires_grad_(wanted == "x")
    B.requires_grad_(wanted == "B")
    y = case.product(x, W, B)
    assert y.requires_grad == bool(wanted)
    if wanted:
        leaf = x if wanted == "x" else B
        assert_same(with_gradients(y, leaf), with_gradients(case.reference(x, W, B), leaf))
        case.product(x, W, B).sum().backward()
        assert (x.grad is None, B.grad is None) == (wanted != "x", wanted != "B")


@pytest.mark.parametrize("case", CUSTOM, ids=str)
def test_unwanted_gradients_cost_no_products(case):
    x, W, B = case.operands(128, 64, 32, lead=(1000,))
    flops = {}
    for wanted in ((x, B), (x,), (B,)):
        for leaf in (x, B):
            leaf.requires_grad_(any(leaf is w for w in wanted))
        with FlopCounterMode(display=False) as counter:
            case.product(x, W, B).sum().backward()
        flops[tuple("x" if w is x else "B" for w in wanted)] = counter.get_total_flops()
    large, thin = 2 * 1000 * 128 * 64, 2 * 1000 * (128 if case.grouping in ("left", "miss") else 64) * 32
    thin *= 2 if case.grouping == "free" else 1  # every second row of blocks has matrices of its own
    build = 2 * 128 * 64 * 32
    if case.strategy == "factored":
        # What goes through the input needs W^T g for dB too, left and miss don't.
        for_B = (1 if case.grouping in ("left", "miss") else 2) * large
        x_too, x_alone, B_alone = (6, 4, 4) if case.form == "unconstrained" else (3, 2, 2)
        expected = 2 * large + x_too * thin, 2 * large + x_alone * thin, for_B + B_alone * thin
    else:
        builds = {"hadamard": (0, 0, 0)}.get(case.form, (4, 2, 3) if case.grouping == "free" else (3, 2, 2))
        expected = tuple(count * large + more * build for count, more in zip((3, 2, 2), builds))
    assert tuple(flops[wanted] for wanted in (("x", "B"), ("x",), ("B",))) == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_weight_only(case):
    x, W, B = case.operands(12, 8, 4)
    with pytest.raises(AssertionError, match="frozen"):
        case.product(x, W.requires_grad_(), B)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_may_be_changed_in_place(case):
    x, W, B = case.operands(12, 8, 4)
    actual = with_gradients(case.product(x, W, B).mul_(3).relu_(), (x, B))
    assert_same(actual, with_gradients((case.reference(x, W, B) * 3).relu(), (x, B)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inside_a_checkpoint(case):
    x, W, B = case.operands(12, 8, 4, dtype=torch.float32)
    block = lambda x: torch.tanh(case.product(torch.sin(x), W, B)) * 2
    plain = with_gradients(block(x), (x, B))
    assert_same(with_gradients(checkpoint(block, x, use_reentrant=False), (x, B)), plain, rtol=0, atol=0)


# Precision


@pytest.mark.parametrize("size", [(512, 512, 64), (1024, 512, 32), (256, 1024, 64)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_contribution(case, size):
    """A small B drowns in the rounding of y, so y(B) - y(0) is compared with what B contributes in fp64.

    Rounding y alone costs 2.0% at in = 512 and 1.0% at 2048: the contribution grows with the number of inputs.
    """
    product = case.product
    x, _, B = case.operands(*size, lead=(64,), dtype=torch.bfloat16, std=5e-3)
    W = (torch.randn(size[:2]) * size[1] ** -0.5).bfloat16()
    wide = [t.detach().double() for t in (x, W, B)]
    relative_error = lambda actual, expected: ((actual.double() - expected).norm() / expected.norm()).item()
    g = torch.randn(64, size[0]).bfloat16()

    contribution = product(x, W, B).double() - product(x, W, torch.zeros_like(B)).double()
    assert relative_error(contribution, case.reference(*wide) - F.linear(*wide[:2])) <= 0.03

    wide[0].requires_grad_(), wide[2].requires_grad_()
    _, dx, dB = with_gradients(case.reference(*wide), (wide[0], wide[2]), g.double())
    _, dx16, dB16 = with_gradients(product(x, W, B), (x, B), g)
    assert relative_error(dx16, dx) <= 0.005 and relative_error(dB16, dB) <= 0.005


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case, weight_dtype):
    x, W, B = case.operands(64, 32, 16, dtype=torch.float32, std=0.1)
    W.data = W.data.to(weight_dtype)
    bias = torch.randn(64)
    with torch.autocast("cpu", torch.bfloat16):
        linear = F.linear(x, W, bias)
        y = case.product(x, W, B, bias)
    assert y.dtype == linear.dtype == torch.bfloat16
    actual = with_gradients(y, (x, B))
    assert actual[1].dtype == actual[2].dtype == torch.float32

    x16, W16, B16, bias16 = (t.detach().bfloat16() for t in (x, W, B, bias))
    x16.requires_grad_(), B16.requires_grad_()
    same = with_gradients(case.product(x16, W16, B16, bias16), (x16, B16))
    assert_same(actual, [t.to(a.dtype) for t, a in zip(same, actual)], rtol=0, atol=0)


@pytest.mark.parametrize("case", CUSTOM, ids=str)
def test_autocast_state_of_backward_does_not_matter(case):
    x, W, B = case.operands(64, 32, 16, dtype=torch.float32)
    plain = with_gradients(case.product(x, W, B), (x, B))
    y = case.product(x, W, B)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(with_gradients(y, (x, B)), plain, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_leaves_fp64_alone(case):
    x, W, B = case.operands(12, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.product(x, W, B).dtype == F.linear(x, W).dtype == torch.float64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_bone_on_bf16_weight(case):
    x, W, B = case.operands(64, 32, 16, dtype=torch.bfloat16)
    wide = B.detach().float().requires_grad_()
    assert_same(
        with_gradients(case.product(x, W, wide), (x, wide)),
        [t.float() if t.shape == B.shape else t for t in with_gradients(case.product(x, W, B), (x, B))],
        rtol=0, atol=0,
    )


# What is kept and built


@pytest.mark.parametrize("case", CUSTOM, ids=str)
def test_keeps_only_its_operands(case):
    x, W, B = case.operands(12, 8, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.product(x, W, B, torch.randn(12, dtype=x.dtype))
    assert kept[1] is W and kept[2] is B and len(kept) == 3
    if case.grouping == "miss":
        assert_same([kept[0]], [x.unflatten(-1, (-1, 4)).sum(-2).flatten(0, 1)])
    elif case.grouping == "left":
        wanted = F.linear(x, W).unflatten(-1, (-1, 4)) + x.unflatten(-1, (-1, 4)).sum(-2, keepdim=True)
        assert_same([kept[0]], [wanted.flatten(0, 1).transpose(0, 1)])
    else:
        assert kept[0].data_ptr() == x.data_ptr()
    product = case.product(x, W, B).grad_fn.next_functions[0][0]
    assert product.saved_tensors[1] is W and product.saved_tensors[2] is B


@pytest.mark.parametrize("strategy", ["materialized", "checkpointed"])
@pytest.mark.parametrize("pair", [pair for pair in STRATEGIES["materialized"] if pair[0] != "free"], ids="-".join)
def test_what_the_papers_forms_keep(pair, strategy):
    """W', and for a product with W's blocks a copy of these."""
    grouping, form = pair
    x, W, B = operands(grouping, 256, 192, 16, lead=(8,), form=form)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        resolve(strategy, grouping, form)(x, W, B)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    storages.pop(W.data_ptr(), None)
    kept_weights = 0 if strategy == "checkpointed" else 1 if grouping == "miss" or form == "hadamard" else 2
    assert sum(size == W.nbytes for size in storages.values()) == kept_weights
    assert max(storages.values()) <= W.nbytes


@pytest.mark.parametrize("case", CUSTOM + [case for case in CASES if case.strategy == "checkpointed"], ids=str)
def test_parameters_freed_after_forward_and_gathered_elsewhere(case):
    """What ZeRO-3 does to partitioned parameters."""
    x, W, B = case.operands(12, 8, 4)
    expected = with_gradients(case.reference(x, W, B), (x, B))
    y = case.product(x, W, B)
    whole = [p.data.clone() for p in (W, B)]
    for p in (W, B):
        p.data.fill_(float("nan"))
        p.data = torch.empty(0, dtype=p.dtype)
    for p, data in zip((W, B), whole):
        p.data = data
    assert_same(with_gradients(y, (x, B)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", [pair for pair in STRATEGIES["factored"] if pair[0] != "free"], ids="-".join)
def test_factored_builds_nothing_of_the_weights_size(pair, dtype):
    grouping, form = pair
    x, W, B = operands(grouping, 256, 192, 16, lead=(8,), dtype=dtype, form=form)
    with Allocations() as allocations:
        resolve("factored", grouping, form)(x, W, B).sum().backward()
    assert max(allocations.numels) == B.numel() < W.numel() / 4


@pytest.mark.parametrize("groups, part", [(6, 16), (12, 16), (24, 2), (48, 4)])
def test_factored_free_copies_a_part_of_the_weight_at_most(groups, part):
    """The matrices of a row of blocks where 12 blocks of inputs have them all in turn; else that part of W that has the same ones."""
    x, W, B = operands("free", 256, 192, 16, lead=(8,), groups=groups)
    with Allocations() as allocations:
        resolve("factored", "free")(x, W, B).sum().backward()
    assert max(allocations.numels) == max(W.numel() // part, B.numel())


def test_fused_row_builds_a_few_weights():
    x, W, B = operands("row", 256, 192, 16, lead=(8,))
    with Allocations() as allocations:
        y = resolve("fused", "row")(x, W, B)
    assert sum(numel >= W.numel() for numel in allocations.numels) == 1
    with Allocations() as allocations:
        y.sum().backward()
    # W' for dx, then for dB the gradient of W' and, since the blocks of a matrix lie apart in memory, a copy of W.
    assert sum(numel >= W.numel() for numel in allocations.numels) == 3
    assert max(allocations.numels) == W.numel()


@pytest.mark.parametrize("form", ["affine", "unconstrained"])
@pytest.mark.parametrize("blocks_of_inputs, blocks_of_outputs", [(1, 1), (2, 3), (5, 4), (100, 100)])
def test_fused_col_in_slabs(monkeypatch, blocks_of_inputs, blocks_of_outputs, form):
    """Slabs of one block, some with a smaller last one, and of the whole weight give the same; only they are built."""
    out_features, in_features, r = 80, 112, 16
    x, W, B = operands("col", out_features, in_features, r, form=form)
    expected = with_gradients(bone_linear(x, W, B, "col", None, form), (x, B))
    sizes = {1: blocks_of_inputs * r * out_features, 0: blocks_of_outputs * r * in_features}
    monkeypatch.setattr(fused, "slab_size", lambda W, dim, r, parts=1: min(sizes[dim] // W.shape[1 - dim], W.shape[dim]))
    monkeypatch.setattr(fused, "WORKSPACE_BYTES", W.nbytes if blocks_of_inputs * r >= in_features else 0)
    with Allocations() as allocations:
        actual = with_gradients(resolve("fused", "col", form)(x, W, B), (x, B))
    assert_same(actual, expected)
    # For dx, a slab and its copy.
    slabs = min(max(2 * sizes[1], sizes[0]), 2 * W.numel())
    assert max(allocations.numels) <= max(x.numel(), actual[0].numel(), B.numel(), slabs)


SLABS = [pair for pair in STRATEGIES["fused"] if pair[1] == "hadamard" or pair[0] == "free"]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("pair", SLABS, ids="-".join)
def test_fused_in_slabs_of_any_size(monkeypatch, pair, blocks):
    grouping, form = pair
    x, W, B = operands(grouping, 80, 112, 16, form=form)
    bias = torch.randn(80, dtype=x.dtype, requires_grad=True)
    expected = with_gradients(bone_linear(x, W, B, grouping, bias, form), (x, B, bias))
    monkeypatch.setattr(fused, "slab_size", lambda W, dim, r, parts=1: min(blocks * r, W.shape[dim]))
    with Allocations() as allocations:
        actual = with_gradients(resolve("fused", grouping, form)(x, W, B, bias), (x, B, bias))
    assert_same(actual, expected)
    # free's matrices are repeated for the blocks of a slab, in whole turns.
    matrices = blocks * 16 * 112 * (2 if form == "unconstrained" else 1) + 2 * B.numel()
    assert max(allocations.numels) <= max(matrices if grouping == "free" else blocks * 16 * 112, x.numel(), B.numel(), actual[0].numel())


@pytest.mark.parametrize("bytes_at_most", [1, 12000, 30000, 60000, 2**25])
@pytest.mark.parametrize("pair", SLABS, ids="-".join)
def test_fused_in_slabs_bounds_what_it_builds(monkeypatch, pair, bytes_at_most):
    grouping, form = pair
    monkeypatch.setattr(fused, "WORKSPACE_BYTES", bytes_at_most)
    x, W, B = operands(grouping, 256, 192, 8, lead=(2,), dtype=torch.bfloat16, form=form)
    with LiveMemory() as live:
        live.claim("given", (x, W, B))
        given_bytes = live.total_bytes
        y = resolve("fused", grouping, form)(x, W, B)
        forward_bytes = live.peak_bytes - given_bytes
        live.reset_peak()
        y.sum().backward()
    small_bytes = 4 * (x.nbytes + y.nbytes + B.nbytes)
    parts = fused.Slabs(grouping, form).parts
    most_bytes = min(max(bytes_at_most, parts * 8 * 256 * 2), parts * W.nbytes) + small_bytes
    assert forward_bytes <= most_bytes and live.peak_bytes - given_bytes <= most_bytes


@pytest.mark.parametrize("bytes_at_most", [1, 3000, 5000, 12000, 30000, 2**25])
def test_fused_col_bounds_what_it_builds(monkeypatch, bytes_at_most):
    monkeypatch.setattr(fused, "WORKSPACE_BYTES", bytes_at_most)
    x, W, B = operands("col", 256, 192, 8, lead=(2,), dtype=torch.bfloat16)
    block_bytes = 8 * 256 * 2
    with LiveMemory() as live:
        live.claim("given", (x, W, B))
        given_bytes = live.total_bytes
        y = resolve("fused", "col")(x, W, B)
        forward_bytes = live.peak_bytes - given_bytes
        live.reset_peak()
        y.sum().backward()
    small_bytes = 4 * (x.nbytes + y.nbytes)
    assert forward_bytes <= min(max(bytes_at_most, block_bytes), W.nbytes) + small_bytes
    assert live.peak_bytes - given_bytes <= min(max(bytes_at_most, 2 * block_bytes), 2 * W.nbytes) + B.nbytes + small_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors(case):
    with FakeTensorMode():
        x, W, B = case.operands(4096, 11008, 64, lead=(1, 2048), dtype=torch.bfloat16)
        y = case.product(x, W, B)
        y.sum().backward()
        assert y.shape == (1, 2048, 4096) and x.grad.shape == x.shape and B.grad.shape == B.shape
        block = checkpoint(case.product, x, W, B, use_reentrant=False)
        block.sum().backward()


def test_meta_tensors():
    with torch.device("meta"):
        x, W, B = operands("row", 64, 32, 16)
        resolve("factored", "row")(x, W, B).sum().backward()
    assert x.grad.shape == x.shape and B.grad.shape == B.shape


# Names


def test_unknown_names():
    with pytest.raises(InjectionError, match="'factored'.*'col'.*materialized, checkpointed, fused, auto"):
        resolve("factored", "col")
    with pytest.raises(InjectionError, match="'factored'.*'row', form 'hadamard'.*materialized, checkpointed, fused, auto"):
        resolve("factored", "row", "hadamard")
    with pytest.raises(InjectionError, match="'fast'.*factored"):
        resolve("fast", "row")
    with pytest.raises(InjectionError, match="'fused'.*'left'.*materialized, checkpointed, factored, auto"):
        resolve("fused", "left")
    with pytest.raises(InjectionError, match="'right'.*row, col, left, free, miss"):
        resolve("auto", "right")
    with pytest.raises(InjectionError, match="form 'affin'.*affine, hadamard, unconstrained"):
        resolve("auto", "row", "affin")
    for grouping in ("left", "miss"):
        with pytest.raises(InjectionError, match=f"form 'hadamard' .*'{grouping}', choose affine"):
            resolve("auto", grouping, "hadamard")


def test_auto_is_the_cheapest():
    assert STRATEGIES["auto"].keys() == STRATEGIES["materialized"].keys() == STRATEGIES["checkpointed"].keys()
    for pair in [("row", "affine"), ("row", "unconstrained"), ("left", "affine"), ("miss", "affine")]:
        assert resolve("auto", *pair) is resolve("factored", *pair)
    for pair in [("col", "affine"), ("col", "unconstrained"), *((grouping, "hadamard") for grouping in ("row", "col", "free"))]:
        assert resolve("auto", *pair) is resolve("fused", *pair)


# The layer


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer(case, bias):
    linear = nn.Linear(8, 12, bias=bias).eval()
    x = torch.randn(2, 5, 8, requires_grad=True)
    before = linear(x)
    layer = BoneLinear(linear, 4, case.grouping, case.strategy, form=case.form, groups=groups_of(case.grouping, 12, 4))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bone"]
    assert set(layer.state_dict()) == {"weight", "bone"} | ({"bias"} if bias else set())
    assert_same([layer(x)], [before], rtol=1e-6, atol=1e-6)

    nn.init.normal_(layer.bone)
    expected = case.reference(x, layer.weight, layer.bone, layer.bias)
    assert_same([layer(x), F.linear(x, layer.merged_weight(), layer.bias)], [expected] * 2, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer.bone.grad.norm() > 0 and layer.weight.grad is None
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same([copied(x)], [layer(x)], rtol=0, atol=0)


def test_layer_dtypes():
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    assert BoneLinear(linear, 16).bone.dtype == torch.bfloat16
    layer = BoneLinear(linear, 16, dtype=torch.float32)
    assert layer.bone.dtype == torch.float32 and layer(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    nn.init.normal_(layer.bone, std=5e-3)
    assert layer.merged_weight().dtype == torch.float32
    exact = adapted_weight(layer.weight.double(), layer.bone.double(), "row")
    assert_same([layer.merged_weight().double()], [exact], rtol=1e-6, atol=1e-6)
    assert layer.merged_weight(torch.bfloat16).equal(layer.merged_weight().bfloat16())


def test_layer_over_a_partitioned_weight():
    """Under ZeRO-3 the weight is empty when the layer is made."""
    linear = nn.Linear(8, 12)
    whole, linear.weight.data = linear.weight.data, torch.empty(0)
    layer = BoneLinear(linear, 4, "col")
    layer.weight.data = whole
    assert layer.bone.shape == (3, 4, 4) and layer(torch.randn(5, 8)).shape == (5, 12)


@pytest.mark.parametrize("grouping, groups", [("row", None), ("col", None), ("left", None), ("free", 1)])
@pytest.mark.parametrize("r", [0, 3, 8])
def test_layer_refuses_a_block_that_does_not_fit(grouping, groups, r):
    with pytest.raises(InjectionError, match=rf"r={r} .*\(12, 8\).*: 4, 2, 1$"):
        BoneLinear(nn.Linear(8, 12), r, grouping, groups=groups)


@pytest.mark.parametrize("how, says", [
    ({"r": 9, "grouping": "miss"}, r"r=9 .*\(12, 8\); 1 to 8 do"), ({"r": 0, "grouping": "miss"}, r"r=0 .*1 to 8 do"),
    ({"r": 4, "grouping": "free", "groups": 4}, r"groups=4 does not divide the 6 blocks of 4 x 4 .*\(12, 8\)"),
    ({"r": 4, "grouping": "free"}, "'free' with groups=None"), ({"r": 4, "groups": 2}, "'row' with groups=2.*for 'free'"),
    ({"r": 4, "grouping": "left", "form": "hadamard"}, "form 'hadamard'.*'left'")], ids=str)
def test_layer_refuses_what_does_not_go_together(how, says):
    with pytest.raises(InjectionError, match=says):
        BoneLinear(nn.Linear(8, 12), **how)


def test_layer_repr():
    assert repr(BoneLinear(nn.Linear(8, 12), 4)) == (
        "BoneLinear(in_features=8, out_features=12, bias=True, r=4, grouping=row, strategy=auto)"
    )
    layer = BoneLinear(nn.Linear(8, 12), 4, "free", form="hadamard", groups=3)
    assert "grouping=free, groups=3, form=hadamard, strategy=auto" in repr(layer)


@pytest.mark.parametrize("strategy", [strategy for strategy, products in STRATEGIES.items() if ("col", "affine") in products])
@pytest.mark.parametrize("out_features, in_features", [(48, 48), (96, 48), (48, 96)])
def test_col_is_what_peft_calls_bat(strategy, out_features, in_features):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(in_features, out_features))
    ours = BoneLinear(copy.deepcopy(base[0]), 16, "col", strategy)
    nn.init.normal_(ours.bone, std=0.1)
    theirs = peft.get_peft_model(base, peft.MissConfig(r=16, init_weights="bat", target_modules=["0"]))
    (block,) = [p for name, p in theirs.named_parameters() if "miss_block" in name]
    assert block.shape == ours.bone.shape
    block.data.copy_(ours.bone.data)
    x = torch.randn(2, 7, in_features, requires_grad=True)
    actual, expected = with_gradients(ours(x), (x, ours.bone)), with_gradients(theirs(x), (x, block))
    assert_same(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [strategy for strategy, products in STRATEGIES.items() if ("miss", "affine") in products])
@pytest.mark.parametrize("out_features, in_features, r", [(48, 48, 16), (40, 48, 12), (24, 50, 16), (7, 5, 3), (5, 7, 7)])
def test_miss_is_what_peft_does_by_default(strategy, out_features, in_features, r):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(in_features, out_features))
    ours = BoneLinear(copy.deepcopy(base[0]), r, "miss", strategy)
    nn.init.normal_(ours.bone, std=0.1)
    theirs = peft.get_peft_model(base, peft.MissConfig(r=r, target_modules=["0"]))
    (block,) = [p for name, p in theirs.named_parameters() if "miss_block" in name]
    assert block.shape == ours.bone.shape
    block.data.copy_(ours.bone.data)
    x = torch.randn(2, 7, in_features, requires_grad=True)
    actual, expected = with_gradients(ours(x), (x, ours.bone)), with_gradients(theirs(x), (x, block))
    assert_same(actual, expected, rtol=1e-5, atol=1e-5)
    assert_same([ours.merged_weight()], [theirs.merge_and_unload()[0].weight], rtol=1e-6, atol=1e-6)
