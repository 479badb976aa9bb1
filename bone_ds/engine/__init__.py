"""The only importer of deepspeed: starts the ranks, places weights, trains, and gathers what is partitioned.

Facts about DeepSpeed 0.19 that shape this package:
- its shared-memory reduction is compiled at first use and hangs on a stale lock, so it is switched off;
- `backward(scale_wrt_gas=False)` and a hand-set accumulation boundary leave the loss's normalisation to the caller,
  while gradients are still averaged over ranks;
- under ZeRO-3 a parameter is whole only inside a hook-driven gather, so weights are set share by share;
- at stage 0 in fp32 it keeps no gradient norm, and steps over NaN; in bf16 it takes one step before the first;
- from stage 1 on it drops gradients whose norm is not finite, says infinity for it, and steps nothing.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, TypeVar

# DeepSpeed warns at import, once a process, that this machine has no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from bone_ds.arch import Batch, State
from bone_ds.engine import compiler_lock, lost_ranks, norms, placement, state
from bone_ds.engine.monitor import Monitor
from bone_ds.errors import BoneError, ConfigError
from bone_ds.launch import Ranks

__all__ = [
    "Engine", "Monitor", "agree", "barrier", "by_first", "compiler_lock", "device", "distributed", "gathered", "limit_waiting",
    "placement", "told_by_first", "total",
]

T = TypeVar("T")


@contextlib.contextmanager
def distributed(ranks: Ranks) -> Iterator[None]:
    """The process group of all ranks, destroyed at the end whatever happens.

    Raises LostRankError where ranks do not meet, are gone later, or hang.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        hosts = lost_ranks.hosts(ranks)
    except dist.DistError as error:
        raise lost_ranks.never_met(error, ranks) from None
    assert dist.get_world_size() == ranks.world_size
    try:
        yield
    except RuntimeError as error:
        if not lost_ranks.is_cause(error):
            raise
        raise lost_ranks.described(error, ranks, hosts) from None
    finally:
        deepspeed.comm.destroy_process_group()
    # DeepSpeed's own groups hang on in its engine's cycles of references, with threads that may abort the process while Python ends.
    gc.collect()


def device(ranks: Ranks) -> torch.device:
    accelerator = get_accelerator()
    accelerator.set_device(ranks.local_rank)
    chosen = torch.device(accelerator.current_device_name())
    if chosen.type == "cpu":
        # Each rank would take every core: two of them on two cores are several times slower than one thread each.
        torch.set_num_threads(min(torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)))
        _keep_few_matmul_kernels()
    return chosen


def _keep_few_matmul_kernels() -> None:
    """oneDNN and torch's layer above it keep 1024 bf16 products each, 0.3 MiB apiece, and every length of a batch brings 16 new ones.

    So a run on a CPU grows by up to 0.6 GiB. One length's fit into 32, and making one anew takes 0.3 ms. The libraries read this at
    their first product; what the user has set stays.
    """
    for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, "32")


def limit_waiting(timeout_s: float) -> None:
    """How long any operation of all ranks may take from now on, before the ranks that wait end."""
    lost_ranks.limit(timeout_s)


def barrier() -> None:
    dist.barrier()


def total(values: list[float], device: torch.device) -> list[float]:
    """Sums of each value over all ranks, in fp64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def agree(value: str) -> bool:
    """Whether every rank brings the same text."""
    return len(set(gathered(value))) == 1


def gathered(value: Any) -> list[Any]:
    """What each rank brings, by rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def told_by_first(value: Any) -> Any:
    """What rank 0 brings, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def by_first(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; what it raises that a user can mend is raised on every rank too.

    On the others it has the attribute `of_first_rank`, for rank 0 says it.
    """
    outcome: Any = None
    if dist.get_rank() == 0:
        try:
            outcome = action()
        except (BoneError, OSError) as error:
            outcome = error
    outcome = told_by_first(outcome)
    if isinstance(outcome, Exception):
        outcome.of_first_rank = dist.get_rank() != 0
        raise outcome
    return outcome


class Engine:
    """A model under DeepSpeed whose trainable parameters are the adapter's alone."""

    def __init__(self, model: nn.Module, trainable: dict[str, nn.Parameter], ds: dict):
        """model maps (Batch, state, keep_state) to its summed cross entropy and a state, as `objective.Objective` does.

        Raises ConfigError where DeepSpeed refuses its configuration.
        """
        self.trainable = trainable
        self.world_size = dist.get_world_size()
        try:
            self.deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=list(trainable.values()), config=ds)
        except ValueError as error:
            raise ConfigError(f"deepspeed.config: DeepSpeed refuses it: {_first_complaint(error)}") from None
        state.undo_first_step(self.deepspeed)

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Each batch's summed cross entropy, one forward at a time; one that continues the batch before starts from its state."""
        state: State | None = None
        for batch, following in pairwise(chain(batches, [None])):
            goes_on = following is not None and following.continues
            loss, state = self.deepspeed(batch, state, goes_on)
            yield loss

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Accumulates gradients, which are averaged over the ranks; `boundary` marks the last one before `update`."""
        self.deepspeed.set_gradient_accumulation_boundary(boundary)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self, learning_rate: float) -> float:
        """One optimizer step; returns the global gradient norm before clipping.

        Where that is NaN or infinite no weight and no moment changes on any rank, and the gradients are dropped.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.deepspeed.zero_optimization_stage() > 0:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        # Without ZeRO the reduced gradients lie on the parameters, and a step over NaN would not be skipped.
        norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in self.trainable.values()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return norm

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient of one adapter tensor, averaged over ranks, between the last backward and `update`, if any.

        Every rank calls it, in the same order. At ZeRO stage 0 it is the live gradient.
        """
        return safe_get_full_grad(self.trainable[name])

    def gradient_norms(self) -> dict[str, float]:
        """By adapter tensor, before clipping, between the last backward and `update`. Every rank calls it."""
        return norms.of_gradients(self.trainable)

    def adapter_norms(self) -> dict[str, float]:
        """By adapter tensor. Every rank calls it."""
        return norms.of_parameters(self.trainable)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train()

    def gather(self, part: str) -> dict[str, Tensor]:
        """`master`, `exp_avg` or `exp_avg_sq` of the adapter by name, whole in fp32, on rank 0. Every rank calls it."""
        return state.gather(self.deepspeed, self.trainable, part)

    def adam_step(self) -> int:
        return state.adam_step(self.deepspeed)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the adapter's tensors by name, whole."""
        return {name: state.whole_shape(parameter) for name, parameter in self.trainable.items()}

    def spread(self, parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The whole parts that rank 0 brings, on every rank; the others bring nothing."""
        return state.spread(self.trainable, parts, self.deepspeed.device)

    def restore(self, parts: dict[str, dict[str, Tensor]], adam_step: int) -> None:
        """Puts back what `gather` and `adam_step` gave, at any stage and world size; every rank brings all tensors."""
        state.restore(self.deepspeed, self.trainable, parts, adam_step)


def _first_complaint(error: ValueError) -> str:
    """pydantic's message has a line of title, then field and complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[1:3]) if len(lines) > 2 else lines[0]
