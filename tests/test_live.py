"""Live bytes are counted from the operation that makes a storage until it is freed, under fake tensors alike."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bone_ds.live import OTHER, LiveMemory

KB = 1024


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


def kilobytes(count):
    return torch.zeros(count * KB, dtype=torch.uint8)


def test_storages_come_and_go():
    with LiveMemory() as live:
        a, b = kilobytes(3), kilobytes(5)
        assert live.total_bytes == live.peak_bytes == 8 * KB
        view = a.view(3, KB)[1]
        a.add_(1)
        assert live.total_bytes == 8 * KB
        del a
        assert live.total_bytes == 8 * KB  # the view holds its storage
        del view
        assert live.total_bytes == 5 * KB and live.peak_bytes == 8 * KB
        del b
    assert live.total_bytes == 0 and live.peak_bytes == 8 * KB


def test_what_dies_outside_is_seen():
    live = LiveMemory()
    with live:
        a = kilobytes(3)
    outside = kilobytes(7)
    del a
    with live:
        b = outside + 1
        assert live.total_bytes == 7 * KB and live.knows(b) and not live.knows(outside)


def test_components_at_the_peak():
    with LiveMemory() as live:
        with live.component("weights"):
            weights = kilobytes(4)
            with live.component("adapter"):
                adapter = kilobytes(2)
        activations = kilobytes(6)
        del activations
        live.claim("gradients", [adapter])
        assert dict(+live.by_component) == {"weights": 4 * KB, "gradients": 2 * KB}
    assert live.at_peak == {"weights": 4 * KB, "adapter": 2 * KB, OTHER: 6 * KB}
    assert sum(live.at_peak.values()) == live.peak_bytes
    live.reset_peak()
    assert live.peak_bytes == 6 * KB and live.at_peak == {"weights": 4 * KB, "gradients": 2 * KB}
    del weights, adapter
    assert live.total_bytes == 0


def test_tensors_from_before_are_claimed():
    before = kilobytes(3)
    live = LiveMemory()
    live.claim("weights", [before, before.view(-1, KB)])
    assert live.total_bytes == live.by_component["weights"] == 3 * KB
    del before
    assert live.total_bytes == live.by_component["weights"] == 0


def test_storages_are_rounded_up():
    with LiveMemory(granularity_bytes=512) as live:
        small = torch.zeros(513, dtype=torch.uint8)
        assert live.total_bytes == 2 * 512
        del small


def test_history_holds_every_change():
    with LiveMemory() as live, live.history() as history:
        with live.component("weights"):
            a = kilobytes(3)
        b = kilobytes(1)
        del b, a
    assert [moment.total_bytes // KB for moment in history] == [3, 4, 3, 0]
    assert history[1].by_component == {"weights": 3 * KB, OTHER: KB}
    first, second = history[0].storage, history[1].storage
    assert [moment.storage for moment in history] == [first, second, second, first]
    assert all(before.time_s <= after.time_s for before, after in zip(history, history[1:]))


def test_saved_and_recomputed_activations():
    """tanh keeps its output: three of them until backward, or one at a time when recomputed."""
    def peak_and_kept(run):
        x = torch.zeros(100 * KB, dtype=torch.float32, requires_grad=True)
        with LiveMemory() as live:
            y = run(x)
            kept = live.total_bytes
            y.sum().backward()
        return live.peak_bytes // (400 * KB), kept // (400 * KB)

    three = lambda x: x.tanh().tanh().tanh()
    assert peak_and_kept(three)[1] == 3
    assert peak_and_kept(lambda x: checkpoint(three, x, use_reentrant=False))[1] == 1


def test_meta_tensors_have_no_memory():
    with LiveMemory() as live:
        meta = torch.zeros(KB, device="meta")
        assert live.total_bytes == 0 and not live.knows(meta)
