"""The fault harness: what kills, damages and starves runs, and looks at what is left. `make test-faults`, or `python -m tests.faults`.

A part is a module here with a function `run(harness) -> list[Row]`. `harness.py` says what it is given; the rows are the figures it
sums up in, with their targets. The test suite runs the short form of a part: `run(short_form(tmp_path))` leaves no `failed`.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
# The tests' tiny models, and the benchmarks' rows.
sys.path += [path for path in (str(_TESTS), str(_TESTS.parent / "benchmarks")) if path not in sys.path]
