"""What a block of the weight becomes with its matrix: the change of W_ab, by the name of the form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bone_ds.errors import InjectionError


@dataclass(frozen=True)
class Form:
    trainables: int
    """How many (G, r, r) there are; more than one stand in a dimension before G."""
    groupings: tuple[str, ...]
    """Those it is defined for."""
    change: Callable[[Tensor, Tensor, Callable], Tensor]
    """W's blocks (..., r, r), their matrices, and the product of the two -> W' - W in blocks."""


FORMS = {
    # W B + B: paper eq. 2. miss has no block to multiply, and is its additive term alone.
    "affine": Form(1, ("row", "col", "left", "free", "miss"), lambda block, B, product: product(block, B) + B),
    # W * B + B elementwise: paper eq. 12. left would be col.
    "hadamard": Form(1, ("row", "col", "free"), lambda block, B, _: torch.addcmul(B, block, B)),
    # W A + C: paper eq. 11, whose B is C here.
    "unconstrained": Form(2, ("row", "col", "free"), lambda block, AC, product: product(block, AC[0]) + AC[1]),
}


def named(form: str, grouping: str) -> Form:
    """Raises InjectionError for a name that is not in `FORMS`, and for a grouping that the form is not defined for."""
    if form not in FORMS:
        raise InjectionError(f"Bone form {form!r} is unknown, choose one of {', '.join(FORMS)}")
    if grouping not in FORMS[form].groupings:
        able = ", ".join(name for name, its in FORMS.items() if grouping in its.groupings)
        raise InjectionError(f"Bone form {form!r} does not exist for grouping {grouping!r}, choose {able}")
    return FORMS[form]
