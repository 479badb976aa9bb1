"""Norms of the trainable tensors and of their gradients, in fp32. Every function is collective: each rank calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor, nn


@torch.no_grad()
def of_parameters(trainable: dict[str, nn.Parameter]) -> dict[str, float]:
    """Under ZeRO-3 of the fp32 masters, else of the parameters in the model's dtype, which are the masters rounded."""
    return _norms(trainable, safe_get_local_fp32_param, lambda parameter: parameter)


@torch.no_grad()
def of_gradients(trainable: dict[str, nn.Parameter]) -> dict[str, float]:
    """Averaged over the ranks, before clipping; between the last backward of a step and its update."""
    return _norms(trainable, safe_get_local_grad, safe_get_full_grad)


def _norms(trainable: dict[str, nn.Parameter], share_of: Callable[[nn.Parameter], Tensor],
           whole_of: Callable[[nn.Parameter], Tensor]) -> dict[str, float]:
    """Under ZeRO-3 the squares of the shares are summed over the ranks, in one reduction, and nothing is gathered."""
    parameters = list(trainable.values())
    partitioned = hasattr(parameters[0], "ds_id")
    norms = [torch.linalg.vector_norm(_unpadded(parameter, share_of(parameter)) if partitioned else whole_of(parameter),
                                      dtype=torch.float32) for parameter in parameters]
    squares = torch.stack(norms).square()
    if partitioned:
        dist.all_reduce(squares)
    return dict(zip(trainable, squares.sqrt().tolist(), strict=True))


def _unpadded(parameter: nn.Parameter, share: Tensor) -> Tensor:
    """The last ranks' shares are filled up to the size of the others'."""
    size = share.numel()
    first = size * dist.get_rank(group=parameter.ds_process_group)
    return share[:max(0, min(size, parameter.ds_numel - first))]
