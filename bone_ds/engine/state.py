"""The trainable state of a DeepSpeed engine as whole fp32 tensors, at ZeRO 0-3, in fp32 and bf16, at any world size.

A part is `master`, the fp32 weight, or one of AdamW's moments. Every function is collective: each rank calls it with the
parameters in the same order. DeepSpeed's own checkpoints hold one file a rank and fit one world size; these fit all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from bone_ds.engine.placement import own_share

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
PARTS = (MASTER, *MOMENTS)


def gather(engine, trainable: dict[str, nn.Parameter], part: str) -> dict[str, Tensor]:
    """name -> fp32 CPU tensor of one part, on rank 0; an empty dictionary on every other rank."""
    _create_moments(engine)
    whole = _whole_masters(engine)
    gathered = {}
    for name, parameter in trainable.items():
        tensor = _get(engine, whole, parameter, part)  # every rank takes part, rank 0 keeps
        if dist.get_rank() == 0:
            gathered[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return gathered


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def spread(trainable: dict[str, nn.Parameter], parts: dict[str, dict[str, Tensor]], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Rank 0's parts, whole fp32 CPU tensors, on every rank; sent tensor by tensor over `device`, where the ranks talk."""
    everywhere: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for part in PARTS:
        for name, parameter in trainable.items():
            sent = torch.empty(whole_shape(parameter), dtype=torch.float32, device=device)
            if dist.get_rank() == 0:
                sent.copy_(parts[part][name])
            dist.broadcast(sent, 0)
            everywhere[part][name] = sent.to("cpu")
    return everywhere


@torch.no_grad()
def restore(engine, trainable: dict[str, nn.Parameter], parts: dict[str, dict[str, Tensor]], adam_step: int) -> None:
    """Puts gathered parts back; every rank brings all tensors. `adam_step` is what `adam_step()` returned."""
    _create_moments(engine)
    whole = _whole_masters(engine)
    for name, parameter in trainable.items():
        for part in PARTS:
            _set(engine, whole, parameter, part, parts[part][name].float())
    for master in _stepped_tensors(engine):
        engine.basic_optimizer.state[master]["step"].fill_(adam_step)
    _refresh_parameters(engine, whole)


def adam_step(engine) -> int:
    """AdamW's own step count: less than the engine's by the steps it skipped."""
    _create_moments(engine)
    return int(engine.basic_optimizer.state[_stepped_tensors(engine)[0]]["step"])


@torch.no_grad()
def undo_first_step(engine) -> None:
    """At stage 0 in bf16 DeepSpeed steps once over zero gradients when it starts: Adam's bias correction would be one off."""
    if adam_step(engine) == 0:
        return
    for parameter, master in _whole_masters(engine).items():
        master.copy_(parameter)  # weight decay has touched it
        engine.basic_optimizer.state[master]["step"].zero_()


def _stepped_tensors(engine) -> list[Tensor]:
    """The tensors that torch's AdamW steps, i.e. the keys of its state: flat partitions from stage 1 on."""
    optimizer = engine.optimizer
    for attribute in (
            "fp32_partitioned_groups_flat",  # stage 3, whose param_groups are empty between steps
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition"):  # stage 1 in bf16 with fp32 accumulation
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad]


def _whole_masters(engine) -> dict[nn.Parameter, Tensor] | None:
    """At stage 0, where nothing is sharded: parameter -> the fp32 tensor AdamW steps."""
    if engine.zero_optimization_stage() > 0:
        return None
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # bf16 keeps fp32 copies
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
    return {tensor: tensor for tensor in _stepped_tensors(engine)}


def _create_moments(engine) -> None:
    """AdamW creates its state in the first step; this creates the same zeros, and lets DeepSpeed map parameters to them."""
    optimizer = engine.basic_optimizer
    assert isinstance(optimizer, torch.optim.Adam), type(optimizer).__name__
    for master in _stepped_tensors(engine):
        if not optimizer.state.get(master):
            step = torch.zeros((), device=master.device if optimizer.defaults["fused"] else "cpu")
            optimizer.state[master] = {"step": step, **{part: torch.zeros_like(master) for part in MOMENTS}}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _get(engine, whole, parameter: nn.Parameter, part: str) -> Tensor:
    if whole is not None:
        master = whole[parameter]
        return master if part == MASTER else engine.basic_optimizer.state[master][part]
    return safe_get_full_fp32_param(parameter) if part == MASTER else safe_get_full_optimizer_state(parameter, part)


def _set(engine, whole, parameter: nn.Parameter, part: str, value: Tensor) -> None:
    if whole is not None:
        _get(engine, whole, parameter, part).copy_(value)
    elif hasattr(parameter, "ds_id"):
        shard = _shard(parameter, value)
        if part == MASTER:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, part)
    elif part == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, part)


def _shard(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's share under ZeRO-3, padded: DeepSpeed's own setter refuses sizes that the ranks don't divide."""
    share = own_share(parameter, value)
    return F.pad(share, (0, parameter.ds_tensor.numel() - share.numel()))


def _refresh_parameters(engine, whole) -> None:
    """Rebuilds the model's own (low precision, gathered) parameters from the masters, as a step would."""
    optimizer = engine.optimizer
    if whole is not None:
        for parameter, master in whole.items():
            parameter.copy_(master)
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # stage 3: release gathered parameters
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gather the persistent ones again, from the new shards
