"""The fastest matrix product this machine gives, as a measure for everything else."""

from __future__ import annotations

import time

import torch

from bone_ds.profile.clock import wait

_SIZES = {"cpu": (512, 1024, 2048, 3072), "cuda": (2048, 4096, 8192)}
_SECONDS_EACH = 0.3


def matrix_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of the best square product, of several sizes; takes a second or two."""
    return max(_flops(size, dtype, device) for size in _SIZES[device.type])


def _flops(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    best_s, ends_s = float("inf"), time.monotonic() + _SECONDS_EACH
    while time.monotonic() < ends_s:
        wait(device)
        started = time.monotonic()
        torch.mm(a, b, out=out)
        wait(device)
        best_s = min(best_s, time.monotonic() - started)
    return 2 * size**3 / best_s
