"""Bytes of the tensor storages that are alive, by what they are for; of real tensors and of fake ones.

A storage counts from the operation that returns it, or from `claim`, until it is freed. What an operation's kernel holds for
itself meanwhile, and what lives outside of tensors, is not seen. Meta tensors have sizes and no memory.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"


@dataclass(frozen=True)
class Moment:
    """The live bytes after one storage came or went."""

    time_s: float
    """time.monotonic()"""
    total_bytes: int
    by_component: dict[str, int] | None = None
    """None where the components were not asked for."""
    storage: int = 0
    """Which one. Its number may be another's once it is freed."""
    recorded: bool = False
    """Whether autograd recorded what was computed."""


@dataclass(frozen=True)
class _Storage:
    size_bytes: int
    component: str
    reference: weakref.ref
    """Its callback is what notes that the storage is freed."""


class LiveMemory(TorchDispatchMode):
    """Active as a context manager; may be entered again, and goes on counting what dies between.

    granularity_bytes: what an allocator rounds every storage up to (CUDA's: 512).
    """

    def __init__(self, granularity_bytes: int = 1):
        super().__init__()
        self._granularity_bytes = granularity_bytes
        self._storages: dict[int, _Storage] = {}
        self._component = OTHER
        self._history: list[Moment] | None = None
        self.by_component: Counter[str] = Counter()
        """Now."""
        self.total_bytes = 0
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}
        """The components at the moment of the peak; they sum to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, self._component)
        return out

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Storages that come inside belong to `name`; the innermost name counts."""
        before, self._component = self._component, name
        try:
            yield
        finally:
            self._component = before

    def claim(self, component: str, tensors: Iterable[Tensor]) -> None:
        """Makes the storages of tensors, known or not, belong to a component."""
        for tensor in tensors:
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is None:
                self._note(tensor, component)
            elif known.component != component:
                self.by_component[known.component] -= known.size_bytes
                self.by_component[component] += known.size_bytes
                self._storages[tensor.untyped_storage()._cdata] = _Storage(known.size_bytes, component, known.reference)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage counts."""
        return tensor.untyped_storage()._cdata in self._storages

    def reset_peak(self) -> None:
        """The peak is what lives now; a later one is sought from here on."""
        self.peak_bytes = self.total_bytes
        self.at_peak = dict(+self.by_component)

    @contextmanager
    def history(self) -> Iterator[list[Moment]]:
        """A list that grows by a moment whenever a storage comes or goes."""
        before, self._history = self._history, []
        try:
            yield self._history
        finally:
            self._history = before

    def _note(self, tensor: Tensor, component: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or tensor.is_meta:
            return
        size_bytes = -(-storage.nbytes() // self._granularity_bytes) * self._granularity_bytes
        self._storages[key] = _Storage(size_bytes, component, weakref.ref(storage, partial(self._freed, key)))
        self._change(key, component, size_bytes)
        if self.total_bytes > self.peak_bytes:
            self.reset_peak()

    def _freed(self, key: int, _: weakref.ref) -> None:
        gone = self._storages.pop(key)
        self._change(key, gone.component, -gone.size_bytes)

    def _change(self, key: int, component: str, size_bytes: int) -> None:
        self.total_bytes += size_bytes
        self.by_component[component] += size_bytes
        if self._history is not None:
            self._history.append(Moment(time.monotonic(), self.total_bytes, dict(+self.by_component), key, torch.is_grad_enabled()))
