"""Where a model's parameters live: whole on every rank, or one share a rank under ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bone_ds import ds_json
from bone_ds.arch import Placement


def choose(ds: dict, dtype: torch.dtype, device: torch.device) -> Placement:
    return Partitioned(ds) if ds_json.stage(ds) == 3 else Whole(dtype, device)


class Whole:
    """Stages 0 to 2."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device

    @contextlib.contextmanager
    def empty(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        with torch.no_grad():
            param.copy_(tensor)


class Partitioned:
    """Stage 3."""

    def __init__(self, ds: dict):
        self.ds = ds

    def empty(self) -> contextlib.AbstractContextManager:
        # mem_efficient_linear would replace torch.nn.functional.linear for the whole process.
        return deepspeed.zero.Init(config_dict_or_path=self.ds, mem_efficient_linear=False)

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                param.copy_(tensor)
