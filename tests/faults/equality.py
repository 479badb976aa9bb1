"""Whether a run that was interrupted is, in all it leaves, the run that never was."""

from __future__ import annotations

from pathlib import Path

from started import events

from bone_ds import checkpoint
from bone_ds.run_directory import RunDirectory

COMPARED = {"step": ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "label_tokens"), "eval": ("loss", "label_tokens"),
            "checkpoint": ("held_out_loss",)}
"""Fields of events that don't tell times."""


def differences(run: Path, whole: Path) -> list[str]:
    """What is not equal to the bit: of every step the last events, the checkpoints that are left, the adapter. None where all is.

    A run also measures its held-out loss where it goes on, so it may have more of these; and one that was killed as soon as a checkpoint
    had its name has not recorded that.
    """
    found = [line for kind, fields in COMPARED.items() for line in _in_events(run, whole, kind, fields)]
    ours, theirs = RunDirectory(run), RunDirectory(whole)
    kept, expected = ([path.name for path in checkpoint.existing(directory.checkpoints)] for directory in (ours, theirs))
    if kept != expected:
        found.append(f"checkpoints {kept}, not {expected}")
    names = [Path("adapter.safetensors"), *(Path("checkpoints", name, file) for name in expected for file in (
        "adapter.safetensors", "state.safetensors"))]
    found += [f"{name} differs" for name in names if _contents(run / name) != _contents(whole / name)]
    found += [f"{path.relative_to(run)} is left" for path in sorted(run.rglob("*.partial"))]
    return found


def _in_events(run: Path, whole: Path, kind: str, fields: tuple[str, ...]) -> list[str]:
    ours, theirs = ({event["step"]: {field: event[field] for field in fields} for event in events(directory, kind)}
                    for directory in (run, whole))
    if kind == "step" and ours.keys() != theirs.keys():
        return [f"steps {sorted(ours.keys() ^ theirs.keys())} are of one run alone"]
    unrecorded = theirs.keys() - ours.keys() if kind == "checkpoint" else set()
    return [f"{kind} {step}: {ours.get(step)}, not {expected}" for step, expected in theirs.items()
            if step not in unrecorded and ours.get(step) != expected]


def _contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
