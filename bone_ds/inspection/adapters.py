"""Adapters: this project's file, a PEFT directory, an RWKV-PEFT .pth."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bone_ds import adapter_file, arch, merge
from bone_ds.adapter_file import Header
from bone_ds.arch import Architecture
from bone_ds.errors import BoneError, CheckpointError
from bone_ds.formats import peft, rwkv_peft
from bone_ds.formats.coverage import rectangle
from bone_ds.inspection import models
from bone_ds.inspection.events import trained_on
from bone_ds.inspection.report import Inspection
from bone_ds.run_directory import RunDirectory

_PARTS = {"bone": ("bone",), "lora": ("lora_A", "lora_B"), "state": ("time_state",)}
"""A module's tensors by method."""

_MODULE = re.compile(r"(.+?)\.(\d+)\.(.+)")


def inspect_adapter(path: Path) -> Inspection:
    """Raises CheckpointError where the file is damaged, lacks a tensor, or does not fit the base that lies where it was trained."""
    header, tensors = adapter_file.outline(path)
    architecture = arch.load(header.architecture)
    if header.method in _PARTS:
        _check_coverage(path, header, tensors)
    return Inspection(str(path), f"{_named(header.method)} adapter for {header.architecture}", {
        "size_bytes": models.size_bytes(path), **form_of(header), **sizes(architecture, tensors),
        "base": {"path": header.base, "revision": header.base_revision, "dtype": header.base_dtype, "fingerprint": header.base_fingerprint,
                 "now": _base_now(path, header, tensors, architecture)},
        "step": header.step, "trained_on": _trained_on(path, header)})


def _trained_on(path: Path, header: Header) -> list[dict] | None:
    """Known of the adapter that a run wrote where it lies; another file, or of another base, is none of that run's."""
    run = RunDirectory(path.parent)
    return trained_on(run, header.base_fingerprint) if path == run.adapter else None


def inspect_peft(directory: Path) -> Inspection:
    """Of any peft_type; BoneModel's is BONE. Raises CheckpointError."""
    config, tensors = peft.outline(directory)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    fields = ("peft_type", "init_weights", "grouping", "form", "groups", "r", "target_modules", "exclude_modules", "layers_to_transform",
              "modules_to_save", "bias")
    return Inspection(str(directory), f"PEFT adapter, {config.get('peft_type')}", {
        "size_bytes": models.size_bytes(directory), **{field: config.get(field) for field in fields},
        "targets_without_tensors": _without_tensors(config, tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()), "tensors": len(tensors), "dtype": ", ".join(dtypes),
        "base": {"path": config.get("base_model_name_or_path"), "revision": config.get("revision")},
        "further_adapters": peft.adapters_in(directory)})


def _without_tensors(config: dict[str, object], tensors: Mapping[str, Tensor]) -> list[str]:
    """Target modules by name that are not in the file: a model may lack some of them, so that is no damage."""
    targets = config.get("target_modules")
    return [target for target in targets if not any(f".{target}." in name for name in tensors)] if isinstance(targets, list) else []


def inspect_rwkv_peft(path: Path, tensors: Mapping[str, Tensor]) -> Inspection:
    """Raises CheckpointError."""
    method, grouping, rank, layers, modules = rwkv_peft.outline(path, tensors)
    return Inspection(str(path), f"RWKV-PEFT file, {_named(method)}", {
        "size_bytes": models.size_bytes(path), "method": method, "grouping": grouping, "rank": rank, "targets": modules,
        "layers": list(layers), **sizes(arch.load("rwkv"), tensors)})


def form_of(header: Header) -> dict[str, object]:
    return {"method": header.method, "grouping": header.grouping, "form": header.form, "groups": header.groups, "rank": header.rank,
            "alpha": header.alpha, "targets": header.targets, "layers": header.layers or "all"}


def sizes(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        counts[models.kind_of(architecture, name)] += tensor.numel()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return {"parameters": sum(counts.values()), "parameters_by_kind": dict(counts.most_common()), "tensors": len(tensors),
            "dtype": ", ".join(dtypes)}


def _named(method: str) -> str:
    return {"bone": "Bone", "lora": "LoRA", "state": "initial state", "full": "all weights"}[method]


def _check_coverage(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """That every part of every target is there on a range of layers, which is the header's where it names one."""
    modules = adapter_file.by_module(tensors)
    found: dict[int, set[str]] = {}
    for module, parts in modules.items():
        for part in _PARTS[header.method]:
            if part not in parts:
                raise CheckpointError(f"{path}: {module}.{part}: is missing")
        match = _MODULE.fullmatch(module)
        if match is None:
            raise CheckpointError(f"{path}: {module}: is no module of a layer")
        found.setdefault(int(match[2]), set()).add(match[3])
    (first, last), _ = rectangle(path, found, _MODULE.fullmatch(next(iter(modules)))[1])
    for target in header.targets:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            raise CheckpointError(f"{path}: has no tensor for {target}, one of the header's targets")
    if header.layers and header.layers != [first, last] or not header.layers and first != 0:
        raise CheckpointError(f"{path}: has tensors for the layers [{first}, {last}), its header says {header.layers or 'all'}")


def _base_now(path: Path, header: Header, tensors: dict[str, Tensor], architecture: Architecture) -> str:
    """What lies today where the base lay in training; raises CheckpointError where it is the base and the adapter does not fit."""
    if not Path(os.path.expanduser(header.base)).exists():
        return "not on this machine at that path"
    try:
        source = models.at(header.base)
    except BoneError:
        return "what lies there is no whole model"
    if not source.fingerprint:
        return "a .gguf, whose fingerprint only its conversion tells"
    if source.fingerprint != header.base_fingerprint:
        return f"another model lies there, of fingerprint {source.fingerprint}"
    merge.check_fit(path, header, tensors, architecture, source)
    return "the same model lies there"
