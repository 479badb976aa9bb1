"""Which blocks of a weight share one Bone matrix.

A frozen weight W (out, in) is cut into blocks W_ab of r x r, a over out/r and b over in/r. A grouping gives every block its matrix of the
trainable B (G, r, r). `miss` alone cuts W into shards of r inputs, all of which get the one D (r, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bone_ds.bone import form as forms
from bone_ds.errors import InjectionError


@dataclass(frozen=True)
class Grouping:
    shape: Callable[[int, int, int, int | None], tuple[int, ...]]
    """(out, in, r, groups) -> the shape of one trainable."""
    fits: Callable[[int, int, int, int | None], bool]
    """(out, in, r, groups) -> whether the layer can be cut this way."""
    over_blocks: Callable[[Tensor, range, range, int], Tensor] | None = None
    """B (..., G, r, r), rows of blocks, columns of blocks, in/r -> the matrices of these blocks, (..., rows or 1, columns or 1, r, r)."""
    product: Callable[[Tensor, Tensor], Tensor] = lambda block, B: block @ B
    """A block (..., r, r) and its matrix -> their product; the matrix stands on the block's right but for `left`."""


def _cuts_both_sides(out_features: int, in_features: int, r: int, groups: int | None = None) -> bool:
    return out_features % r == 0 and in_features % r == 0


def _free_fits(out_features: int, in_features: int, r: int, groups: int | None) -> bool:
    return _cuts_both_sides(out_features, in_features, r) and groups is not None and (out_features * in_features // r**2) % groups == 0


def _free_over_blocks(B: Tensor, rows: range, columns: range, in_blocks: int) -> Tensor:
    """Blocks are numbered along the rows of blocks, t = a (in/r) + b, and take the matrices in turn."""
    groups = B.shape[-3]
    if len(columns) < in_blocks:
        a, b = (torch.arange(part.start, part.stop, device=B.device) for part in (rows, columns))
        return B[..., (a[:, None] * in_blocks + b) % groups, :, :]
    # Not by index: its gradient is summed in B's dtype, one block after another.
    first, count = rows.start * in_blocks % groups, len(rows) * in_blocks
    in_turn = B.repeat(*[1] * (B.dim() - 3), math.ceil((first + count) / groups), 1, 1)
    return in_turn[..., first:first + count, :, :].unflatten(-3, (-1, in_blocks))


def _by_output(B: Tensor, rows: range, columns: range, in_blocks: int) -> Tensor:
    return B[..., rows.start:rows.stop, None, :, :]


GROUPINGS = {
    # W'_ab = W_ab + W_ab B_b + B_b: one matrix per block of inputs, shared down the column of blocks.
    "row": Grouping(
        shape=lambda out_features, in_features, r, groups: (in_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=lambda B, rows, columns, in_blocks: B[..., None, columns.start:columns.stop, :, :],
    ),
    # W'_ab = W_ab + W_ab B_a + B_a: one matrix per block of outputs, shared along the row of blocks.
    "col": Grouping(
        shape=lambda out_features, in_features, r, groups: (out_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=_by_output,
    ),
    # W'_ab = W_ab + B_a W_ab + B_a: col's sharing from the other side. Not the paper's.
    "left": Grouping(
        shape=lambda out_features, in_features, r, groups: (out_features // r, r, r),
        fits=_cuts_both_sides,
        over_blocks=_by_output,
        product=lambda block, B: B @ block,
    ),
    # W'_ab = W_ab + W_ab B_t + B_t, t = a (in/r) + b mod g: paper eq. 3 and 4. With g = in/r this is row.
    "free": Grouping(
        shape=lambda out_features, in_features, r, groups: (groups, r, r),
        fits=_free_fits,
        over_blocks=_free_over_blocks,
    ),
    # W'[o, b r + k] = W[o, b r + k] + D[k, o], the last shard of inputs may be a shorter one: what peft's MiSS does by default.
    "miss": Grouping(
        shape=lambda out_features, in_features, r, groups: (r, out_features),
        fits=lambda out_features, in_features, r, groups: r <= in_features,
    ),
}


def named(grouping: str) -> Grouping:
    """Raises InjectionError for a name that is not in `GROUPINGS`."""
    if grouping not in GROUPINGS:
        raise InjectionError(f"Bone grouping {grouping!r} is unknown, choose one of {', '.join(GROUPINGS)}")
    return GROUPINGS[grouping]


def bone_shape(grouping: str, out_features: int, in_features: int, r: int, form: str = "affine",
               groups: int | None = None) -> tuple[int, ...]:
    """The shape of B for a layer that r fits. groups: `free`'s number of matrices g."""
    one = named(grouping).shape(out_features, in_features, r, groups)
    trainables = forms.named(form, grouping).trainables
    return one if trainables == 1 else (trainables, *one)


def shape_pattern(grouping: str, r: int, form: str = "affine", groups: int | None = None) -> tuple[int | None, ...]:
    """The shape of B for a layer that isn't known: None for what follows from the layer."""
    trainables = forms.FORMS[form].trainables
    one = (r, None) if grouping == "miss" else (groups, r, r)
    return one if trainables == 1 else (trainables, *one)


def matches(shape: Sequence[int], pattern: Sequence[int | None]) -> bool:
    """Whether a tensor's shape is one of a `shape_pattern`."""
    return len(shape) == len(pattern) and all(want in (None, have) for want, have in zip(pattern, shape))


def fits(grouping: str, out_features: int, in_features: int, r: int, groups: int | None = None) -> bool:
    """Whether blocks of r x r can be grouped so on an (out, in) weight."""
    return r >= 1 and named(grouping).fits(out_features, in_features, r, groups)


def free_periods(in_blocks: int, groups: int) -> int:
    """After how many rows of blocks `free` gives a row the matrices of the first again: 1 where g divides in/r."""
    return groups // math.gcd(groups, in_blocks)


def largest_common_block(shapes: Iterable[tuple[int, int]]) -> list[int]:
    """Block sizes r that divide both sides of every (out, in) given, largest first; empty if none is given."""
    side = math.gcd(*(size for shape in shapes for size in shape))
    return divisors(side)


def divisors(number: int) -> list[int]:
    """Largest first; none of 0."""
    return [size for size in range(number, 0, -1) if number % size == 0]
