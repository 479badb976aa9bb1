"""Cross entropy through a language-model head: loss-bearing positions only, a chunk of logits at a time.

Shapes: T positions, C hidden width, V vocabulary, M labels, K a chunk of at most `chunk` labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, label_positions: Tensor, labels: Tensor, chunk: int, l2wrap: float = 0.0
) -> Tensor:
    """The sum over m of the cross entropy of `hidden[label_positions[m]] @ head_weight^T` against `labels[m]`.

    hidden (T, C), head_weight (V, C), label_positions (M,) and labels (M,) int64 -> a scalar in fp32 (fp64 for fp64
    hidden states). With M = 0 it is a zero that still has its graph behind it.

    The gradients of hidden and, where it is trained, of the head are computed in forward, so backward needs neither
    logits nor head: at any time there are one chunk of logits in the head's dtype, one in fp32, and (M, C) of gradient;
    for a trained head also its gradient, summed in fp32 and kept in its dtype. What needs no gradient costs nothing.
    The products run in the head's dtype, under autocast too.

    l2wrap adds `l2wrap * largest logit` to the gradient of the largest logit of each label: that of l2wrap / 2 times
    the sum of the squared largest logits, which pulls logits towards 0. The loss that is returned is without it. It
    scales with the gradient of the loss, so what the sum is divided by, it is divided by, however the batch is cut.
    Upstream's L2Wrap (RWKV-LM, src/model.py, factor 1e-4) covers all positions of a micro-batch, those without loss
    too, divides by their number, and ignores the gradient that comes in, such as one divided by accumulation steps.
    """
    assert labels.shape == label_positions.shape and labels.ndim == 1 and chunk >= 1 and l2wrap >= 0
    needed = tuple(torch.is_grad_enabled() and operand.requires_grad for operand in (hidden, head_weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, head_weight, label_positions, labels, chunk, l2wrap, needed)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, head_VC, positions_M, labels_M, chunk, l2wrap, needed):
        wide = torch.promote_types(hidden_TC.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TC.device)
        grad_MC = hidden_TC.new_zeros(len(labels_M), hidden_TC.shape[1]) if needed[0] else None
        grad_VC = torch.zeros_like(head_VC, dtype=wide) if needed[1] else None
        for start in range(0, len(labels_M), chunk):
            here = slice(start, start + chunk)
            hidden_KC = hidden_TC[positions_M[here]].to(head_VC.dtype)
            logits_KV = hidden_KC @ head_VC.t()
            if not any(needed):
                loss += _cross_entropy_to_softmax(logits_KV.to(wide), labels_M[here])
                continue
            chunk_loss, grad_KV = _cross_entropy_and_gradient(logits_KV.to(wide), labels_M[here], l2wrap)
            loss += chunk_loss
            grad_KV = logits_KV.copy_(grad_KV)
            if needed[0]:
                grad_MC[here] = grad_KV @ head_VC
            if needed[1]:
                grad_VC += grad_KV.t() @ hidden_KC
        ctx.save_for_backward(grad_MC, positions_M if needed[0] else None, grad_VC.to(head_VC.dtype) if needed[1] else None)
        ctx.rows = hidden_TC.shape[0]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_MC, positions_M, grad_VC = ctx.saved_tensors
        grad_TC = None
        if grad_MC is not None:
            grad_TC = grad_MC.new_zeros(ctx.rows, grad_MC.shape[1]).index_add_(0, positions_M, grad_MC).mul_(g)
        return grad_TC, None if grad_VC is None else grad_VC * g, None, None, None, None, None


def _cross_entropy_and_gradient(logits_KV: Tensor, labels_K: Tensor, l2wrap: float) -> tuple[Tensor, Tensor]:
    """The summed cross entropy and the gradient of the logits, which overwrites them."""
    if l2wrap:
        largest_K1, place_K1 = logits_KV.max(1, keepdim=True)
    loss = _cross_entropy_to_softmax(logits_KV, labels_K)
    logits_KV.scatter_add_(1, labels_K[:, None], -logits_KV.new_ones(len(labels_K), 1))
    if l2wrap:
        logits_KV.scatter_add_(1, place_K1, largest_K1.mul_(l2wrap))
    return loss, logits_KV


def _cross_entropy_to_softmax(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Returns the summed cross entropy and leaves the softmax where the logits were."""
    logits_KV -= logits_KV.amax(1, keepdim=True)
    picked_K1 = logits_KV.gather(1, labels_K[:, None])
    total_K1 = logits_KV.exp_().sum(1, keepdim=True)
    logits_KV /= total_K1
    return (total_K1.log() - picked_K1).sum()
