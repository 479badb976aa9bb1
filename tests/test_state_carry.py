"""A long document in chunks: the loss of the whole, the memory of one chunk, gradients that end where a chunk begins."""

from types import SimpleNamespace

import pytest
import tiny_rwkv
import torch
from test_data_order import samples_of

from bone_ds import activation
from bone_ds.activation_policy import ActivationPolicy
from bone_ds.config import AdapterConfig
from bone_ds.data import collate, collate_chunks
from bone_ds.engine import Engine
from bone_ds.inject import inject
from bone_ds.objective import Objective
from rwkv_adapters import ARCHITECTURE


def adapted(path, policy="none"):
    tiny_rwkv.save_tiny(path)
    model = tiny_rwkv.built_and_loaded(tiny_rwkv.opened(path))
    trainable = inject(model, ARCHITECTURE, AdapterConfig(rank=8))
    torch.manual_seed(0)
    for parameter in trainable.values():
        torch.nn.init.normal_(parameter, std=0.05)
    activation.apply(model, ARCHITECTURE, ActivationPolicy(policy, every=1))
    return Objective(model, ARCHITECTURE, loss_chunk=7), trainable


def losses(objective, batches):
    return Engine.losses(SimpleNamespace(deepspeed=objective), batches)


@pytest.mark.parametrize("policy", ["none", "layer"])
@pytest.mark.parametrize("lengths", [[500], [77, 1, 300, 16, 33]], ids=str)
@pytest.mark.parametrize("chunk_length", [16, 37, 128])
def test_the_loss_is_that_of_the_whole(tmp_path, lengths, chunk_length, policy):
    objective, trainable = adapted(tmp_path / "tiny.pth", policy)
    samples, units = samples_of([max(2, length) for length in lengths]), [list(range(len(lengths)))]
    whole, _ = objective(collate(samples, units, "cpu"))
    chunked = []
    for loss in losses(objective, collate_chunks(samples, units, "cpu", chunk_length, [units])):
        loss.backward()
        chunked.append(float(loss.detach()))
    assert sum(chunked) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable.values())


def test_a_chunk_without_its_state_would_have_another_loss(tmp_path):
    objective, _ = adapted(tmp_path / "tiny.pth")
    samples = samples_of([200])
    chunks = collate_chunks(samples, [[0]], "cpu", 50, [[[0]]])
    carried = [float(loss.detach()) for loss in losses(objective, chunks)]
    alone = [float(objective(chunk)[0].detach()) for chunk in chunks]
    assert alone[0] == carried[0] and all(abs(a - b) > 1e-2 for a, b in zip(alone[2:], carried[2:]))


def test_what_is_kept_for_backward_does_not_grow_with_the_document(tmp_path):
    objective, _ = adapted(tmp_path / "tiny.pth")

    def most_kept_bytes(length, chunk_length):
        samples, most = samples_of([length]), 0
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.__setitem__(x.data_ptr(), x.nbytes), x)[1], lambda x: x):
            for loss in losses(objective, collate_chunks(samples, [[0]], "cpu", chunk_length, [[[0]]])):
                loss.backward()
                most = max(most, sum(kept.values()))
                kept.clear()
        return most

    assert most_kept_bytes(640, 64) <= 1.05 * most_kept_bytes(64, 64) < 0.2 * most_kept_bytes(640, None)


def test_the_gradient_ends_where_a_chunk_begins(tmp_path):
    """The second chunk alone, from the state that the first one left, gives its adapters the same gradient."""
    objective, trainable = adapted(tmp_path / "tiny.pth")
    samples = samples_of([64])
    first, second = collate_chunks(samples, [[0]], "cpu", 32, [[[0]]])
    _, loss = losses(objective, [first, second])
    loss.backward()
    through_both = {name: parameter.grad.clone() for name, parameter in trainable.items()}
    with torch.no_grad():
        _, state = objective(first, None, True)
    objective.zero_grad()
    loss, _ = objective(second, state)
    loss.backward()
    for name, parameter in trainable.items():
        torch.testing.assert_close(parameter.grad, through_both[name], rtol=0, atol=0)


def test_the_carried_state_is_one_document_s(tmp_path):
    """Not a view that keeps the states of all documents of the row."""
    objective, _ = adapted(tmp_path / "tiny.pth")
    samples = samples_of([5] * 20)
    _, state = objective(collate(samples, [list(range(20))], "cpu"), None, True)
    assert all(len(tensor) == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state)
