"""What every WKV6 operator expects of its arguments."""

from __future__ import annotations

from torch import Tensor


def check(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, document_lengths: tuple[int, ...]) -> None:
    """Asserts shapes and dtypes; see the package's docstring for what they are."""
    T, H, N = r.shape
    assert k.shape == v.shape == log_decay.shape == r.shape, f"{r.shape}, {k.shape}, {v.shape}, {log_decay.shape}"
    assert bonus.shape == (H, N), f"bonus is {bonus.shape}, heads are {(H, N)}"
    assert state.shape == (len(document_lengths), H, N, N), f"state is {state.shape} for {len(document_lengths)} documents"
    assert sum(document_lengths) == T and min(document_lengths) > 0, f"{T} tokens, documents of {document_lengths}"
    assert len({x.dtype for x in (r, k, v, log_decay, bonus, state)}) == 1, "the six tensors are of one dtype"
