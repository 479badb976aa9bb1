"""Steps whose loss or gradient is NaN or infinite: they change nothing; whether the run goes on, and which samples they had."""

from __future__ import annotations

from itertools import groupby

from bone_ds import engine as engines
from bone_ds.config import RunConfig
from bone_ds.data import Hand, Samples, Window
from bone_ds.errors import DataError
from bone_ds.progress import Progress
from bone_ds.run_directory import RunDirectory
from bone_ds.step import StepResult

MAX_SKIPPED = 10
_ROWS_SHOWN = 8


class BadSteps:
    """Counts them as they come in a row."""

    def __init__(self, config: RunConfig, samples: Samples, run: RunDirectory, progress: Progress):
        self.config, self.samples, self.run, self.progress = config, samples, run, progress
        self.in_a_row = 0

    def judge(self, step: int, result: StepResult, window: Window, hands: list[Hand], is_first: bool) -> None:
        """After every step, on every rank; hands: of this rank's batches, one for each batch.

        Writes down the samples of a bad step, and raises DataError where it is the last one.
        """
        if result.is_finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        train = self.config.train
        most = 0 if train.on_nan == "stop" else train.max_skipped or MAX_SKIPPED
        places = [self.samples.place(index) for index in _suspects(result, window, hands)]
        fault = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
        self.progress.say(f"{fault}: no weight was changed; its samples: {_shown(places)}")
        if is_first:
            self.run.record("bad_step", step=step, loss=result.loss, grad_norm=result.grad_norm, in_a_row=self.in_a_row, samples=places)
        if self.in_a_row > most:
            steps = f"{fault}, and so the {most} before it" if most else fault
            raise DataError(f"{steps}; checkpoints before it are whole, its samples stand in {self.run.events}\n"
                            f"Lower train.learning_rate: {train.learning_rate}, or mend those rows or leave them out with train.on_nan: "
                            "skip; in the first step, see also whether the model's own weights are sound")


def _suspects(result: StepResult, window: Window, hands: list[Hand]) -> list[int]:
    """The samples of the batches whose loss was not finite, on any rank; the whole window's where only the gradient was not."""
    mine = [index for number in result.bad_batches for unit in hands[number].units for index in unit]
    found = {index for of_rank in engines.gathered(mine) for index in of_rank}
    return sorted(found or {index for unit in window.units for index in unit})


def _shown(places: list[tuple[str, int]]) -> str:
    """`rows.jsonl: row 3, 17; more.jsonl: row 4 and 12 more`"""
    by_source = groupby(places[:_ROWS_SHOWN], lambda place: place[0])
    text = "; ".join(f"{source}: row {', '.join(str(row) for _, row in of_source)}" for source, of_source in by_source)
    return text + (f" and {len(places) - _ROWS_SHOWN} more" if len(places) > _ROWS_SHOWN else "")
