"""RunConfig -> the complete DeepSpeed JSON. Pure: nothing else decides what DeepSpeed is told."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import ds_configs
from bone_ds import monitoring
from bone_ds.activation_policy import ActivationPolicy, policy_of
from bone_ds.config import LARGEST, RunConfig
from bone_ds.errors import ConfigError

Check = tuple[Callable[[object], bool], str]
"""Whether a value of the JSON can be used, and which can."""
# Sections that DeepSpeed itself obeys without more code here. DeepSpeed ignores unknown ones silently, so they are refused.
_OBEYED = {
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown",
    "flops_profiler", *monitoring.SECTIONS, "data_types", "activation_checkpointing",
}
_REFUSED = {
    "fp16": "training is in model.dtype: bf16 or fp32; remove it",
    "scheduler": "the learning rate follows train.schedule and train.warmup_steps; remove it",
    "amp": "training is in model.dtype: bf16 or fp32; remove it",
}
# Fields of zero_optimization that DeepSpeed documents and that training here has no objection to. What it can't use it refuses
# itself, but only after the model has been loaded, and with a traceback.
_FLAGS = {
    "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings",
    "memory_efficient_linear", "overlap_comm", "reduce_scatter", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
}
_SMALLEST = {
    "allgather_bucket_size": 2, "reduce_bucket_size": 1, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_model_persistence_threshold": 0, "stage3_module_granularity_threshold": 0, "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0, "sub_group_size": 0, "zero_hpz_partition_size": 1,
}
"""Fields that are whole numbers, and from where up."""
_ZERO = {"stage"} | _FLAGS | _SMALLEST.keys()
_DTYPES = {
    "fp32", "float32", "float", "torch.float32", "bf16", "bfloat16", "torch.bfloat16", "fp16", "float16", "half", "torch.float16"}
# To host memory, by the stages that have it. torch's AdamW steps there too, so DeepSpeed's own optimizer for CPUs, which would be
# compiled at first use, is not needed.
_OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def resolve(config: RunConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of a run on `world_size` ranks, every number in it derived.

    Raises ConfigError where the batch can't be dealt to the ranks, where the JSON can't be read or has a section that
    would not be obeyed, and where it contradicts the YAML.
    """
    origin, given = _read(config.deepspeed.config)
    _check_sections(origin, given)
    _check_partition(origin, given["zero_optimization"], world_size)
    derived = _derived(config, world_size)
    for key, value in derived.items():
        _check_agreement(origin, given, key, value)
    policy = policy_of(config, origin, given.get("activation_checkpointing", {}))
    monitoring.check(origin, given)
    return given | {key: value for key, (value, _) in derived.items()} | {"activation_checkpointing": policy.section()}


def stage(resolved: dict) -> int:
    return resolved["zero_optimization"]["stage"]


def offloaded(resolved: dict) -> tuple[str, ...]:
    """What of a resolved configuration goes to host memory: fields of zero_optimization."""
    zero = resolved["zero_optimization"]
    return tuple(key for key in _OFFLOAD if (zero.get(key) or {}).get("device") == "cpu")


