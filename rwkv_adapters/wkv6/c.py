"""WKV6 on a CPU through `kernel.c`, which is compiled when the package is installed.

The library lies beside this file and is called through addresses: it knows nothing of torch or Python. It runs on torch's own
threads, those of the OpenMP runtime that torch has loaded. Two torch operators wrap it, so that fake tensors and autograd know its
shapes.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from rwkv_adapters.wkv6.arguments import check

VERSION = 2
SEGMENT = 64
"""Both as in kernel.c."""
VALUES_PER_THREAD = 2**20
"""So many updates of a value of the state are worth a thread: it takes longer than handing the work over."""


def wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor,
         document_lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """fp32 or fp64, on a CPU. Keeps its inputs, and the state before every 64th step of a document, for backward."""
    check(r, k, v, log_decay, bonus, state, document_lengths)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, k, v, log_decay, bonus, state))
    y, final_state, _ = _forward(r, k, v, log_decay, bonus, state, document_lengths, keep)
    return y, final_state


@cache
def missing() -> str | None:
    """Why the library can't be called; None if it can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


@cache
def _library() -> ctypes.CDLL:
    """Raises OSError."""
    places = [Path(__file__).with_name(f"kernel{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        raise OSError("it was not compiled at installation")
    library = ctypes.CDLL(path)
    try:
        found = library.wkv6_version()
    except AttributeError:
        raise OSError(f"{path} is no library of kernel.c") from None
    if found != VERSION:
        raise OSError(f"{path} is of version {found}, this needs {VERSION}")
    return library


@torch.library.custom_op("bone_ds::wkv6", mutates_args=(), device_types="cpu")
def _forward(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, document_lengths: Sequence[int],
             keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    r, k, v, bonus = (x.contiguous() for x in (r, k, v, bonus))
    final_state = state.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(r)
    checkpoints = _checkpoints(state, document_lengths, keep)
    _call("forward", r, document_lengths, r, k, v, log_decay.exp().contiguous(), bonus, final_state, y, checkpoints if keep else None)
    return y, final_state, checkpoints


@_forward.register_fake
def _(r, k, v, log_decay, bonus, state, document_lengths, keep):
    contiguous = torch.contiguous_format
    return (torch.empty_like(r, memory_format=contiguous), torch.empty_like(state, memory_format=contiguous),
            _checkpoints(state, document_lengths, keep))


@torch.library.custom_op("bone_ds::wkv6_backward", mutates_args=(), device_types="cpu")
def _backward(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, checkpoints: Tensor, gy: Tensor, g_final_state: Tensor,
              document_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r, k, v, bonus, gy = (x.contiguous() for x in (r, k, v, bonus, gy))
    g_state = g_final_state.clone(memory_format=torch.contiguous_format)
    gr, gk, gv, g_log_decay = (torch.empty_like(r) for _ in range(4))
    g_bonus = bonus.new_empty(len(document_lengths), *bonus.shape)
    _call("backward", r, document_lengths, r, k, v, log_decay.exp().contiguous(), bonus, checkpoints, gy, g_state, gr, gk, gv, g_log_decay,
          g_bonus)
    return gr, gk, gv, g_log_decay, g_bonus.sum(0), g_state


@_backward.register_fake
def _(r, k, v, log_decay, bonus, checkpoints, gy, g_final_state, document_lengths):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v, log_decay, bonus, g_final_state))


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, _, document_lengths, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # of the checkpoints, which have none
    ctx.save_for_backward(*tensors, output[2])
    ctx.document_lengths = document_lengths
    ctx.state_shape = output[1].shape


def _gradients(ctx, gy: Tensor | None, g_final_state: Tensor | None, _) -> tuple[Tensor | None, ...]:
    r, k, v, log_decay, bonus, checkpoints = ctx.saved_tensors
    gy = torch.zeros_like(r) if gy is None else gy
    g_final_state = r.new_zeros(ctx.state_shape) if g_final_state is None else g_final_state
    return *_backward(r, k, v, log_decay, bonus, checkpoints, gy, g_final_state, ctx.document_lengths), None, None


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def _checkpoints(state: Tensor, document_lengths: Sequence[int], keep: bool) -> Tensor:
    number = sum(-(-length // SEGMENT) for length in document_lengths) if keep else 0
    return state.new_empty(number, *state.shape[1:])


def _call(direction: str, r: Tensor, document_lengths: Sequence[int], *tensors: Tensor | None) -> None:
    """Runs the kernel over all pairs of a head and a document, which are independent, on at most torch's number of threads."""
    T, H, N = r.shape
    function = getattr(_library(), f"wkv6_{direction}_{str(r.dtype).removeprefix('torch.')}")
    starts, kept = _starts(tuple(document_lengths))
    addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    sizes = [ctypes.c_int64(size) for size in (len(document_lengths), H, N)]
    parallel = _parallel()
    threads = max(1, min(torch.get_num_threads() if parallel else 1, T * H * N * N // VALUES_PER_THREAD))
    if function(parallel, ctypes.c_int64(threads), _shares(tuple(document_lengths), H, threads), *sizes, starts, kept, *addresses):
        raise MemoryError("WKV6: no memory for one head's states")


@cache
def _parallel() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded for its own threads, if it is of that kind."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of no name
        return None


@lru_cache(maxsize=64)
def _starts(document_lengths: tuple[int, ...]) -> tuple[ctypes.Array, ctypes.Array]:
    """The first token and the first checkpoint of each document."""
    integers = ctypes.c_int64 * (len(document_lengths) + 1)
    segments = (-(-length // SEGMENT) for length in document_lengths)
    return integers(0, *accumulate(document_lengths)), integers(0, *accumulate(segments))


@lru_cache(maxsize=64)
def _shares(document_lengths: tuple[int, ...], heads: int, threads: int) -> ctypes.Array:
    """Where the pairs, head by head, are cut into shares of about equally many tokens each, one a thread."""
    ends = list(accumulate(document_lengths * heads))
    cuts, cut = [0], 0
    for thread in range(1, threads + 1):
        while cut < len(ends) and ends[cut] * threads <= ends[-1] * thread:
            cut += 1
        cuts.append(cut)
    return (ctypes.c_int64 * len(cuts))(*cuts)
