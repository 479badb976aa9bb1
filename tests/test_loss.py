import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bone_ds.loss import chunked_cross_entropy

T, C, V, M = 23, 8, 37, 11


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(dtype=torch.float64, sizes=(T, C, V, M)):
    t, c, v, m = sizes
    hidden = torch.randn(t, c, dtype=dtype, requires_grad=True)
    head = torch.randn(v, c, dtype=dtype)
    return hidden, head, torch.randperm(t)[:m].sort().values, torch.randint(v, (m,))


def whole(hidden, head, positions, labels):
    return F.cross_entropy(F.linear(hidden, head)[positions], labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, M, M + 5])
def test_equals_cross_entropy(chunk):
    hidden, *rest = operands()
    actual, expected = chunked_cross_entropy(hidden, *rest, chunk), whole(hidden, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    (actual_grad,), (expected_grad,) = (torch.autograd.grad(loss * 0.37, hidden) for loss in (actual, expected))
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    hidden, *rest = operands(sizes=(5, 3, 7, 4))
    assert torch.autograd.gradcheck(lambda hidden: chunked_cross_entropy(hidden, *rest, 3), hidden)


def test_a_position_may_bear_two_labels():
    hidden, head, _, labels = operands()
    positions = torch.tensor([4] * M)
    (actual,) = torch.autograd.grad(chunked_cross_entropy(hidden, head, positions, labels, 3), hidden)
    (expected,) = torch.autograd.grad(whole(hidden, head, positions, labels), hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_two_backwards():
    hidden, *rest = operands()
    loss = chunked_cross_entropy(hidden, *rest, 3)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert first.equal(second)


def test_extreme_logits():
    hidden, head, positions, labels = operands(torch.float32)
    loss = chunked_cross_entropy(hidden * 1e4, head, positions, labels, 3)
    torch.testing.assert_close(loss, whole(hidden * 1e4, head, positions, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_labels(dtype):
    """A rank without a label still takes part in backward."""
    leaf = torch.randn(T, C, dtype=dtype, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    loss = chunked_cross_entropy(leaf * 2, torch.randn(V, C, dtype=dtype), empty, empty, 4)
    assert loss.item() == 0 and loss.dtype == torch.float32 and loss.requires_grad
    loss.backward()
    assert leaf.grad.equal(torch.zeros_like(leaf))


def test_bf16():
    hidden, head, positions, labels = operands(torch.bfloat16, (300, 64, 1000, 200))
    wide = hidden.detach().double().requires_grad_()
    actual = chunked_cross_entropy(hidden, head, positions, labels, 64)
    expected = whole(wide, head.double(), positions, labels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)
    (actual_grad,), (expected_grad,) = torch.autograd.grad(actual, hidden), torch.autograd.grad(expected, wide)
    assert actual_grad.dtype == torch.bfloat16
    assert (actual_grad.double() - expected_grad).norm() / expected_grad.norm() < 0.02


def test_autocast_does_not_matter():
    hidden, *rest = operands(torch.float32)
    plain = chunked_cross_entropy(hidden, *rest, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = chunked_cross_entropy(hidden, *rest, 3)
    (a,), (b,) = torch.autograd.grad(plain, hidden), torch.autograd.grad(cast, hidden)
    assert plain.equal(cast) and a.equal(b)


def test_dtypes_of_hidden_and_head_may_differ():
    hidden, head, positions, labels = operands(torch.float32)
    actual = chunked_cross_entropy(hidden, head.bfloat16(), positions, labels, 3)
    torch.testing.assert_close(actual, whole(hidden, head, positions, labels), rtol=1e-2, atol=0)
    assert torch.autograd.grad(actual, hidden)[0].dtype == torch.float32


class Outputs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest_numel = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
        if not func.is_view:
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.largest_numel = max([self.largest_numel, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_holds_one_chunk_of_logits(dtype):
    hidden, *rest = operands(dtype, (64, 8, 1000, 50))
    with Outputs() as forward:
        loss = chunked_cross_entropy(hidden, *rest, 7)
    with Outputs() as backward:
        loss.backward()
    assert forward.largest_numel == 7 * 1000 and forward.products == 16
    assert backward.largest_numel == 64 * 8 and backward.products == 0


def test_keeps_only_the_gradient_of_the_labelled_positions():
    hidden, head, positions, labels = operands(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, positions, labels, 3)
    assert [(t.shape, t.dtype) for t in kept] == [((M, C), torch.bfloat16), ((M,), torch.int64)]


def test_without_grad_computes_no_gradient():
    hidden, *rest = operands()
    expected = whole(hidden, *rest)
    modes = (torch.no_grad(), hidden), (torch.inference_mode(), hidden), (torch.enable_grad(), hidden.detach())
    for mode, states in modes:
        with mode, Outputs() as outputs:
            loss = chunked_cross_entropy(states, *rest, M)
        assert outputs.products == 1 and not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, head, positions, labels = operands()
    for wrong in (V, -100):
        labels[2] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            chunked_cross_entropy(hidden, head, positions, labels, 3)


def test_fake_tensors():
    with FakeTensorMode():
        hidden = torch.empty(2048, 512, dtype=torch.bfloat16, requires_grad=True)
        head = torch.empty(65536, 512, dtype=torch.bfloat16)
        positions = labels = torch.zeros(700, dtype=torch.int64)
        chunked_cross_entropy(hidden, head, positions, labels, 256).backward()
        assert hidden.grad.shape == hidden.shape


# a trained head


def trained_head(dtype=torch.float64, sizes=(T, C, V, M)):
    hidden, head, *rest = operands(dtype, sizes)
    return hidden, head.requires_grad_(), *rest


def assert_close_gradients(actual, expected, leaves, tolerance=1e-12):
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 3, M, M + 5])
def test_gradient_of_a_trained_head(chunk):
    hidden, head, *rest = trained_head()
    actual, expected = chunked_cross_entropy(hidden, head, *rest, chunk), whole(hidden, head, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close_gradients(actual * 0.37, expected * 0.37, (hidden, head))


def test_gradcheck_of_a_trained_head():
    hidden, head, *rest = trained_head(sizes=(5, 3, 7, 4))
    assert torch.autograd.gradcheck(lambda *operands: chunked_cross_entropy(*operands, *rest, 3), (hidden, head))


def test_a_trained_head_under_frozen_hidden_states():
    hidden, head, *rest = trained_head()
    frozen = hidden.detach()
    with Outputs() as forward:
        actual = chunked_cross_entropy(frozen, head, *rest, 4)
    assert forward.products == 6
    assert_close_gradients(actual, whole(frozen, head, *rest), (head,))


def test_two_backwards_of_a_trained_head():
    hidden, head, *rest = trained_head()
    loss = chunked_cross_entropy(hidden, head, *rest, 3)
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (hidden, head))
    assert all((2 * a).equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_labels_for_a_trained_head(dtype):
    hidden, head, *_ = trained_head(dtype)
    empty = torch.zeros(0, dtype=torch.int64)
    loss = chunked_cross_entropy(hidden, head, empty, empty, 4)
    loss.backward()
    assert loss.item() == 0
    for leaf in (hidden, head):
        assert leaf.grad.equal(torch.zeros_like(leaf))


def test_a_trained_head_in_bf16_is_summed_in_fp32():
    """Over 400 chunks a sum in bf16 would lose what each adds."""
    hidden, head, positions, labels = trained_head(torch.bfloat16, (500, 32, 40, 400))
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, head)]
    actual = torch.autograd.grad(chunked_cross_entropy(hidden, head, positions, labels, 1), (hidden, head))
    expected = torch.autograd.grad(whole(*leaves, positions, labels), leaves)
    assert [grad.dtype for grad in actual] == [torch.bfloat16] * 2
    for a, b, limit in zip(actual, expected, (0.02, 0.005), strict=True):
        assert (a.double() - b).norm() / b.norm() < limit


def test_backward_does_not_touch_the_head():
    """Under ZeRO-3 its weight is there during forward alone."""
    hidden, head, *rest = trained_head()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = chunked_cross_entropy(hidden, head, *rest, 3)
    assert not [t for t in kept if t.data_ptr() == head.data_ptr()]
    expected = torch.autograd.grad(whole(hidden, head, *rest), (hidden, head))
    with torch.no_grad():
        head.fill_(float("nan"))
    for a, b in zip(torch.autograd.grad(loss, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_grad_a_trained_head_costs_nothing():
    hidden, head, *rest = trained_head()
    with torch.no_grad(), Outputs() as outputs:
        loss = chunked_cross_entropy(hidden, head, *rest, M, l2wrap=1e-4)
    assert outputs.products == 1 and outputs.largest_numel == M * V and not loss.requires_grad


# L2Wrap


def whole_with_l2wrap(hidden, head, positions, labels, l2wrap):
    logits = F.linear(hidden, head)[positions]
    return F.cross_entropy(logits, labels, reduction="sum") + l2wrap / 2 * logits.max(1).values.square().sum()


@pytest.mark.parametrize("l2wrap", [1e-4, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, M])
def test_l2wrap_is_the_gradient_of_the_squared_largest_logits(chunk, l2wrap):
    hidden, head, *rest = trained_head()
    actual = chunked_cross_entropy(hidden, head, *rest, chunk, l2wrap)
    assert_close_gradients(actual * 0.37, whole_with_l2wrap(hidden, head, *rest, l2wrap) * 0.37, (hidden, head))


def test_l2wrap_does_not_change_the_loss():
    hidden, *rest = operands()
    assert chunked_cross_entropy(hidden, *rest, 3, l2wrap=0.3).equal(chunked_cross_entropy(hidden, *rest, 3))


def test_l2wrap_leaves_positions_without_label_alone():
    hidden, head, positions, labels = operands()
    chunked_cross_entropy(hidden, head, positions, labels, 3, l2wrap=0.3).backward()
    masked = torch.ones(T, dtype=torch.bool).index_fill(0, positions, False)
    assert masked.any() and not hidden.grad[masked].any() and hidden.grad[positions].all()


def test_l2wrap_is_the_same_however_the_batch_is_cut():
    """Two micro-batches divided by the labels of both, as one batch."""
    hidden, head, positions, labels = trained_head()
    parts = [slice(0, 3), slice(3, M)]
    cut = sum(chunked_cross_entropy(hidden, head, positions[part], labels[part], 2, 0.3) / M for part in parts)
    assert_close_gradients(cut, chunked_cross_entropy(hidden, head, positions, labels, M, 0.3) / M, (hidden, head))


def test_l2wrap_in_bf16():
    """Where rounding does not decide which logit is the largest."""
    hidden, head, *_ = trained_head(torch.bfloat16, (300, 64, 1000, 200))
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, head)]
    first, second = F.linear(*leaves).topk(2).values.unbind(1)
    positions = (first - second > 0.5).nonzero()[:, 0]
    labels = torch.randint(1000, (len(positions),))
    assert len(positions) > 100
    actual = torch.autograd.grad(chunked_cross_entropy(hidden, head, positions, labels, 64, 0.05), (hidden, head))
    expected = torch.autograd.grad(whole_with_l2wrap(*leaves, positions, labels, 0.05), leaves)
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.02
