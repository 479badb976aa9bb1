"""What DeepSpeed's monitor sections ask for, counted in optimizer steps.

DeepSpeed's own engine is told of none: it would open them while the run may still fail, and report by samples, from 0 again in a
resumed run.
"""

from __future__ import annotations

import os
from pathlib import Path

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from bone_ds import publishing
from bone_ds.errors import ConfigError

_KINDS = {"wandb": WandbMonitor, "tensorboard": TensorBoardMonitor, "csv_monitor": csvMonitor}
"""Weights & Biases first: it may be refused, and nothing lies in the run directory then."""


class Monitor:
    """Silent where no section is on."""

    def __init__(self, sections: dict[str, dict], first_step: int | None):
        """first_step: how many steps the run has done if it reported to the same place before; what it did of later ones is forgotten.

        Raises ConfigError where Weights & Biases can't start, and OSError where files can't be written.
        """
        self._first_step = first_step
        config = get_monitor_config(sections)
        names = [name for name in _KINDS if sections.get(name, {}).get("enabled")]
        self._monitors = {name: _started(name, getattr(config, name)) for name in names}
        self._directories = {name: Path(sections[name].get("output_path", name)) for name in names}
        if csv := self._monitors.get("csv_monitor"):
            _go_on(csv, first_step)
        if first_step is not None and (tensorboard := self._monitors.get("tensorboard")):
            _hide_after(tensorboard, first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values by names like train/loss, which group them; of a step that a resumed run has reported before, nothing.

        Raises CheckpointError where a file can't be written.
        """
        if self._first_step is not None and step <= self._first_step:
            return
        for name, monitor in self._monitors.items():
            with publishing.writing(self._directories[name]):
                monitor.write_events([(of, value, step) for of, value in values.items()])


def _started(name: str, section):
    try:
        return _KINDS[name](section)
    except Exception as error:
        if name != "wandb":
            raise
        said = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise ConfigError(f"deepspeed.config: wandb: {said}; run `wandb login`, or set wandb.enabled to false") from None


def _go_on(csv: csvMonitor, first_step: int | None) -> None:
    """In the files of the run before, which have their header."""
    paths = sorted(Path(csv.log_dir).glob("*.csv"))
    for path in paths if first_step is not None else ():
        _drop_rows_after(path, first_step)
    csv.filenames = [path.stem for path in paths if path.stat().st_size]


def _drop_rows_after(path: Path, step: int) -> None:
    """Of the file's end alone, since several runs may share it; a row that a kill has torn goes too."""
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and (not lines[-1].endswith(b"\n") or _step_of(lines[-1]) > step):
        lines.pop()
    os.truncate(path, sum(map(len, lines)))


def _step_of(row: bytes) -> int:
    """0 of a header."""
    cell = row.partition(b",")[0]
    return int(cell) if cell.isdigit() else 0


def _hide_after(tensorboard: TensorBoardMonitor, step: int) -> None:
    """As `SummaryWriter(purge_step=...)` says it to TensorBoard, which DeepSpeed doesn't pass on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    tensorboard.summary_writer.file_writer.add_event(restart)
