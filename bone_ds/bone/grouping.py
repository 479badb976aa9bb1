"""Which blocks of a weight share one Bone matrix.

A frozen weight W (out, in) is cut into blocks W_ab of r x r, a over out/r and b over in/r. A grouping gives every block
its matrix of the trainable B (G, r, r); a new grouping is a new entry of `GROUPINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from bone_ds.errors import InjectionError


@dataclass(frozen=True)
class Grouping:
    shape: Callable[[int, int, int], tuple[int, ...]]
    """(out, in, r) -> the shape of B."""
    fits: Callable[[int, int, int], bool]
    """(out, in, r) -> whether the layer can be cut this way."""
    over_blocks: Callable[[Tensor], Tensor]
    """B (G, r, r) -> a view that broadcasts to (out/r, in/r, r, r): the matrix of each block."""
    product: Callable[[Tensor, Tensor], Tensor] = lambda block, B: block @ B
    """A block (..., r, r) and its matrix -> their product; the matrix stands on the block's right but for `left`."""


def _cuts_both_sides(out_features: int, in_features: int, r: int) -> bool:
    return out_features % r == 0 and in_features % r == 0


GROUPINGS = {
    # W'_ab = W_ab + W_ab B_b + B_b: one matrix per block of inputs, shared down the column of blocks.
    "row": Grouping(
        shape=lambda out_features, in_features, r: (in_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=lambda B: B[None],
    ),
    # W'_ab = W_ab + W_ab B_a + B_a: one matrix per block of outputs, shared along the row of blocks.
    "col": Grouping(
        shape=lambda out_features, in_features, r: (out_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=lambda B: B[:, None],
    ),
    # W'_ab = W_ab + B_a W_ab + B_a: col's sharing from the other side. Not the paper's.
    "left": Grouping(
        shape=lambda out_features, in_features, r: (out_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=lambda B: B[:, None],
        product=lambda block, B: B @ block,
    ),
}


def named(grouping: str) -> Grouping:
    """Raises InjectionError for a name that is not in `GROUPINGS`."""
    if grouping not in GROUPINGS:
        raise InjectionError(f"Bone grouping {grouping!r} is unknown, choose one of {', '.join(GROUPINGS)}")
    return GROUPINGS[grouping]


def bone_shape(grouping: str, out_features: int, in_features: int, r: int) -> tuple[int, ...]:
    """The shape of B for a layer that r fits."""
    return named(grouping).shape(out_features, in_features, r)


def fits(grouping: str, out_features: int, in_features: int, r: int) -> bool:
    """Whether blocks of r x r can be grouped so on an (out, in) weight."""
    return r >= 1 and named(grouping).fits(out_features, in_features, r)


def largest_common_block(shapes: Iterable[tuple[int, int]]) -> list[int]:
    """Block sizes r that divide both sides of every (out, in) given, largest first; empty if none is given."""
    side = math.gcd(*(size for shape in shapes for size in shape))
    return [r for r in range(side, 0, -1) if side % r == 0]
