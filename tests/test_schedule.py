"""The course of the learning rate, step by step."""

import pytest

from bone_ds.config import TrainConfig
from bone_ds.step import learning_rate


def course(steps: int, **fields) -> list[float]:
    return [learning_rate(TrainConfig(learning_rate=1.0, **fields), step, steps) for step in range(steps)]


def test_warm_up_reaches_the_peak_and_the_course_starts_there():
    assert course(8, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert course(8, warmup_steps=4, schedule="linear") == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine():
    assert course(4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_final_ratio_is_what_is_left_at_the_end_of_the_course(schedule):
    fields = TrainConfig(learning_rate=2.0, schedule=schedule, final_lr_ratio=0.1)
    assert learning_rate(fields, 100, 100) == pytest.approx(0.2)
    assert all(0.2 < learning_rate(fields, step, 100) <= 2.0 for step in range(100))


def test_a_run_that_is_all_warm_up():
    assert course(3, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])
