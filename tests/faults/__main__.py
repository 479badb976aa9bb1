"""Faults that are tried on real runs, files and hosts, part by part; a row each, written as it is found.

    python -m tests.faults [PART ...] [--seed N] [--count N] [--minutes M] [--quick] [--into DIRECTORY]

Each part writes DIRECTORY/PART.json, with the commit, machine and versions it comes from, and goes on from it where it was stopped and
no code has changed. The exit code is 1 where an attempt failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rows import Results, Row

from faults.harness import PACKAGES, Harness, SkippedError

PARTS = ("damage", "phases", "hosts", "kills")


def main() -> int:
    options = _options()
    parts = options.parts or [part for part in PARTS if importlib.util.find_spec(f"faults.{part}")]
    print(f"seed {options.seed}; rows in {options.into}/", flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    failed = {part: names for part in parts if (names := _try_part(part, options, deadline))}
    for part, names in failed.items():
        print(f"{part}: {len(names)} FAILED: {', '.join(names)}", flush=True)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--count", type=int, help="how many faults a part tries, by default as many as it says itself")
    parser.add_argument("--minutes", type=float, default=120, help="after so many no attempt is begun, over all parts (default 120)")
    parser.add_argument("--quick", action="store_true", help="the short form: a few of each kind, as in the test suite")
    parser.add_argument("--into", type=Path, default=Path(".faults"), metavar="DIRECTORY", help="where the rows go (default .faults)")
    parser.add_argument("--fresh", action="store_true", help="try again what has a row already")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _try_part(name: str, options: argparse.Namespace, deadline: float) -> list[str]:
    """The names of attempts that failed."""
    options.into.mkdir(parents=True, exist_ok=True)
    settings = {"part": name, "seed": options.seed}
    results = Results(options.into / f"{name}.json", settings, PACKAGES, options.fresh, options.quick, timed=False)
    work = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
    harness = Harness(results, work, options.seed, options.count, options.quick, deadline)
    part = importlib.import_module(f"faults.{name}")
    try:
        rows = part.run(harness)
    except SkippedError as reason:
        print(f"{name}: skipped: {reason}", flush=True)
        rows = []
    tried = len(results.measured)
    if tried:
        results.finish([*rows, Row("attempts that failed", len(harness.failed), f"of {tried}", at_most=0)])
    if time.monotonic() > deadline:
        print(f"{name}: the time is up: start it again to go on", flush=True)
    if harness.failed:
        print(f"{name}: what was tried last lies in {work}", flush=True)
    else:
        shutil.rmtree(work)
    return harness.failed


if __name__ == "__main__":
    sys.exit(main())
