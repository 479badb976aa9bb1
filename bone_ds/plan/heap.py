"""What malloc holds beyond the blocks that come and go: as glibc's does, whose heap keeps what is freed between blocks that stay.

Read in malloc/malloc.c of glibc 2.36. A request is cut from the smallest free block that is large enough, and neighbours that are free
become one. torch aligns its blocks, for which malloc seeks 112 bytes more than it hands out; what is left over at both ends becomes free.
Where something small settles there, such as a node of autograd's graph, the block is too small for the next of its own size when it is
freed, and doesn't become one with its neighbours, until that graph is gone. Blocks of less than 1 KiB are left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence

from bone_ds.plan.blocks import BACKWARD, Segment

_HEADER_BYTES = 16
_SMALLEST_BYTES = 32
_ALIGNMENT_BYTES = 64
_SOUGHT_BEYOND_BYTES = _ALIGNMENT_BYTES + _SMALLEST_BYTES + _HEADER_BYTES
_PAGE_BYTES = 4096
_TOP_PAD_BYTES = 128 * 2**10
_FIRST_THRESHOLD_BYTES = 128 * 2**10
LARGEST_THRESHOLD_BYTES = 32 * 2**20
"""Larger blocks always have pages of their own."""
_LEAST_COUNTED_BYTES = 2**10
_SETTLED_SHARE = 0.3
"""Of the ends that are left over while autograd records; fitted, see benchmarks/plan_against_measured.py."""
_SPREAD = 0.6180339887498949
"""Of multiples of the golden ratio any share lies below it, evenly: the same in every plan."""
_MICRO_BATCHES = 2
"""The second is to live with the holes that the first has left."""
_OUTSIDE = -1


def fragmentation_bytes(segments: Sequence[Segment]) -> int:
    """The most that malloc holds, less the most that is alive."""
    heap = Heap(_SETTLED_SHARE)
    for micro_batch in range(_MICRO_BATCHES):
        _run(heap, micro_batch, segments)
    return heap.peak_bytes - heap.alive_peak_bytes


def _run(heap: Heap, micro_batch: int, segments: Sequence[Segment]) -> None:
    alive: set[Hashable] = set()
    for segment in segments:
        graph = _OUTSIDE if segment.layer is None else segment.layer
        for block in segment.blocks:
            key = (micro_batch, block.origin)
            if block.size_bytes and key not in alive:
                heap.allocate(key, block.size_bytes, graph if block.recorded else None)
                alive.add(key)
            elif not block.size_bytes and key in alive:
                heap.free(key)
                alive.remove(key)
        if segment.part == BACKWARD:
            heap.drop(graph)
    for key in sorted(alive, key=str):
        heap.free(key)
    heap.drop(_OUTSIDE)


class Heap:
    """Addresses without memory behind them."""

    def __init__(self, settled_share: float = 0.0):
        """settled_share: of the ends left over by blocks that belong to a graph, how many its small things settle in."""
        self._settled_share = settled_share
        self._mmap_threshold_bytes = _FIRST_THRESHOLD_BYTES
        self._trim_threshold_bytes = _FIRST_THRESHOLD_BYTES
        self._by_size: list[tuple[int, int]] = []
        """(size, address) of what is free below the top."""
        self._size_at: dict[int, int] = {}
        """The same by address."""
        self._start_before: dict[int, int] = {}
        """The same: end -> address."""
        self._top = 0
        """From here to the end all is free."""
        self._end = 0
        self._blocks: dict[Hashable, tuple[int, int]] = {}
        """Address and size."""
        self._mapped: dict[Hashable, int] = {}
        """Size of those that have pages of their own."""
        self._mapped_bytes = 0
        self._settled: dict[Hashable, list[tuple[int, int]]] = {}
        """By graph: address and size of the ends that something settled in."""
        self._ends = 0
        self._alive_bytes = 0
        self.peak_bytes = 0
        """The most that was held."""
        self.alive_peak_bytes = 0

    def allocate(self, key: Hashable, size_bytes: int, graph: Hashable | None = None) -> None:
        if size_bytes < _LEAST_COUNTED_BYTES:
            return
        needed = _up(size_bytes + _HEADER_BYTES // 2, _HEADER_BYTES)
        sought = needed + _SOUGHT_BEYOND_BYTES
        found = self._found(sought)
        if found is None:
            self._mapped[key] = _up(sought, _PAGE_BYTES)
            self._mapped_bytes += self._mapped[key]
            self._alive_bytes += self._mapped[key]
        else:
            self._blocks[key] = self._cut(*found, needed, graph)
            self._alive_bytes += self._blocks[key][1]
        self.peak_bytes = max(self.peak_bytes, self._end + self._mapped_bytes)
        self.alive_peak_bytes = max(self.alive_peak_bytes, self._alive_bytes)

    def free(self, key: Hashable) -> None:
        if key in self._mapped:
            size = self._mapped.pop(key)
            self._mapped_bytes -= size
            self._alive_bytes -= size
            if self._mmap_threshold_bytes < size <= LARGEST_THRESHOLD_BYTES:
                self._mmap_threshold_bytes, self._trim_threshold_bytes = size, 2 * size
        elif key in self._blocks:
            address, size = self._blocks.pop(key)
            self._alive_bytes -= size
            self._give_back(address, size)
            if self._end - self._top >= self._trim_threshold_bytes:
                self._end = self._end_for(self._top)

    def drop(self, graph: Hashable) -> None:
        """What settled with it is gone."""
        for address, size in self._settled.pop(graph, []):
            self._give_back(address, size)

    def _found(self, sought: int) -> tuple[int, int] | None:
        """Address and size of what is cut; None where the block is to have pages of its own."""
        place = bisect_left(self._by_size, (sought, 0))
        if place < len(self._by_size):
            address = self._by_size[place][1]
            return address, self._take_out(address)
        if self._top + sought + _SMALLEST_BYTES > self._end:
            if sought >= self._mmap_threshold_bytes:
                return None
            self._end = self._end_for(self._top + sought)
        self._top += sought
        return self._top - sought, sought

    def _cut(self, address: int, size: int, needed: int, graph: Hashable | None) -> tuple[int, int]:
        """The block within a free one, aligned."""
        start = _up(address + _HEADER_BYTES, _ALIGNMENT_BYTES) - _HEADER_BYTES
        if 0 < start - address < _SMALLEST_BYTES:
            start += _ALIGNMENT_BYTES
        self._leave_over(address, start - address, graph)
        rest = address + size - start - needed
        if rest < _SMALLEST_BYTES:
            return start, needed + rest
        self._leave_over(start + needed, rest, graph)
        return start, needed

    def _leave_over(self, address: int, size: int, graph: Hashable | None) -> None:
        settled = 0
        if graph is not None and size:
            self._ends += 1
            if self._ends * _SPREAD % 1 < self._settled_share:
                settled = min(size, _SOUGHT_BEYOND_BYTES)
                self._settled.setdefault(graph, []).append((address, settled))
        if size > settled:
            self._give_back(address + settled, size - settled)

    def _give_back(self, address: int, size: int) -> None:
        before = self._start_before.get(address)
        if before is not None:
            size += self._take_out(before)
            address = before
        if address + size in self._size_at:
            size += self._take_out(address + size)
        if address + size == self._top:
            self._top = address
            return
        self._size_at[address], self._start_before[address + size] = size, address
        insort(self._by_size, (size, address))

    def _take_out(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_before[address + size]
        del self._by_size[bisect_left(self._by_size, (size, address))]
        return size

    @staticmethod
    def _end_for(top: int) -> int:
        return _up(top + _SMALLEST_BYTES + _TOP_PAD_BYTES, _PAGE_BYTES)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
