"""What DeepSpeed's monitor sections ask for, counted in optimizer steps."""

from __future__ import annotations

from pathlib import Path


class Monitor:
    """Silent on every rank but the first, and where no section is on."""

    def __init__(self, engine):
        self._master = engine.monitor
        self._master.enabled = False  # DeepSpeed's own line counts samples, and from 0 again in a resumed run
        if csv := self._master.csv_monitor:
            csv.filenames = [path.stem for path in Path(csv.log_dir).glob("*.csv")]  # they have their header from the run before

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values by names like train/loss, which group them."""
        self._master.write_events([(name, value, step) for name, value in values.items()])
