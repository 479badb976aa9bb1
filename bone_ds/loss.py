"""Cross entropy through a frozen language-model head: loss-bearing positions only, a chunk of logits at a time.

Shapes: T positions, C hidden width, V vocabulary, M labels, K a chunk of at most `chunk` labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, label_positions: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """The sum over m of the cross entropy of `hidden[label_positions[m]] @ head_weight^T` against `labels[m]`.

    hidden (T, C), head_weight (V, C) frozen, label_positions (M,) and labels (M,) int64 -> a scalar in fp32 (fp64 for
    fp64 hidden states). With M = 0 it is a zero that still has hidden's graph behind it.

    The gradient of hidden is computed in forward, so backward needs neither logits nor head: at any time there are one
    chunk of logits in the head's dtype, one in fp32, and (M, C) of gradient. Without grad there is no gradient either.
    The products run in the head's dtype, under autocast too.
    """
    assert not head_weight.requires_grad, "the head is frozen: its gradient is not computed"
    assert labels.shape == label_positions.shape and labels.ndim == 1 and chunk >= 1
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, head_weight, label_positions, labels, chunk, need_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, head_VC, positions_M, labels_M, chunk, need_grad):
        wide = torch.promote_types(hidden_TC.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TC.device)
        grad_MC = hidden_TC.new_zeros(len(labels_M), hidden_TC.shape[1]) if need_grad else None
        for start in range(0, len(labels_M), chunk):
            here = slice(start, start + chunk)
            logits_KV = hidden_TC[positions_M[here]].to(head_VC.dtype) @ head_VC.t()
            softmax_KV = logits_KV.to(wide)
            loss += _cross_entropy_to_softmax(softmax_KV, labels_M[here])
            if need_grad:
                softmax_KV.scatter_add_(1, labels_M[here, None], -softmax_KV.new_ones(len(labels_M[here]), 1))
                grad_MC[here] = logits_KV.copy_(softmax_KV) @ head_VC
        if need_grad:
            ctx.save_for_backward(grad_MC, positions_M)
            ctx.rows = hidden_TC.shape[0]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_MC, positions_M = ctx.saved_tensors
        grad_TC = grad_MC.new_zeros(ctx.rows, grad_MC.shape[1])
        return grad_TC.index_add_(0, positions_M, grad_MC).mul_(g), None, None, None, None, None


def _cross_entropy_to_softmax(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Returns the summed cross entropy and leaves the softmax where the logits were."""
    logits_KV -= logits_KV.amax(1, keepdim=True)
    picked_K1 = logits_KV.gather(1, labels_K[:, None])
    total_K1 = logits_KV.exp_().sum(1, keepdim=True)
    logits_KV /= total_K1
    return (total_K1.log() - picked_K1).sum()
