"""The plan's malloc beside the one of this machine, and the blocks of many layers beside those of three."""

import platform
import random
import subprocess
import sys

import pytest

from bone_ds.plan.heap import Heap

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
    for seed in range(3):
        events = random_events(seed, most_bytes)
        heap = Heap()
        for key, size_bytes in events:
            heap.allocate(key, size_bytes) if size_bytes else heap.free(key)
        done = subprocess.run([sys.executable, "-S", "-c", REPLAY], input=str([list(event) for event in events]), capture_output=True,
                              text=True, check=True)
        assert heap.peak_bytes == pytest.approx(int(done.stdout), rel=0.1, abs=MIB // 2)
