"""A packed batch is its samples: logits, loss and adapter gradients equal those of the samples one at a time."""

import pytest
import torch
from tiny_llama import built_and_loaded, opened, save_tiny

from bone_ds.arch import Batch, load
from bone_ds.config import AdapterConfig
from bone_ds.inject import inject
from bone_ds.objective import Objective

LENGTHS = (9, 1, 14, 5)


@pytest.fixture(params=["row", "col"])
def trained(request, tmp_path):
    """A tiny grouped-query Llama whose Bone matrices are no longer zero, as the objective the engine trains."""
    torch.manual_seed(0)
    save_tiny(tmp_path, num_key_value_heads=2, num_attention_heads=4)
    model = built_and_loaded(opened(tmp_path))
    trainable = inject(model, load("llama"), AdapterConfig(rank=8, grouping=request.param))
    for parameter in trainable.values():
        parameter.data.normal_(std=0.05)
    return Objective(model, load("llama"), loss_chunk=4), trainable


def document(length: int) -> tuple[torch.Tensor, int]:
    """Tokens, and how many of them are prompt."""
    return torch.randint(0, 60, (length,)), max(1, length // 3)


def batch_of(documents: list[tuple[torch.Tensor, int]]) -> Batch:
    lengths = tuple(len(tokens) for tokens, _ in documents)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    tokens = torch.cat([tokens for tokens, _ in documents])
    learnt = torch.cat([torch.arange(start + prompt, start + length)
                        for start, length, (_, prompt) in zip(starts, lengths, documents, strict=True)])
    return Batch(tokens[None], lengths, learnt - 1, tokens[learnt])


def gradients(trainable) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in trainable.values()]
    for parameter in trainable.values():
        parameter.grad = None
    return found


def test_logits_loss_and_gradients_equal_the_samples_alone(trained):
    objective, trainable = trained
    documents = [document(length) for length in LENGTHS]
    packed = batch_of(documents)
    head = objective.head.weight

    packed_logits = objective.architecture.hidden(objective.model, packed.tokens, packed.document_lengths)[0] @ head.t()
    packed_loss, _ = objective(packed)
    packed_loss.backward()
    packed_gradients = gradients(trainable)

    alone_logits, alone_loss = [], 0.0
    for each in documents:
        single = batch_of([each])
        alone_logits.append(objective.architecture.hidden(objective.model, single.tokens, single.document_lengths)[0] @ head.t())
        loss, _ = objective(single)
        loss.backward()
        alone_loss += loss.detach()

    torch.testing.assert_close(packed_logits, torch.cat(alone_logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_loss.detach(), alone_loss, rtol=1e-6, atol=1e-5)
    assert len(packed_gradients) == 14
    for packed_gradient, alone in zip(packed_gradients, gradients(trainable), strict=True):
        assert alone.abs().max() > 0
        torch.testing.assert_close(packed_gradient, alone, rtol=1e-4, atol=1e-5)


def test_a_mask_of_ones_would_contaminate_and_is_not_used(trained):
    """With a mask, transformers lets every document see those before it; the objective's logits differ from that."""
    objective, _ = trained
    documents = [document(length) for length in LENGTHS]
    packed = batch_of(documents)
    ours = objective.architecture.hidden(objective.model, packed.tokens, packed.document_lengths)[0]

    objective.model.set_attn_implementation("sdpa")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ones = torch.ones_like(packed.tokens)
    masked = objective.model.model(packed.tokens, attention_mask=ones, position_ids=positions).last_hidden_state[0]
    first = LENGTHS[0]
    torch.testing.assert_close(ours[:first], masked[:first], rtol=1e-4, atol=1e-4)
    assert (ours[first:] - masked[first:]).abs().max() > 0.1
