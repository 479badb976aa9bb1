"""What a run's events.jsonl tells."""

from __future__ import annotations

import json
from dataclasses import dataclass

from bone_ds.errors import CheckpointError
from bone_ds.run_directory import RunDirectory


@dataclass(frozen=True)
class Events:
    """The last event of each kind, and the lines that are none: a killed run may leave half a line.

    A start goes on from a checkpoint: later steps than its own, and an end, are not done any more.
    """

    last: dict[str, dict]
    torn_lines: list[int]


def read(run: RunDirectory) -> Events:
    """Raises CheckpointError where the file can't be read."""
    last, torn = {}, []
    try:
        lines = run.events.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"{run.events}: can't be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            _ = event["time"] + 0.0
            last[event["event"]] = event
            if event["event"] == "start":
                last = {kind: one for kind, one in last.items() if kind != "end" and one.get("step", 0) <= event.get("step", 0)}
        except (ValueError, RecursionError, TypeError, KeyError):
            torn.append(number)
    return Events(last, torn)


def trained_on(run: RunDirectory, base_fingerprint: str | None = None) -> list[dict] | None:
    """Name, samples and weight of each source; None where no run tells it, or one of another base than the given one."""
    try:
        start = read(run).last.get("start", {})
        if base_fingerprint and start.get("model", {}).get("fingerprint") != base_fingerprint:
            return None
        sources = start.get("sources", [])
        return [{"source": source["name"], "samples": source["samples"], "weight": source.get("weight"),
                 "commits": source.get("commits") or None} for source in sources] or None
    except (CheckpointError, TypeError, KeyError, AttributeError):
        return None