def activation_policy(resolved: dict) -> ActivationPolicy:
    """What is recomputed in backward, in a resolved configuration."""
    return ActivationPolicy.of(resolved["activation_checkpointing"])


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank in one optimizer step."""
    train = config.train
    per_forward = train.micro_batch_size * world_size
    if train.global_batch_size % per_forward:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} can't be dealt to {world_size} ranks in micro-batches of "
            f"train.micro_batch_size: {train.micro_batch_size}; make it a multiple of {per_forward}")
    return train.global_batch_size // per_forward


def _derived(config: RunConfig, world_size: int) -> dict[str, tuple[object, str]]:
    """Key -> (value, the YAML field it follows from)."""
    train = config.train
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation_steps(config, world_size), "train.global_batch_size"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16": ({"enabled": config.model.dtype == "bf16"}, "model.dtype"),
        # torch's own AdamW: DeepSpeed's FusedAdam would be compiled at first use.
        "optimizer": ({"type": "AdamW", "params": {
            "lr": train.learning_rate, "betas": [train.beta1, train.beta2], "eps": train.eps,
            "weight_decay": train.weight_decay, "torch_adam": True} | ({"fused": True} if train.optimizer == "adamw_fused" else {})},
            "train.learning_rate, beta1, beta2, eps, weight_decay, optimizer"),
        "steps_per_print": (10**9, "the progress line, which is ours"),
    }


def _read(name: str) -> tuple[str, dict]:
    if name in ds_configs.NAMES:
        return name, ds_configs.read(name)
    path = Path(os.path.expanduser(name))
    if path.suffix != ".json":
        near = difflib.get_close_matches(name, ds_configs.NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"deepspeed.config: {name!r} is neither one of {', '.join(ds_configs.NAMES)} nor a .json file{hint}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_number)
    except OSError as error:
        raise ConfigError(f"deepspeed.config: {name}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed.config: {name}: is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed.config: {name}: holds {given!r:.60}, not an object")
    return name, given


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in names if names.count(key) > 1)!r} stands twice")
    return mapping


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _check_sections(origin: str, given: dict) -> None:
    known = _OBEYED | set(_REFUSED) | {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "optimizer",
        "steps_per_print"}
    for key, value in given.items():
        if key in _REFUSED and not (key in ("fp16", "amp") and isinstance(value, dict) and not value.get("enabled", True)):
            raise ConfigError(f"{origin}: {key}: {_REFUSED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "it would not be obeyed; remove it"
            raise ConfigError(f"{origin}: {key}: is no section known here; {hint}")
        if value == "auto":
            raise ConfigError(f"{origin}: {key}: 'auto' is not filled in by anyone here; remove the line")
        if value is None and key != "zero_optimization":
            raise ConfigError(f"{origin}: {key}: null says nothing; remove the line")
    for field, (fits, wanted) in _TOP_LEVEL.items():
        if field in given and not fits(given[field]):
            raise ConfigError(f"{origin}: {field}: {given[field]!r:.60} is not {wanted}")
    _check_fields(origin, "data_types", given.get("data_types", {}), _DATA_TYPES, '{"grad_accum_dtype": "fp32"}')
    _check_fields(origin, "flops_profiler", given.get("flops_profiler", {}), _FLOPS_PROFILER, '{"enabled": true}')
    _check_zero(origin, given.get("zero_optimization"))


def _check_fields(origin: str, name: str, section: object, known: Mapping[str, Check], example: str) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"{origin}: {name}: is {section!r:.60}; give an object like {example}")
    for field, value in section.items():
        if field not in known:
            raise ConfigError(f"{origin}: {name}.{field}: is no field known here; known are {', '.join(known)}")
        fits, wanted = known[field]
        if not fits(value):
            raise ConfigError(f"{origin}: {name}.{field}: {value!r:.60} is not {wanted}")


def _check_zero(origin: str, zero: object) -> None:
    if not isinstance(zero, dict):
        raise ConfigError(f"{origin}: zero_optimization: is {zero!r:.60}; give an object with a stage from 0 to 3")
    if not _is_whole(zero.get("stage")) or zero["stage"] not in (0, 1, 2, 3):
        raise ConfigError(f"{origin}: zero_optimization.stage: is {zero.get('stage')!r:.60}, not 0, 1, 2 or 3")
    for key, value in zero.items():
        if value == "auto":
            raise ConfigError(f"{origin}: zero_optimization.{key}: 'auto' is not filled in by anyone here; give a number")
        if key in _OFFLOAD:
            _check_offload(origin, zero["stage"], key, value)
        elif key not in _ZERO:
            near = difflib.get_close_matches(key, _ZERO, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ConfigError(f"{origin}: zero_optimization.{key}: is no field known here; {hint}")
        elif value is None and key == "overlap_comm":
            continue  # DeepSpeed's own default: it goes by the stage
        elif value is None:
            raise ConfigError(f"{origin}: zero_optimization.{key}: null says nothing; give a number or remove the line")
        elif key in _FLAGS and not isinstance(value, bool):
            raise ConfigError(f"{origin}: zero_optimization.{key}: {value!r:.60} is neither true nor false")
        elif key in _SMALLEST and not (_is_count(value) and _SMALLEST[key] <= value <= LARGEST):
            raise ConfigError(f"{origin}: zero_optimization.{key}: {value!r:.60} is no whole number from {_SMALLEST[key]} up")
        elif key == "allgather_bucket_size" and value % 2:
            raise ConfigError(f"{origin}: zero_optimization.{key}: {value} is odd; DeepSpeed takes even ones alone")


def _check_partition(origin: str, zero: dict, world_size: int) -> None:
    size = zero.get("zero_hpz_partition_size", 1)
    if world_size % size:
        raise ConfigError(f"{origin}: zero_optimization.zero_hpz_partition_size: {size} does not divide the {world_size} ranks")


def _check_offload(origin: str, stage: int, key: str, section: object) -> None:
    path = f"{origin}: zero_optimization.{key}"
    if section is None or isinstance(section, dict) and section.get("device") == "none":
        return
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: is {section!r:.60}; give an object like {{\"device\": \"cpu\"}}")
    if section.get("device") == "nvme":
        raise ConfigError(f"{path}.device: 'nvme' takes DeepSpeed's own library for it, which is not in use here; use cpu")
    if section.get("device") != "cpu":
        raise ConfigError(f"{path}.device: {section.get('device')!r} is neither cpu nor none")
    for field, value in section.items():
        if field not in ("device", "pin_memory"):
            raise ConfigError(f"{path}.{field}: is no field that is obeyed with device cpu; known are device and pin_memory")
        if field == "pin_memory" and not isinstance(value, bool):
            raise ConfigError(f"{path}.pin_memory: {value!r} is neither true nor false")
    if stage not in _OFFLOAD[key]:
        raise ConfigError(f"{path}: has no effect at stage {stage}; use stage {' or '.join(map(str, _OFFLOAD[key]))}, or remove it")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    """A whole number, also as 5e8."""
    return _is_whole(value) or isinstance(value, float) and value.is_integer()


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_dtype(value: object) -> bool:
    return value is None or isinstance(value, str) and value in _DTYPES


_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_COUNT: Check = (lambda value: _is_whole(value) and 1 <= value <= LARGEST, "a whole number from 1 up")
_TOP_LEVEL: Mapping[str, Check] = {
    "communication_data_type": (lambda value: value in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    "prescale_gradients": _FLAG,
    "gradient_predivide_factor": (lambda value: _is_number(value) and 0 < value < math.inf, "a number above 0"),
    "wall_clock_breakdown": _FLAG,
}
_DATA_TYPES: Mapping[str, Check] = {"grad_accum_dtype": (_is_dtype, "fp32, bf16, fp16 or null")}
_FLOPS_PROFILER: Mapping[str, Check] = {
    "enabled": _FLAG,
    "detailed": _FLAG,
    "profile_step": _COUNT,
    "module_depth": (lambda value: value == -1 or _COUNT[0](value), "-1 or a whole number from 1 up"),
    "top_modules": _COUNT,
    "recompute_fwd_factor": (lambda value: _is_number(value) and 0 <= value < math.inf, "a number from 0 up"),
    "output_file": (lambda value: value is None or isinstance(value, str), "a path or null"),
}


def _check_agreement(origin: str, given: dict, key: str, derived: tuple[object, str]) -> None:
    value, field = derived
    if key not in given:
        return
    for path, theirs, ours in _leaves(key, given[key], value):
        if ours is None:
            raise ConfigError(f"{origin}: {path}: {theirs!r:.60} would not be obeyed; remove it from the JSON")
        if theirs != ours:
            raise ConfigError(f"{origin}: {path}: {theirs!r:.60} contradicts {field}, from which it would be {ours!r}; remove it from the "
                              "JSON")


def _leaves(path: str, theirs: object, ours: object):
    """Pairs of values to compare: every leaf the JSON gives, with what the YAML makes of it."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, value in theirs.items():
            yield from _leaves(f"{path}.{key}", value, ours.get(key))
    else:
        yield path, theirs, ours
