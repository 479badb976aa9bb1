"""Trains as a config says, on one rank in this process, and writes the peak of live tensor bytes in its steps to a file.

    python benchmarks/live_peak.py CONFIG OUT [section.key=value ...]

The files that are mapped into memory while the model is loaded are tensors too, and left out. Counting slows every operation down: times
are measured elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bone_ds import train as training
from bone_ds.config import load_config
from bone_ds.launch import Ranks
from bone_ds.live import LiveMemory


def main() -> None:
    config, out, *overrides = sys.argv[1:]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    live, step = LiveMemory(), training.optimizer_step

    def first_step(*args):
        live.reset_peak()
        training.optimizer_step = step
        return step(*args)

    training.optimizer_step = first_step
    with live:
        training.train(load_config(config, overrides), Ranks(0, 0, 1, 1), force=True)
    Path(out).write_text(json.dumps({"live_peak_bytes": live.peak_bytes}))


if __name__ == "__main__":
    main()
