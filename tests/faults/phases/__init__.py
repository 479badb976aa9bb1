"""Runs in each of their phases: asked to stop, on a full disk, with numbers that are not finite, out of memory.

Two ranks train a tiny model by the command line. What is gone on from ends as the run that nothing happened to, to the bit.
"""

from __future__ import annotations

from rows import Row

from faults.harness import Harness
from faults.phases import full_disk, memory, not_finite, signals


def run(harness: Harness) -> list[Row]:
    return [row for part in (full_disk, memory, not_finite, signals) for row in part.run(harness)]
