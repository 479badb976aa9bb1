"""The blocks of a whole model's forward and backward in the order they come and go, from those of a model of three layers of each form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bone_ds.live import Moment

START, FORWARD, LOSS, BACKWARD = "start", "forward", "loss", "backward"


@dataclass(frozen=True)
class Mark:
    """The beginning of a segment."""

    position: int
    """How many blocks have come or gone."""
    part: str
    layer: int | None


@dataclass(frozen=True)
class Origin:
    """Where a block came: the how manieth of which segment."""

    part: str
    layer: int | None
    """None outside of layers: at the start, and from the last layer's end to its backward."""
    number: int


@dataclass(frozen=True)
class Block:
    """One that comes, or goes."""

    origin: Hashable
    size_bytes: int
    """0 where it goes."""
    recorded: bool
    """Whether autograd recorded what was computed when it came."""


@dataclass
class Segment:
    """What happens in one layer's forward or backward, or between them."""

    part: str
    layer: int | None
    blocks: list[Block] = field(default_factory=list)


def segments(moments: Sequence[Moment], before_bytes: int, marks: Sequence[Mark]) -> list[Segment]:
    """Blocks that were there before, of which there were so many bytes, are left out."""
    found, origins, total_bytes = [], {}, before_bytes
    for mark, following in pairwise([Mark(0, START, None), *marks, Mark(len(moments), "end", None)]):
        segment = Segment(mark.part, mark.layer)
        number = 0
        for moment in moments[mark.position:following.position]:
            size_bytes, total_bytes = moment.total_bytes - total_bytes, moment.total_bytes
            if size_bytes > 0:
                origins[moment.storage] = Origin(mark.part, mark.layer, number)
                number += 1
            if size_bytes and moment.storage in origins:
                segment.blocks.append(Block(origins[moment.storage], max(0, size_bytes), moment.recorded))
            if size_bytes < 0:
                origins.pop(moment.storage, None)
        found.append(segment)
    return found


def whole(found: list[Segment], layers: Sequence[int]) -> list[Segment]:
    """layers: for each of the whole model's, the one among those recorded that it is like."""
    outside = {segment.part: segment for segment in found if segment.layer is None}
    inside = {(segment.part, segment.layer): segment for segment in found if segment.layer is not None}
    forward = [_moved(inside[FORWARD, layer], place - layer) for place, layer in enumerate(layers)]
    backward = [_moved(inside[BACKWARD, layer], place - layer) for place, layer in enumerate(layers) if (BACKWARD, layer) in inside]
    return [outside[START], *forward, _moved(outside[LOSS], len(layers) - 1 - max(layers)), *reversed(backward)]


def _moved(segment: Segment, by: int) -> Segment:
    """As of a layer further on; what it frees of its neighbours' is that of its neighbours there."""
    moved = [Block(_moved_origin(block.origin, by), block.size_bytes, block.recorded) for block in segment.blocks]
    return Segment(segment.part, None if segment.layer is None else segment.layer + by, moved)


def _moved_origin(origin: Origin, by: int) -> Origin:
    return origin if origin.layer is None else Origin(origin.part, origin.layer + by, origin.number)


def layout(forms: Sequence[Hashable], run_of_each: int) -> list[int]:
    """For each layer of the whole model, which of the kept ones it is like: the first, the last or the second of its form."""
    kept: dict[Hashable, list[int]] = {}
    number_kept = 0
    for form in forms:
        if len(kept.setdefault(form, [])) < run_of_each:
            kept[form].append(number_kept)
            number_kept += 1
    counts, seen, found = Counter(forms), Counter(), []
    for form in forms:
        is_last = seen[form] == counts[form] - 1
        like = seen[form] if counts[form] <= run_of_each else -1 if is_last else min(1, seen[form])
        found.append(kept[form][like])
        seen[form] += 1
    return found
