"""Where a model's parameters live: whole on every rank, or one share a rank under ZeRO-3."""

from __future__ import annotations

import contextlib

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bone_ds import ds_json
from bone_ds.arch import Placement


def choose(ds: dict, device: torch.device) -> Placement:
    return Partitioned(ds) if ds_json.stage(ds) == 3 else Whole(device)


class Whole:
    """Stages 0 to 2."""

    def __init__(self, device: torch.device):
        self.device = device

    def empty(self) -> contextlib.AbstractContextManager:
        return self.device

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        with torch.no_grad():
            param.copy_(tensor)


class Partitioned:
    """Stage 3. A rank never holds more than its shares and one whole tensor."""

    def __init__(self, ds: dict):
        self.ds = ds

    def empty(self) -> contextlib.AbstractContextManager:
        # mem_efficient_linear would replace torch.nn.functional.linear for the whole process.
        return _InitUnset(config_dict_or_path=self.ds, mem_efficient_linear=False)

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        """Each rank takes its share of the tensor it was given; nothing is gathered or sent."""
        if param.ds_secondary_tensor is not None or hasattr(param.ds_tensor, "ds_quant_scale"):
            return _assign_whole(param, tensor)
        share = own_share(param, tensor)
        with torch.no_grad():
            param.ds_tensor[:share.numel()].copy_(share)


def own_share(param: nn.Parameter, tensor: Tensor) -> Tensor:
    """This rank's part of a whole tensor: a view, and shorter than the others' where the ranks don't divide it."""
    size = param.ds_tensor.numel()
    start = size * dist.get_rank(group=param.ds_process_group)
    return tensor.flatten()[start:start + size]


def _assign_whole(param: nn.Parameter, tensor: Tensor) -> None:
    """Where DeepSpeed keeps each share twice, or quantised."""
    with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            param.copy_(tensor)


class _InitUnset(deepspeed.zero.Init):
    """Parameters are unset until they are assigned, so there is nothing yet that ranks would have to agree on.

    Broadcast, each would be touched, and so held, whole on every rank.
    """

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()
