"""Run directories and the checkpoints in them."""

from __future__ import annotations

from pathlib import Path

from bone_ds import arch, checkpoint
from bone_ds.config import RunConfig, load_config
from bone_ds.errors import BoneError
from bone_ds.inspection import adapters, events, models
from bone_ds.inspection.events import Events
from bone_ds.inspection.report import Inspection
from bone_ds.run_directory import RunDirectory

_FILES = ("config.yaml", "deepspeed.json", "events.jsonl", "log.txt")


def inspect_checkpoint(path: Path) -> Inspection:
    """Raises CheckpointError where a file is missing, cut off, or lacks a tensor."""
    manifest, header, tensors = checkpoint.outline(path)
    run = RunDirectory(path.absolute().parent.parent)
    is_of_run = run.checkpoints == path.absolute().parent  # it may have been copied elsewhere
    return Inspection(str(path), "training checkpoint: adapter and optimizer state", {
        "size_bytes": models.size_bytes(path), "step": manifest.step, "held_out_loss": manifest.held_out_loss,
        "world_size": manifest.world_size, **adapters.form_of(header), **adapters.sizes(arch.load(header.architecture), tensors),
        "base": header.base, "base_fingerprint": manifest.base_fingerprint, "data_fingerprint": manifest.data_fingerprint,
        "trained_on": events.trained_on(run, manifest.base_fingerprint) if is_of_run else None})


def inspect_run(path: Path) -> Inspection:
    """Of a run that has ended, was stopped, or goes on; all that is missing or damaged is in `problems`."""
    run = RunDirectory(path)
    problems = [f"{path / name}: is missing" for name in _FILES if not (path / name).exists()]
    config = _noted(problems, load_config, path / "config.yaml") if (path / "config.yaml").exists() else None
    found = _noted(problems, events.read, run) if run.events.exists() else None
    last = found or Events({}, [])
    kept = [one for path in checkpoint.existing(run.checkpoints) if (one := _checkpoint(problems, path))]
    _check_recorded(problems, run, last)
    adapter = _noted(problems, adapters.inspect_adapter, run.adapter) if run.adapter.exists() else None
    if adapter and config:
        _check_form(problems, run, adapter, config)
    if adapter:
        _check_step(problems, run, adapter, last, kept)
    return Inspection(str(path), "run directory", {
        "state": _state(last), **(_configured(config) if config else {}),
        "trained_on": events.trained_on(run), "trainable_parameters": last.last.get("start", {}).get("trainable_parameters"),
        "loss": last.last.get("step", {}).get("loss"), "held_out_loss": last.last.get("eval", {}).get("loss"),
        "adapter": adapter and {"file": run.adapter.name, "step": adapter.facts["step"]},
        "checkpoints": kept, "torn_lines_of_events": last.torn_lines,
        "left_over": sorted(file.name for pattern in ("*.partial", "checkpoints/*.*") for file in path.glob(pattern))},
        tuple(problems))


def _noted(problems: list[str], look, path):
    """What `look` returns; None where it finds a problem, which is noted."""
    try:
        return look(path)
    except BoneError as error:
        problems.append(" ".join(str(error).split()))
        return None


def _configured(config: RunConfig) -> dict[str, object]:
    adapter = config.adapter
    bone, ranked = adapter.method == "bone", adapter.method in ("bone", "lora")
    return {"model": config.model.path, "dtype": config.model.dtype, "method": adapter.method,
            "grouping": adapter.grouping if bone else None, "form": adapter.form if bone else None,
            "groups": adapter.groups if bone else None,
            "rank": adapter.rank if ranked and adapter.has_rank else None,
            "targets": list(adapter.targets or ()) or None, "layers": list(adapter.layers or ()) or "all"}


def _checkpoint(problems: list[str], path: Path) -> dict[str, object] | None:
    found = _noted(problems, checkpoint.outline, path)
    return found and {"file": path.name, "step": found[0].step, "size_bytes": models.size_bytes(path),
                      "held_out_loss": found[0].held_out_loss}


def _check_recorded(problems: list[str], run: RunDirectory, found: Events) -> None:
    """The last checkpoint that the run says it wrote must be there, and its adapter."""
    recorded = found.last.get("checkpoint")
    if recorded is None:
        return
    path = run.path / str(recorded.get("path"))
    if path not in checkpoint.existing(run.checkpoints):
        problems.append(f"{path}: is missing; events.jsonl says it was written")
    if not run.adapter.exists():
        problems.append(f"{run.adapter}: is missing; it is written with every checkpoint")


def _check_form(problems: list[str], run: RunDirectory, adapter: Inspection, config: RunConfig) -> None:
    configured = _configured(config)
    for field in ("method", "grouping", "rank"):
        if configured[field] is not None and adapter.facts[field] != configured[field]:
            problems.append(f"{run.adapter}: its {field} is {adapter.facts[field]}, config.yaml's is {configured[field]}")


def _check_step(problems: list[str], run: RunDirectory, adapter: Inspection, found: Events, kept: list[dict[str, object]]) -> None:
    """That the adapter is of the last checkpoint; a run that was killed may have written a later one without recording it."""
    recorded, step = found.last.get("checkpoint", {}).get("step"), adapter.facts["step"]
    if recorded is not None and step not in (recorded, *(one["step"] for one in kept[-1:])):
        problems.append(f"{run.adapter}: is of step {step}, the last checkpoint of step {recorded}")


def _state(found: Events) -> str:
    start, step, end = (found.last.get(kind, {}) for kind in ("start", "step", "end"))
    if not start:
        return "never started"
    done, of = step.get("step", start.get("step")), start.get("steps")
    return f"ended after step {done} of {of}" if end else f"at step {done} of {of}, not ended; stopped, or still going on"
