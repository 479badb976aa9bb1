"""The plan: every sample once an epoch, the same at every world size."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bone_ds.data import GlobalOrder, Report, Samples, collate, deal, evaluation_units, pack
from bone_ds.errors import ConfigError

CAPACITY = 32
lengths_strategy = st.lists(st.integers(2, CAPACITY), min_size=1, max_size=120)


def samples_of(lengths):
    """Samples whose tokens are their own index, with prompts of about half their length."""
    lengths = np.array(lengths, np.int64)
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    learnt = np.concatenate([np.arange(length) >= max(1, length // 2) for length in lengths])
    report = Report(len(lengths), len(lengths), 0, 0, 0, len(tokens), int(learnt.sum()), int(lengths.max()))
    return Samples(tokens, np.concatenate([[0], np.cumsum(lengths)]), learnt, 0, report)


def windows_of_epoch(order, epoch):
    return [order.window(step) for step in range(order.steps_in_epochs(epoch), order.steps_in_epochs(epoch + 1))]


def flat(units):
    return [index for unit in units for index in unit]


@given(lengths=st.lists(st.integers(1, CAPACITY), max_size=200), window=st.integers(1, 64))
def test_pack_takes_every_sample_once_and_keeps_the_capacity(lengths, window):
    packs = pack(lengths, CAPACITY, window)
    assert sorted(flat(packs)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= CAPACITY for members in packs)
    assert pack(np.array(lengths, np.int32), CAPACITY, window) == packs
    # best fit opens a pack only where no open one has room: no two packs would fit into one
    loads = sorted(sum(lengths[index] for index in members) for members in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > CAPACITY


def test_packs_are_full_and_quickly_made():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.5, 200_000), 8, 512).astype(int)
    start_s = time.perf_counter()
    packs = pack(lengths, 512)
    assert time.perf_counter() - start_s < 10
    assert lengths.sum() / (512 * len(packs)) > 0.98


def test_pack_mixes_anew_when_the_samples_come_in_another_order():
    lengths = np.random.default_rng(0).integers(4, CAPACITY, 2000)
    order = GlobalOrder(samples_of(lengths), True, CAPACITY, 8, seed=0)
    first, second = ({frozenset(unit) for window in windows_of_epoch(order, epoch) for unit in window.units if len(unit) > 1}
                     for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)


@given(lengths=lengths_strategy, packing=st.booleans(), batch=st.integers(1, 9), seed=st.integers(0, 3))
@settings(deadline=None)
def test_each_epoch_has_every_sample_once(lengths, packing, batch, seed):
    samples = samples_of(lengths)
    order = GlobalOrder(samples, packing, CAPACITY, batch, seed)
    for epoch in range(3):
        windows = windows_of_epoch(order, epoch)
        assert sorted(flat(unit for window in windows for unit in window.units)) == list(range(len(lengths)))
        assert [len(window.units) for window in windows[:-1]] == [batch] * (len(windows) - 1)
        assert 1 <= len(windows[-1].units) <= batch
        assert {window.epoch for window in windows} == {epoch}
        assert sum(window.label_tokens for window in windows) == samples.report.label_tokens
        for window in windows:
            assert window.unit_tokens == [sum(lengths[index] for index in unit) for unit in window.units]
            assert max(window.unit_tokens) <= CAPACITY
            assert packing or all(len(unit) == 1 for unit in window.units)


@given(lengths=lengths_strategy, packing=st.booleans(), step=st.integers(0, 60), seed=st.integers(0, 3))
@settings(deadline=None)
def test_a_window_depends_on_its_step_alone(lengths, packing, step, seed):
    samples = samples_of(lengths)
    walked = GlobalOrder(samples, packing, CAPACITY, 4, seed)
    for earlier in (*range(step), step + 40, 0):
        walked.window(earlier)
    assert walked.window(step) == GlobalOrder(samples, packing, CAPACITY, 4, seed).window(step)


def test_epochs_and_seeds_have_orders_of_their_own():
    samples = samples_of([4] * 50)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        windows = windows_of_epoch(GlobalOrder(samples, False, CAPACITY, 8, seed), epoch)
        orders.append(flat(unit for window in windows for unit in window.units))
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != list(range(50))


@given(lengths=lengths_strategy, packing=st.booleans(), world_size=st.integers(1, 5), micro=st.integers(1, 3),
       rounds=st.integers(1, 3))
@settings(deadline=None)
def test_the_ranks_together_see_exactly_the_window(lengths, packing, world_size, micro, rounds):
    samples = samples_of(lengths)
    batch = world_size * micro * rounds
    order = GlobalOrder(samples, packing, CAPACITY, batch, seed=1)
    for window in windows_of_epoch(order, 0):
        hands = [deal(window, rank, world_size, micro, batch) for rank in range(world_size)]
        assert {len(hand) for hand in hands} == {-(-len(window.units) // (world_size * micro))}
        dealt = [hand for mine in hands for hand in mine]
        assert all(len(hand.units) <= micro for hand in dealt)
        assert sorted(unit for hand in dealt for unit in hand.units) == sorted(window.units)
        batches = [collate(samples, hand.units, "cpu") for hand in dealt]
        assert sum(len(part.labels) for part in batches) == window.label_tokens
        if len(window.units) == batch:
            assert all(len(hand.units) == micro for hand in dealt)
        for together in zip(*hands, strict=True):
            assert all(hand.all_units == [other.units for other in together] for hand in together)


def test_the_world_size_changes_nothing_but_the_hands():
    samples = samples_of(np.random.default_rng(1).integers(2, CAPACITY, 301))
    for step in range(0, 12):
        seen = []
        for world_size in (1, 2, 3, 4, 5):
            window = GlobalOrder(samples, True, CAPACITY, 60, seed=2).window(step)
            hands = [deal(window, rank, world_size, 1, 60) for rank in range(world_size)]
            seen.append(sorted(unit for mine in hands for hand in mine for unit in hand.units))
        assert all(units == seen[0] for units in seen)


def test_ranks_get_about_equal_work_in_each_round():
    samples = samples_of(np.random.default_rng(1).integers(2, CAPACITY, 400))
    window = GlobalOrder(samples, False, CAPACITY, 64, seed=0).window(0)
    hands = [deal(window, rank, 4, 4, 64) for rank in range(4)]
    for parts in zip(*hands, strict=True):
        tokens = [sum(samples.lengths[unit].sum() for unit in hand.units) for hand in parts]
        assert max(tokens) <= 1.2 * min(tokens)


def test_an_idle_rank_in_the_last_window():
    samples = samples_of([4] * 9)
    order = GlobalOrder(samples, False, CAPACITY, 8, seed=0)
    assert order.steps_in_epochs(1) == 2
    last = order.window(1)
    hands = [deal(last, rank, 4, 1, 8) for rank in range(4)]
    assert sorted(hand.units for (hand,) in hands) == [[], [], [], last.units]
    assert sum(len(collate(samples, hand.units, "cpu").labels) for (hand,) in hands) == last.label_tokens == 2


def test_a_batch_that_does_not_divide_is_refused():
    window = GlobalOrder(samples_of([4] * 9), False, CAPACITY, 8, seed=0).window(0)
    with pytest.raises(ConfigError, match="train.global_batch_size: 8 is no multiple.* take a multiple of 6"):
        deal(window, 0, 3, 2, 8)


@given(lengths=lengths_strategy, packing=st.booleans())
def test_evaluation_has_every_sample_once(lengths, packing):
    units = evaluation_units(samples_of(lengths), packing, CAPACITY)
    assert sorted(flat(units)) == list(range(len(lengths)))
    assert packing or flat(units) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in unit) <= CAPACITY for unit in units)
