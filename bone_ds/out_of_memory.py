"""Memory that ran out all the same: said with what was planned, and with the cheapest change that needs less."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator

import torch

from bone_ds import plan
from bone_ds.errors import BoneError, MemoryLimitError
from bone_ds.plan import Plan

_LESS = 0.9
"""A change is to need at most this share of what was planned."""
_USUAL = "lower data.max_length or train.micro_batch_size, or set train.activation_checkpointing: layer"


class Explanation:
    """What the run was planned to take, once it is known."""

    def __init__(self, rank: int):
        self._rank = rank
        self._planned: Plan | None = None
        self._again: Callable[..., Plan] | None = None

    def known(self, planned: Plan | None, again: Callable[..., Plan]) -> None:
        """again: plans the run anew for so many `capacity_bytes`, with the changes that would make it fit them."""
        self._planned, self._again = planned, again

    def message(self, error: BaseException) -> str:
        reason = f"rank {self._rank}: memory ran out: {' '.join(str(error).split())[:200] or type(error).__name__}"
        if self._planned is None:
            return f"{reason}\nNothing was planned: {_USUAL}"
        return f"{reason}\nPlanned were {plan.breakdown(self._planned)}; {self._change()}"

    def _change(self) -> str:
        changes = self._planned.changes
        if not changes:
            try:
                changes = self._again(capacity_bytes=int(_LESS * self._planned.peak_bytes)).changes
            except (BoneError, MemoryError, RuntimeError, OSError):  # there is no memory to plan with either
                return _USUAL
        if not changes:
            return "no change of the configuration that was tried needs much less"
        return f"with {changes[0]} it would take {plan.gib(changes[0].peak_bytes)}"


@contextlib.contextmanager
def explained(rank: int) -> Iterator[Explanation]:
    """Raises MemoryLimitError in place of the many errors that say that there is no more memory."""
    explanation = Explanation(rank)
    try:
        yield explanation
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_cause(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is memory to plan with
        raise MemoryLimitError(explanation.message(error)) from None


def is_cause(error: BaseException) -> bool:
    """torch has an error of its own for a GPU alone; on a CPU its allocators, C++ and the system each word it in their own way."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("allocate memory", "bad_alloc", "unable to mmap", "Cannot allocate")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
