"""The plan's malloc beside the one of this machine, and the blocks of many layers beside those of three."""

import platform
import random
import subprocess
import sys

import pytest

from bone_ds.plan.blocks import BACKWARD, FORWARD, LOSS, START, Block, Origin, Segment, layout, whole
from bone_ds.plan.heap import Heap, fragmentation_bytes

MIB = 2**20

REPLAY = """
import ctypes, json, sys

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.free.argtypes = [ctypes.c_void_p]
events = json.load(sys.stdin)
places = [ctypes.c_void_p() for _ in range(1 + max(key for key, _ in events))]
before = libc.mallinfo2()
peak = 0
for key, size in events:
    if size:
        assert libc.posix_memalign(ctypes.byref(places[key]), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
        now = libc.mallinfo2()
        peak = max(peak, now.arena + now.hblkhd - before.arena - before.hblkhd)
    else:
        libc.free(places[key])
print(peak)
"""


def random_events(seed: int, most_bytes: int) -> list[tuple[int, int]]:
    """(key, bytes), 0 where it goes: of a few sizes, as layers have them, most of them gone in the order of a backward pass."""
    draw = random.Random(seed)
    sizes = [draw.randrange(most_bytes // 50, most_bytes) for _ in range(12)]
    events, alive = [], []
    for key in range(600):
        events.append((key, draw.choice(sizes)))
        alive.append(key)
        while alive and draw.random() < 0.48:
            events.append((alive.pop(draw.randrange(len(alive) // 2, len(alive))), 0))
    return events


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize("most_bytes", [MIB // 4, 4 * MIB, 48 * MIB])
def test_heap_is_malloc_s(most_bytes):
    """Together: what the interpreter has left free differs from process to process, and with it where each run of events ends."""
    held_bytes = expected_bytes = 0
    for seed in range(4):
        events = random_events(seed, most_bytes)
        heap = Heap()
        for key, size_bytes in events:
            if size_bytes:
                heap.allocate(key, size_bytes)
            else:
                heap.free(key)
        held_bytes += heap.peak_bytes
        done = subprocess.run([sys.executable, "-S", "-c", REPLAY], input=str([list(event) for event in events]), capture_output=True,
                              text=True, check=True)
        expected_bytes += int(done.stdout)
    assert held_bytes == pytest.approx(expected_bytes, rel=0.1)


def test_a_freed_block_serves_its_size_again_unless_something_settled():
    def held(settled_share: float) -> int:
        heap = Heap(settled_share)
        for key in range(20):
            heap.allocate(key, MIB // 10, graph=0)
        for key in range(0, 20, 2):
            heap.free(key)
        for key in range(20, 30):
            heap.allocate(key, MIB // 10)
        return heap.peak_bytes

    assert held(0.0) == pytest.approx(2 * MIB, rel=0.1)
    assert held(1.0) == pytest.approx(3 * MIB, rel=0.1)


def test_what_settled_makes_room_when_its_graph_is_gone():
    heap = Heap(1.0)
    for key in range(20):
        heap.allocate(key, MIB // 10, graph=0)
    for key in range(10):
        heap.free(key)
    heap.drop(0)
    before = heap.peak_bytes
    heap.allocate(20, MIB)
    assert heap.peak_bytes == before


def segment(part: str, layer: int | None, *blocks: tuple[tuple, int]) -> Segment:
    return Segment(part, layer, [Block(Origin(*origin), size_bytes, True) for origin, size_bytes in blocks])


def test_blocks_of_layers_that_were_left_out():
    """Each layer keeps a block until its backward, and frees in forward what the layer before it handed on."""
    recorded = [segment(START, None, ((START, None, 0), MIB))]
    for layer, handed_on in ((0, (START, None, 0)), (1, (FORWARD, 0, 1)), (2, (FORWARD, 1, 1))):
        kept, out = (FORWARD, layer, 0), (FORWARD, layer, 1)
        recorded.append(segment(FORWARD, layer, (kept, 2 * MIB), (out, MIB), (handed_on, 0)))
    recorded.append(segment(LOSS, None, ((FORWARD, 2, 1), 0)))
    recorded += [segment(BACKWARD, layer, ((FORWARD, layer, 0), 0)) for layer in (2, 1, 0)]
    blocks = [block for segment in whole(recorded, [0, 1, 1, 1, 2]) for block in segment.blocks]
    came = [block.origin for block in blocks if block.size_bytes]
    gone = [block.origin for block in blocks if not block.size_bytes]
    assert len(came) == len(set(came)) == 11 and set(came) == set(gone)
    assert [origin.layer for origin in gone[-5:]] == [4, 3, 2, 1, 0]
    assert fragmentation_bytes(whole(recorded, [0, 1, 1, 1, 2])) >= 0


@pytest.mark.parametrize("forms, places", [("aaaaa", [0, 1, 1, 1, 2]), ("aa", [0, 1]), ("aba", [0, 1, 2]),
                                           ("ababababab", [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]), ("abbbbb", [0, 1, 2, 2, 2, 3])])
def test_layout(forms, places):
    assert layout(forms, 3) == places
