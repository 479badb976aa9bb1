"""Causal attention within documents that lie end to end in one row.

No mask is ever built: on a CPU each document is one causal attention of its own, several times cheaper than one
attention under a block mask; on a GPU all documents are one variable-length flash attention.

transformers calls `attend` because the model's config names it (`NAME`). That name is left out of transformers'
registry of masks on purpose: such an attention gets no mask, and the position ids aren't inspected, which would wait
for the GPU in every forward and can't be done with fake tensors.

Shapes: T tokens in the row, N documents, H query heads, G key and value heads (G divides H), D values a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "bone_ds_documents"
AS_ON_CUDA = "bone_ds_documents_as_on_cuda"
"""For fake tensors: keeps what a GPU's kernel keeps."""


def hidden(model: nn.Module, tokens: Tensor, document_lengths: tuple[int, ...]) -> Tensor:
    """tokens (1, T), lengths that sum to T -> the hidden states (T, C) that the head reads."""
    assert tokens.dim() == 2 and tokens.shape[0] == 1, f"tokens are one row, not {tuple(tokens.shape)}"
    assert min(document_lengths) > 0 and sum(document_lengths) == tokens.shape[1], (document_lengths, tokens.shape)
    output = model.model(
        input_ids=tokens,
        position_ids=position_ids(document_lengths).to(tokens.device),
        use_cache=False,
        document_lengths=document_lengths,
        document_bounds=document_bounds(document_lengths).to(tokens.device))
    return output.last_hidden_state[0]


def position_ids(document_lengths: tuple[int, ...]) -> Tensor:
    """(1, T) int64, from 0 in each document."""
    return torch.cat([torch.arange(length) for length in document_lengths])[None]


def document_bounds(document_lengths: tuple[int, ...]) -> Tensor:
    """(N + 1,) int32: where each document starts, and T at the end."""
    return torch.tensor([0, *accumulate(document_lengths)], dtype=torch.int32)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
           document_lengths: tuple[int, ...], document_bounds: Tensor, scaling: float, **_) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""
    assert attention_mask is None, "documents are told apart by their lengths, pass no mask"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return attend_flash(query, key, value, document_bounds, max(document_lengths), scaling), None
    return attend_each(query, key, value, document_lengths, scaling), None


def attend_each(query: Tensor, key: Tensor, value: Tensor, document_lengths: tuple[int, ...], scaling: float) -> Tensor:
    """One causal attention per document, on any device. Shapes as in `attend`."""
    pieces = [tensor.split(document_lengths, dim=2) for tensor in (query, key, value)]
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
               for q, k, v in zip(*pieces, strict=True)]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1) if len(outputs) > 1 else outputs[0].transpose(1, 2)


def attend_flash(query: Tensor, key: Tensor, value: Tensor, document_bounds: Tensor, longest: int, scaling: float) -> Tensor:
    """All documents in one kernel, half precision on a GPU. Shapes as in `attend`."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    causal = (-1, 0)
    output = varlen_attn(query, key, value, document_bounds, document_bounds, longest, longest,
                         scale=scaling, window_size=causal, enable_gqa=query.shape[1] != key.shape[1])
    return output[None]


def attend_as_on_cuda(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                      document_lengths: tuple[int, ...], scaling: float, **_) -> tuple[Tensor, None]:
    """As `attend`, of fake tensors: in half precision query, key, value, output and one fp32 number a row and head are kept."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return attend_each(query, key, value, document_lengths, scaling), None
    return _attend_flash_fake(query, key, value, document_lengths)[0], None


@torch.library.custom_op("bone_ds::attention_as_on_cuda", mutates_args=())
def _attend_flash_fake(query: Tensor, key: Tensor, value: Tensor, document_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    raise AssertionError("stands for `attend_flash` on fake tensors, which have no values")


@_attend_flash_fake.register_fake
def _(query, key, value, document_lengths):
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    return output, query.new_empty(query.shape[1:3], dtype=torch.float32)


@torch.library.custom_op("bone_ds::attention_as_on_cuda_backward", mutates_args=())
def _attend_flash_fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
                                document_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("stands for the gradient of `attend_flash` on fake tensors, which have no values")


@_attend_flash_fake_backward.register_fake
def _(grad, query, key, value, document_lengths):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_as_flash(ctx, inputs, output) -> None:
    *tensors, ctx.document_lengths = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _flash_gradients(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    query, key, value, *_ = ctx.saved_tensors
    return *_attend_flash_fake_backward(grad, query, key, value, ctx.document_lengths), None


_attend_flash_fake.register_autograd(_flash_gradients, setup_context=_keep_as_flash)

AttentionInterface.register(NAME, attend)
AttentionInterface.register(AS_ON_CUDA, attend_as_on_cuda)
