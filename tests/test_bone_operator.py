import copy
import pickle

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
    GROUPINGS,
    STRATEGIES,
    BoneLinear,
    adapted_weight,
    bone_linear,
    bone_shape,
    fits,
    largest_common_block,
    resolve,
    strategies,
)
from bone_ds.errors import InjectionError
from bone_ds.live import LiveMemory

PAIRS = [(grouping, strategy) for strategy, products in STRATEGIES.items() for grouping in products]
CUSTOM = [("row", "factored"), ("left", "factored"), ("row", "fused"), ("col", "fused")]
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


def operands(grouping, out_features, in_features, r, lead=(2, 5), dtype=torch.float64, std=1.0):
    x = torch.randn(*lead, in_features, dtype=dtype, requires_grad=True)
    W = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype), requires_grad=False)
    B = nn.Parameter(torch.randn(bone_shape(grouping, out_features, in_features, r), dtype=dtype) * std)
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
    for grouping in GROUPINGS:
        assert fits(grouping, 11008, 4096, 64) and fits(grouping, 6, 4, 1)
        assert not fits(grouping, 11008, 4096, 512) and not fits(grouping, 4096, 11008, 512)
        assert not fits(grouping, 8, 8, 0) and not fits(grouping, 8, 8, 16)


def test_largest_common_block():
    assert largest_common_block([(11008, 4096), (4096, 4096)])[:3] == [256, 128, 64]
    assert largest_common_block([(6, 4), (10, 8)]) == [2, 1]
    assert largest_common_block([(7, 5)]) == [1]
    assert largest_common_block([]) == []


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_adapted_weight_block_by_block(grouping):
    out_features, in_features, r = 12, 8, 4
    _, W, B = operands(grouping, out_features, in_features, r)
    expected = torch.zeros_like(W)
    for a in range(out_features // r):
        for b in range(in_features // r):
            here = slice(a * r, a * r + r), slice(b * r, b * r + r)
            own = B[b if grouping == "row" else a]
            expected[here] = W[here] + (own @ W[here] if grouping == "left" else W[here] @ own) + own
    assert_same([adapted_weight(W, B, grouping)], [expected])


def test_paper_parameter_counts_llama2_7b():
    shapes = 32 * ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
    count = lambda grouping, r: sum(torch.Size(bone_shape(grouping, o, i, r)).numel() for o, i in shapes)
    assert [count("col", r) for r in (16, 32, 64, 128)] == [21_757_952, 43_515_904, 87_031_808, 174_063_616]
    assert count("row", 64) == 72_876_032


# Strategies against the reference


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_value_and_gradients(pair, size):
    grouping, strategy = pair
    x, W, B = operands(grouping, *size)
    bias = torch.randn(size[0], dtype=x.dtype, requires_grad=True)
    product = resolve(strategy, grouping)
    expected = with_gradients(bone_linear(x, W, B, grouping, bias), (x, B, bias))
    assert_same(with_gradients(product(x, W, B, bias), (x, B, bias)), expected)
    without_bias = with_gradients(bone_linear(x, W, B, grouping), (x, B))
    assert_same(with_gradients(product(x, W, B), (x, B)), without_bias)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3,), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_leading_dims(pair, lead):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4, lead)
    actual = with_gradients(resolve(strategy, grouping)(x, W, B), (x, B))
    assert_same(actual, with_gradients(bone_linear(x, W, B, grouping), (x, B)))
    assert actual[0].shape == (*lead, 12)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_not_contiguous(pair):
    grouping, strategy = pair
    _, _, B = operands(grouping, 12, 8, 4)
    W = torch.randn(8, 12, dtype=torch.float64).t()
    g = torch.randn(12, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    permuted = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    expanded = torch.randn(5, 1, 8, dtype=torch.float64).expand(5, 2, 8).transpose(0, 1)
    strided = torch.randn(2, 5, 16, dtype=torch.float64)[..., ::2]
    for x in (permuted, expanded, strided):
        assert not x.is_contiguous()
        x.requires_grad_()
        actual = with_gradients(resolve(strategy, grouping)(x, W, B), (x, B), g)
        assert_same(actual, with_gradients(bone_linear(x, W, B, grouping), (x, B), g))
    ones = torch.ones((), dtype=torch.float64).expand(2, 5, 12)
    actual = with_gradients(resolve(strategy, grouping)(x, W, B), (x, B), ones)
    assert_same(actual, with_gradients(bone_linear(x, W, B, grouping), (x, B), ones))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_gradcheck(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 6, 4, 2, (3,))
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, B, bias: resolve(strategy, grouping)(x, W, B, bias), (x, B, bias))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("wanted", ["x", "B", ""])
def test_only_wanted_gradients(pair, wanted):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    x.requires_grad_(wanted == "x")
    B.requires_grad_(wanted == "B")
    y = resolve(strategy, grouping)(x, W, B)
    assert y.requires_grad == bool(wanted)
    if wanted:
        leaf = x if wanted == "x" else B
        assert_same(with_gradients(y, leaf), with_gradients(bone_linear(x, W, B, grouping), leaf))
        resolve(strategy, grouping)(x, W, B).sum().backward()
        assert (x.grad is None, B.grad is None) == (wanted != "x", wanted != "B")


