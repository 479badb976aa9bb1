"""The course of the learning rate, step by step."""

import pytest
import torch
from transformers import get_scheduler

from bone_ds.config import TrainConfig, conflicts_with_steps, validate
from bone_ds.errors import ConfigError
from bone_ds.step import learning_rate


def course(steps: int, **fields) -> list[float]:
    return [learning_rate(TrainConfig(learning_rate=1.0, **fields), step, steps) for step in range(steps)]


def test_warm_up_reaches_the_peak_and_the_course_starts_there():
    assert course(8, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert course(8, warmup_steps=4, schedule="linear") == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine():
    assert course(4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def library_course(make, steps: int) -> list[float]:
    """What a scheduler of torch's kind gives at each step of a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "cycles"), [(12, 2), (12, 3), (11, 4), (49, 7), (3, 5)])
def test_cosine_restarts_is_transformers(steps, cycles):
    theirs = library_course(lambda optimizer: get_scheduler(
        "cosine_with_restarts", optimizer, 0, steps, scheduler_specific_kwargs={"num_cycles": cycles}), steps)
    assert course(steps, schedule="cosine_restarts", cycles=cycles) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("cycle", "cycles", "last"), [(6, 2, 0.0), (5, 4, 0.25), (7, 7, 0.1)])
def test_cosine_restarts_of_whole_cycles_is_torchs(cycle, cycles, last):
    theirs = library_course(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle, eta_min=last),
                            cycle * cycles)
    ours = course(cycle * cycles, schedule="cosine_restarts", cycles=cycles, final_lr_ratio=last)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert [step for step, rate in enumerate(ours) if rate == 1.0] == list(range(0, cycle * cycles, cycle))


def test_restarts_begin_after_the_warm_up_and_are_two_unless_told():
    rates = course(10, schedule="cosine_restarts", warmup_steps=2)
    assert rates == pytest.approx([0.5, 1.0] + 2 * course(4, schedule="cosine"))


def test_exponential_is_torchs():
    gamma = 0.1**(1 / 8)
    theirs = library_course(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma), 8)
    assert course(8, schedule="exponential", final_lr_ratio=0.1) == pytest.approx(theirs, rel=1e-12)
    assert course(10, schedule="exponential", final_lr_ratio=0.1, warmup_steps=2) == pytest.approx([0.5, 1.0, *theirs], rel=1e-12)


@pytest.mark.parametrize("fields, says", [
    ({"schedule": "exponential"}, "train.final_lr_ratio: 0.0 is out of reach of train.schedule: exponential"),
    ({"cycles": 3}, "train.cycles: 3 is for train.schedule: cosine_restarts, this is 'cosine'"),
    ({"schedule": "cosine_restarts", "cycles": 1}, "train.cycles: 1"),
    ({"schedule": "cosine_restarts", "cycles": 10, "steps": 19},
     "train.cycles: 10 in the 19 steps after the warm-up, of train.steps: 19, are under 2 steps each"),
    ({"schedule": "cosine_restarts", "warmup_steps": 7, "steps": 10}, "train.cycles: 2 in the 3 steps after the warm-up"),
    ({"schedule": "cosine_restart"}, "did you mean 'cosine_restarts'?"),
], ids=str)
def test_a_course_that_is_refused(fields, says):
    tree = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "output": {"directory": "run"}, "train": fields}
    with pytest.raises(ConfigError) as error:
        validate(tree, "run.yaml")
    assert says in str(error.value)


def test_the_most_cycles_that_are_taken_still_fall():
    fields = TrainConfig(learning_rate=1.0, schedule="cosine_restarts", cycles=5, warmup_steps=2)
    assert not list(conflicts_with_steps(fields, 12))
    assert [learning_rate(fields, step, 12) for step in range(2, 12)] == pytest.approx(5 * [1.0, 0.5])
    assert list(conflicts_with_steps(fields, 11)) == [
        "train.cycles: 5 in the 9 steps after the warm-up, of the run's 11 steps, are under 2 steps each; give fewer, or more steps"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "cosine_restarts", "exponential"])
def test_the_final_ratio_is_what_is_left_at_the_end_of_the_course(schedule):
    fields = TrainConfig(learning_rate=2.0, schedule=schedule, final_lr_ratio=0.1)
    assert learning_rate(fields, 100, 100) == pytest.approx(0.2)
    assert all(0.2 < learning_rate(fields, step, 100) <= 2.0 for step in range(100))


def test_a_run_that_is_all_warm_up():
    assert course(3, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])
