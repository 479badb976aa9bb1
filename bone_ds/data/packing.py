"""Whole samples into packs of limited size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, window: int = 256) -> list[list[int]]:
    """Puts every index into one pack; the lengths in a pack sum to at most `capacity`.

    Best fit: a sample goes into the pack that it leaves fullest. Only within each `window` of samples does the longest go
    first, so that the shuffled order the caller gives decides who meets whom. Packs stay open to the end: later samples fill
    the gaps of earlier windows. Time: about samples x log(window) + samples x capacity / 64.
    """
    sizes = [int(length) for length in lengths]
    assert all(0 < size <= capacity for size in sizes), "samples were cut to the capacity before"
    capacity = min(capacity, sum(sizes))  # what lies beyond has no use, and costs a bit of `rooms` each
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = defaultdict(list)  # by room that is left
    rooms = 0  # bit i is set where open_packs[i] holds a pack: finds the best fit without a search
    for start in range(0, len(sizes), window):
        members = range(start, min(start + window, len(sizes)))
        for index in sorted(members, key=sizes.__getitem__, reverse=True):
            size = sizes[index]
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                chosen = open_packs[room].pop()
                packs[chosen].append(index)
                if not open_packs[room]:
                    rooms ^= 1 << room
            else:
                room, chosen = capacity, len(packs)
                packs.append([index])
            left = room - size
            if left:
                open_packs[left].append(chosen)
                rooms |= 1 << left
    return packs