@pytest.mark.parametrize("pair", CUSTOM, ids="-".join)
def test_unwanted_gradients_cost_no_products(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 128, 64, 32, lead=(1000,))
    flops = {}
    for wanted in ((x, B), (x,), (B,)):
        for leaf in (x, B):
            leaf.requires_grad_(any(leaf is w for w in wanted))
        with FlopCounterMode(display=False) as counter:
            resolve(strategy, grouping)(x, W, B).sum().backward()
        flops[tuple("x" if w is x else "B" for w in wanted)] = counter.get_total_flops()
    big, thin = 2 * 1000 * 128 * 64, 2 * 1000 * (128 if grouping == "left" else 64) * 32
    if strategy == "factored":
        # row needs W^T g for dB too, left does not.
        for_B = (1 if grouping == "left" else 2) * big + 2 * thin
        assert flops == {("x", "B"): 2 * big + 3 * thin, ("x",): 2 * big + 2 * thin, ("B",): for_B}
    else:
        build = 2 * 128 * 64 * 32
        assert flops == {("x", "B"): 3 * big + 3 * build, ("x",): 2 * big + 2 * build, ("B",): 2 * big + 2 * build}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_frozen_weight_only(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    with pytest.raises(AssertionError, match="frozen"):
        resolve(strategy, grouping)(x, W.requires_grad_(), B)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_result_may_be_changed_in_place(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    actual = with_gradients(resolve(strategy, grouping)(x, W, B).mul_(3).relu_(), (x, B))
    assert_same(actual, with_gradients((bone_linear(x, W, B, grouping) * 3).relu(), (x, B)))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_inside_a_checkpoint(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4, dtype=torch.float32)
    block = lambda x: torch.tanh(resolve(strategy, grouping)(torch.sin(x), W, B)) * 2
    plain = with_gradients(block(x), (x, B))
    assert_same(with_gradients(checkpoint(block, x, use_reentrant=False), (x, B)), plain, rtol=0, atol=0)


# Precision


@pytest.mark.parametrize("size", [(512, 512, 64), (1024, 512, 32), (256, 1024, 64)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_bf16_contribution(pair, size):
    """A small B drowns in the rounding of y, so y(B) - y(0) is compared with what B contributes in fp64.

    Rounding y alone costs 2.0% at in = 512 and 1.0% at 2048: the contribution grows with the number of inputs.
    """
    grouping, strategy = pair
    product = resolve(strategy, grouping)
    x, _, B = operands(grouping, *size, lead=(64,), dtype=torch.bfloat16, std=5e-3)
    W = (torch.randn(size[:2]) * size[1] ** -0.5).bfloat16()
    wide = [t.detach().double() for t in (x, W, B)]
    relative_error = lambda actual, expected: ((actual.double() - expected).norm() / expected.norm()).item()
    g = torch.randn(64, size[0]).bfloat16()

    contribution = product(x, W, B).double() - product(x, W, torch.zeros_like(B)).double()
    assert relative_error(contribution, bone_linear(*wide, grouping) - F.linear(*wide[:2])) <= 0.03

    wide[0].requires_grad_(), wide[2].requires_grad_()
    _, dx, dB = with_gradients(bone_linear(*wide, grouping), (wide[0], wide[2]), g.double())
    _, dx16, dB16 = with_gradients(product(x, W, B), (x, B), g)
    assert relative_error(dx16, dx) <= 0.005 and relative_error(dB16, dB) <= 0.005


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(pair, weight_dtype):
    grouping, strategy = pair
    x, W, B = operands(grouping, 64, 32, 16, dtype=torch.float32, std=0.1)
    W.data = W.data.to(weight_dtype)
    bias = torch.randn(64)
    with torch.autocast("cpu", torch.bfloat16):
        linear = F.linear(x, W, bias)
        y = resolve(strategy, grouping)(x, W, B, bias)
    assert y.dtype == linear.dtype == torch.bfloat16
    actual = with_gradients(y, (x, B))
    assert actual[1].dtype == actual[2].dtype == torch.float32

    x16, W16, B16, bias16 = (t.detach().bfloat16() for t in (x, W, B, bias))
    x16.requires_grad_(), B16.requires_grad_()
    same = with_gradients(resolve(strategy, grouping)(x16, W16, B16, bias16), (x16, B16))
    assert_same(actual, [t.to(a.dtype) for t, a in zip(same, actual)], rtol=0, atol=0)


@pytest.mark.parametrize("pair", CUSTOM, ids="-".join)
def test_autocast_state_of_backward_does_not_matter(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 64, 32, 16, dtype=torch.float32)
    plain = with_gradients(resolve(strategy, grouping)(x, W, B), (x, B))
    y = resolve(strategy, grouping)(x, W, B)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(with_gradients(y, (x, B)), plain, rtol=0, atol=0)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_autocast_leaves_fp64_alone(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert resolve(strategy, grouping)(x, W, B).dtype == F.linear(x, W).dtype == torch.float64


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_fp32_bone_on_bf16_weight(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 64, 32, 16, dtype=torch.bfloat16)
    wide = B.detach().float().requires_grad_()
    assert_same(
        with_gradients(resolve(strategy, grouping)(x, W, wide), (x, wide)),
        [t.float() if t.shape == B.shape else t for t in with_gradients(resolve(strategy, grouping)(x, W, B), (x, B))],
        rtol=0, atol=0,
    )


# What is kept and built


@pytest.mark.parametrize("pair", CUSTOM, ids="-".join)
def test_keeps_only_its_operands(pair):
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        resolve(strategy, grouping)(x, W, B, torch.randn(12, dtype=x.dtype))
    assert kept[1] is W and kept[2] is B and len(kept) == 3
    if grouping == "left":
        wanted = F.linear(x, W).unflatten(-1, (-1, 4)) + x.unflatten(-1, (-1, 4)).sum(-2, keepdim=True)
        assert_same([kept[0]], [wanted.flatten(0, 1).transpose(0, 1)])
    else:
        assert kept[0].data_ptr() == x.data_ptr()
    product = resolve(strategy, grouping)(x, W, B).grad_fn.next_functions[0][0]
    assert product.saved_tensors[1] is W and product.saved_tensors[2] is B


@pytest.mark.parametrize("strategy, kept_weights", [("materialized", 2), ("checkpointed", 0)])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_what_the_papers_forms_keep(grouping, strategy, kept_weights):
    x, W, B = operands(grouping, 256, 192, 16, lead=(8,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        resolve(strategy, grouping)(x, W, B)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    storages.pop(W.data_ptr(), None)
    assert sum(size == W.nbytes for size in storages.values()) == kept_weights
    assert max(storages.values()) <= W.nbytes


@pytest.mark.parametrize("pair", CUSTOM + [(grouping, "checkpointed") for grouping in GROUPINGS], ids="-".join)
def test_parameters_freed_after_forward_and_gathered_elsewhere(pair):
    """What ZeRO-3 does to partitioned parameters."""
    grouping, strategy = pair
    x, W, B = operands(grouping, 12, 8, 4)
    expected = with_gradients(bone_linear(x, W, B, grouping), (x, B))
    y = resolve(strategy, grouping)(x, W, B)
    whole = [p.data.clone() for p in (W, B)]
    for p in (W, B):
        p.data.fill_(float("nan"))
        p.data = torch.empty(0, dtype=p.dtype)
    for p, data in zip((W, B), whole):
        p.data = data
    assert_same(with_gradients(y, (x, B)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouping", STRATEGIES["factored"])
def test_factored_builds_nothing_of_the_weights_size(grouping, dtype):
    x, W, B = operands(grouping, 256, 192, 32, lead=(8,), dtype=dtype)
    with Allocations() as allocations:
        resolve("factored", grouping)(x, W, B).sum().backward()
    assert max(allocations.numels) == B.numel() < W.numel() / 4


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


@pytest.mark.parametrize("blocks_of_inputs, blocks_of_outputs", [(1, 1), (2, 3), (5, 4), (100, 100)])
def test_fused_col_in_slabs(monkeypatch, blocks_of_inputs, blocks_of_outputs):
    """Slabs of one block, some with a smaller last one, and of the whole weight give the same; only they are built."""
    out_features, in_features, r = 80, 112, 16
    x, W, B = operands("col", out_features, in_features, r)
    expected = with_gradients(bone_linear(x, W, B, "col"), (x, B))
    sizes = {1: blocks_of_inputs * r * out_features, 0: blocks_of_outputs * r * in_features}
    slab_size = lambda self, W, dim, r, parts=1: min(sizes[dim] // W.shape[1 - dim], W.shape[dim])
    monkeypatch.setattr(strategies._FusedCol, "slab_size", slab_size)
    monkeypatch.setattr(strategies, "WORKSPACE_BYTES", W.nbytes if blocks_of_inputs * r >= in_features else 0)
    with Allocations() as allocations:
        actual = with_gradients(resolve("fused", "col")(x, W, B), (x, B))
    assert_same(actual, expected)
    # For dx, a slab and its copy.
    slabs = min(max(2 * sizes[1], sizes[0]), 2 * W.numel())
    assert max(allocations.numels) <= max(x.numel(), actual[0].numel(), B.numel(), slabs)


@pytest.mark.parametrize("bytes_at_most", [1, 3000, 5000, 12000, 30000, 2**25])
def test_fused_col_bounds_what_it_builds(monkeypatch, bytes_at_most):
    monkeypatch.setattr(strategies, "WORKSPACE_BYTES", bytes_at_most)
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


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_fake_tensors(pair):
    grouping, strategy = pair
    with FakeTensorMode():
        x, W, B = operands(grouping, 4096, 11008, 64, lead=(1, 2048), dtype=torch.bfloat16)
        y = resolve(strategy, grouping)(x, W, B)
        y.sum().backward()
        assert y.shape == (1, 2048, 4096) and x.grad.shape == x.shape and B.grad.shape == B.shape
        block = checkpoint(resolve(strategy, grouping), x, W, B, use_reentrant=False)
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
    with pytest.raises(InjectionError, match="'fast'.*factored"):
        resolve("fast", "row")
    with pytest.raises(InjectionError, match="'fused'.*'left'.*materialized, checkpointed, factored, auto"):
        resolve("fused", "left")
    with pytest.raises(InjectionError, match="'right'.*row, col, left"):
        resolve("auto", "right")


def test_auto_is_the_cheapest():
    assert resolve("auto", "row") is resolve("factored", "row")
    assert resolve("auto", "left") is resolve("factored", "left")
    assert resolve("auto", "col") is resolve("fused", "col")


# The layer


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("bias", [True, False])
def test_layer(pair, bias):
    grouping, strategy = pair
    linear = nn.Linear(8, 12, bias=bias).eval()
    x = torch.randn(2, 5, 8, requires_grad=True)
    before = linear(x)
    layer = BoneLinear(linear, 4, grouping, strategy)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bone"]
    assert set(layer.state_dict()) == {"weight", "bone"} | ({"bias"} if bias else set())
    assert_same([layer(x)], [before], rtol=1e-6, atol=1e-6)

    nn.init.normal_(layer.bone)
    expected = bone_linear(x, layer.weight, layer.bone, grouping, layer.bias)
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


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("r", [0, 3, 8])
def test_layer_refuses_a_block_that_does_not_fit(grouping, r):
    with pytest.raises(InjectionError, match=rf"r={r} .*\(12, 8\).*: 4, 2, 1$"):
        BoneLinear(nn.Linear(8, 12), r, grouping)


def test_layer_repr():
    assert repr(BoneLinear(nn.Linear(8, 12), 4)) == (
        "BoneLinear(in_features=8, out_features=12, bias=True, r=4, grouping=row, strategy=auto)"
    )


@pytest.mark.parametrize("strategy", [strategy for strategy, products in STRATEGIES.items() if "col" in products])
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
