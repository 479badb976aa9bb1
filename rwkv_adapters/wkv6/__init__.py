"""The WKV operator of RWKV6, several times over: `resolve` finds one by name, and all are called alike,

    wkv6(r, k, v, log_decay, bonus, state, document_lengths) -> (y, final_state)

r, k, v, log_decay (T, H, N), log_decay <= 0, for the D documents of a row end to end; bonus (H, N), the model's time_faaaa; state and
final_state (D, H, N, N), [key, value]; y (T, H, N). All six are of one dtype, fp32 (or fp64, in naive, chunked and c). For each
document and head

    y_t = r_t (S + bonus k_t v_t^T)        S <- diag(exp(log_decay_t)) S + k_t v_t^T

All six tensors get gradients, from y and from final_state; none of them twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from bone_ds.errors import ConfigError

if TYPE_CHECKING:
    import torch

NAMES = ("naive", "chunked", "c", "fla")


def resolve(name: str, device: torch.device | str) -> Callable:
    """The operator `model.wkv` names, for tensors on a device; auto takes the fastest that is there.

    Raises ConfigError for one that is not there, or not for this device.
    """
    device_type = str(device).partition(":")[0]
    name = _fastest(device_type) if name == "auto" else name
    if name not in NAMES:
        raise ConfigError(f"model.wkv: {name!r} is unknown, choose one of auto, {', '.join(NAMES)}")
    if name == "c":
        _require("c", device_type == "cpu", f"runs on a CPU, the model is on {device_type}; use auto")
        _require("c", not _why_no_c(), f"can't be used: {_why_no_c()}; have a C compiler, then install bone_ds again")
    if name == "fla":
        _require("fla", device_type != "cpu", "runs on a GPU, the model is on a CPU; use auto")
        _require("fla", _has_fla(), "needs fla-core, which is not installed: pip install 'bone_ds[gpu]'")
    return importlib.import_module(f"rwkv_adapters.wkv6.{name}").wkv6


def _require(name: str, met: bool, otherwise: str) -> None:
    if not met:
        raise ConfigError(f"model.wkv: {name!r} {otherwise}")


def _fastest(device_type: str) -> str:
    if device_type == "cpu" and _why_no_c():
        _say_once(f"WKV6 is computed by the chunked operator, a few times slower than the C kernel: {_why_no_c()}")
    elif device_type == "cuda" and not _has_fla():
        _say_once("WKV6 is computed by the chunked operator, slower than fla-core's, which is not installed: pip install 'bone_ds[gpu]'")
    else:
        return {"cpu": "c", "cuda": "fla"}.get(device_type, "chunked")
    return "chunked"


def _why_no_c() -> str | None:
    from rwkv_adapters.wkv6 import c

    return c.missing()


def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None


@cache
def _say_once(line: str) -> None:
    logging.getLogger("bone_ds").warning(line)
