"""Adapter directories of Hugging Face PEFT: adapter_config.json beside adapter_model.safetensors.

| `peft_type` | `init_weights` | grouping here | tensor of a layer |
|---|---|---|---|
| `MISS`, PEFT 0.17 and later | true or false | miss | `MODULE.miss_block` (r, out) |
| | "bat" | col | `MODULE.miss_block` (out/r, r, r) |
| `BONE`, PEFT 0.14 to 0.18 | true or false | miss | `MODULE.bone_block` (r, out) |
| | "bat" | col | `MODULE.bone_block` (out/r, r, r) |

MODULE is the module's name in the model after `base_model.model.`. MiSS's "mini" is another method. `BoneModel.save_pretrained` writes
BONE with a `grouping`, `form` and `groups` of its own beside, which are read too.

Values keep every bit both ways. PEFT itself keeps them in fp32 on models of any dtype and, for `miss`, adds its term in fp32 before it
rounds; this project computes in the model's dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bone_ds import adapter_file, arch, bone, checksums, tensor_file
from bone_ds.adapter_file import FORMAT_VERSION, Header
from bone_ds.arch import Architecture, Source
from bone_ds.bone.grouping import matches, shape_pattern
from bone_ds.config import model_of
from bone_ds.errors import CheckpointError, ConfigError, InjectionError
from bone_ds.formats.coverage import rectangle
from bone_ds.formats.output import check_absent, chosen_dtype, write_aside
from bone_ds.merge import check_fit
from bone_ds.resolution import DTYPES
from bone_ds.tensor_file import save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:bone|miss)_block")
_NUMBERED = re.compile(r"(?:.*\.)?\d+(?:\..*)?")
_LAYER = re.compile(r"(.+?)\.(\d+)\..+")
_LORA = re.compile(r"(.+\.lora_(?:embedding_)?)([AB])(|\.weight)")
_INIT_WEIGHTS = {"miss": True, "col": "bat"}
_READ_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouping_of(init_weights: object) -> str:
    """PEFT's name of a variant of Bone or MiSS -> the grouping. Raises ConfigError for one that is not here."""
    if isinstance(init_weights, bool):
        return "miss"
    if init_weights == "bat":
        return "col"
    told = "is a variant of MiSS that is not here" if init_weights == "mini" else "is unknown"
    raise ConfigError(f"init_weights: {init_weights!r} {told}; True (miss) and 'bat' (col) are")


def import_adapter(path: Path, base: str, out: Path) -> Header:
    """Writes a PEFT directory as an adapter of this project for the model `base`. Raises CheckpointError, ConfigError."""
    check_absent(out)
    config = _read_config(path)
    tensors = _read_tensors(path)
    check_stated(path, _method(path, config))
    model_config = model_of(path=base)
    architecture = arch.resolve(model_config)
    source = architecture.open(model_config)
    header = _header(path, config, tensors, architecture, source)
    check_fit(path, header, tensors, architecture, source)
    write_aside(out, lambda aside: adapter_file.write(aside, header, tensors))
    return header


def export_adapter(path: Path, out: Path, dtype: str = "auto", reader: str = "peft") -> str:
    """Writes an adapter of this project as a directory that `reader` loads; returns the dtype it chose.

    dtype: bf16, fp32, or auto, which takes bf16 where that keeps every bit. reader: peft, as its MiSS, or bone-model, which is
    `BoneModel.from_pretrained`. Raises ConfigError for what the reader has no form for.
    """
    check_absent(out)
    header, tensors = adapter_file.read(path)
    _check_has_form(path, header, reader)
    dtype = chosen_dtype(tensors, dtype)
    part = "miss_block" if reader == "peft" else "bone_block"
    renamed = {f"base_model.model.{name.removesuffix('.bone')}.{part}": tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    config = _placement(header, next(iter(tensors))) | (_miss(header) if reader == "peft" else _bone(header))

    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(renamed, aside / WEIGHTS, metadata=stating(renamed, _method(out, config)))

    write_aside(out, write)
    return dtype


def stating(tensors: Mapping[str, Tensor], method: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of adapter_model.safetensors in which it states the CRC-32s of its tensors and of the method that they are of.

    method: r, grouping, form and groups.
    """
    return {"format": "pt"} | checksums.stating(tensors, _noted(method))


def check_stated(path: Path, method: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a directory's tensors, or the method that its configuration tells, are not what the file states.

    One that PEFT itself wrote states nothing.
    """
    try:
        with tensor_file.open_file(path / WEIGHTS) as file:
            stated = checksums.stated_in(path / WEIGHTS, file.metadata())
            found = checksums.crc32s({name: file.get_tensor(name) for name in file.keys()}, _noted(method)) if stated else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS} {tensor_file.unreadable(error)}") from None
    for name in sorted(stated.keys() ^ found.keys()):
        raise CheckpointError(f"{path / WEIGHTS}: is damaged: {name}: the file's header states other tensors than it holds")
    for name, value in found.items():
        checksums.check_stated(path / WEIGHTS, stated, name, value)


def _noted(method: Mapping[str, Any]) -> dict[str, bytes]:
    return {CONFIG: json.dumps(method, sort_keys=True).encode()}


def _method(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {"r": config["r"], "grouping": _grouping(path, config), "form": _form(config), "groups": config.get("groups")}


def outline(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, of any peft_type, and the tensors without data, from headers alone. Raises CheckpointError.

    Of MISS and BONE the shapes are held against the configuration, which tells grouping and form whoever wrote it, and every target
    that it names is to be on the same layers; of LORA every A is to have its B.
    """
    config = _read_json(path)
    if not (path / WEIGHTS).exists():
        raise _no_weights(path)
    tensors, _ = tensor_file.outline(path / WEIGHTS)
    if not tensors:
        raise CheckpointError(f"{path}: {WEIGHTS} holds no tensors")
    if config.get("peft_type") in ("MISS", "BONE") and config.get("init_weights") != "mini":
        _check_sizes(path, config)
        _check_blocks(path, config, tensors)
        config |= {"grouping": _grouping(path, config), "form": _form(config)}
    if config.get("peft_type") in ("MISS", "BONE"):
        _check_layers(path, config, tensors)
    if config.get("peft_type") == "LORA":
        _check_pairs(path, tensors)
    return config, tensors


def adapters_in(path: Path) -> list[str]:
    """The subdirectories that hold one: `save_pretrained` makes them for adapters not called default, a Trainer for checkpoints."""
    return sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))


def _check_blocks(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """That the layers' tensors have shapes of this block size, grouping and form; what was trained whole beside them has any."""
    grouping, form = _grouping(path, config), _form(config)
    try:
        bone.resolve("auto", grouping, form)
    except (InjectionError, TypeError) as error:  # TypeError: names that are lists
        raise CheckpointError(f"{path}: its {CONFIG} describes no adapter: {error}") from None
    pattern = shape_pattern(grouping, config["r"], form, config.get("groups"))
    for name, tensor in tensors.items():
        if _TENSOR.fullmatch(name) and not matches(tensor.shape, pattern):
            raise CheckpointError(f"{path}: {name}: has shape {tuple(tensor.shape)}, which does not fit {CONFIG}'s r {config['r']}, "
                                  f"grouping {grouping}, form {form}")


def _check_layers(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """That every target is on the layers that the others are on. A pattern, or a target of a single layer, may choose any."""
    modules = [match[1] for name in tensors if (match := _TENSOR.fullmatch(name))]
    if not modules:
        raise CheckpointError(f"{path}: {WEIGHTS} holds no tensor MODULE.bone_block or MODULE.miss_block")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return
    targets = [target for target in map(str, targets) if not _NUMBERED.fullmatch(target)]
    found: dict[str, dict[str, set[int]]] = {}
    for module in modules:
        layer = _LAYER.fullmatch(module)
        target = next((name for name in targets if f".{module}".endswith(f".{name}")), None)
        if layer and target:
            found.setdefault(layer[1], {}).setdefault(target, set()).add(int(layer[2]))
    for layers_name, by_target in found.items():
        for target, layers in by_target.items():
            if missing := set.union(*by_target.values()) - layers:
                raise CheckpointError(f"{path}: has no tensor for {target} of {layers_name}.{min(missing)}, but for other layers' {target} "
                                      "and other targets of that layer")


def _check_pairs(path: Path, tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if match := _LORA.fullmatch(name):
            partner = f"{match[1]}{'B' if match[2] == 'A' else 'A'}{match[3]}"
            if partner not in tensors:
                raise CheckpointError(f"{path}: {partner}: is missing beside {name}")


def _check_has_form(path: Path, header: Header, reader: str) -> None:
    if header.method != "bone":
        raise ConfigError(f"{path}: is {header.method}; {reader} has a form for bone alone")
    form = header.form or "affine"
    if reader == "peft" and (header.grouping not in _INIT_WEIGHTS or form != "affine"):
        raise ConfigError(f"{path}: is bone with grouping {header.grouping} and form {form}; PEFT has bone with grouping miss or col and "
                          "form affine alone; --to bone-model writes a directory for BoneModel")


def _placement(header: Header, name: str) -> dict[str, Any]:
    """Base and modules as PEFT's configurations say them; name: of a tensor, which tells what the layers are called."""
    return {
        "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": header.base, "revision": header.base_revision,
        "r": header.rank, "bias": "none", "target_modules": header.targets, "exclude_modules": None, "modules_to_save": None,
        "layers_to_transform": None if header.layers is None else list(range(*header.layers)),
        "layers_pattern": None if header.layers is None else re.match(r"(?:.*?\.)?(\w+)\.\d+\.", name)[1],
    }


def _miss(header: Header) -> dict[str, Any]:
    return {"peft_type": "MISS", "init_weights": _INIT_WEIGHTS[header.grouping], "miss_dropout": 0.0, "mini_r": 1}


def _bone(header: Header) -> dict[str, Any]:
    form = header.form or "affine"
    init_weights = _INIT_WEIGHTS.get(header.grouping, True) if form == "affine" else True
    return {"peft_type": "BONE", "init_weights": init_weights, "grouping": header.grouping, "form": form, "groups": header.groups}


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("peft_type") not in ("MISS", "BONE"):
        raise CheckpointError(f"{path}: is of peft_type {config.get('peft_type')!r}; MISS and BONE are read")
    for field in ("modules_to_save", "bias"):
        if config.get(field) not in (None, [], "none"):
            raise CheckpointError(f"{path}: {field}: {config[field]!r} was trained beside the adapter, which adapter.safetensors can't "
                                  "hold; BoneModel.from_pretrained loads it")
    _check_sizes(path, config)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path}: holds no {CONFIG}; name the directory of a PEFT adapter") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its {CONFIG} is damaged") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its {CONFIG} holds a {type(config).__name__}, not a JSON object")
    return config


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    if not isinstance(config.get("r"), int) or isinstance(config["r"], bool) or config["r"] < 1:
        raise CheckpointError(f"{path}: r: {config.get('r')!r} is no block size")
    grouping = _grouping(path, config)
    if (config.get("groups") is None) == (grouping == "free"):
        raise CheckpointError(f"{path}: groups: {config.get('groups')!r} with grouping {grouping!r}: free alone has them")


def _form(config: dict[str, Any]) -> str:
    return config.get("form") or "affine"


def _grouping(path: Path, config: dict[str, Any]) -> str:
    try:
        return config.get("grouping") or grouping_of(config.get("init_weights", True))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """In fp32, by the names they have in an adapter of this project."""
    try:
        with tensor_file.open_file(path / WEIGHTS) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise _no_weights(path) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS} {tensor_file.unreadable(error)}") from None
    if not tensors:
        raise CheckpointError(f"{path}: {WEIGHTS} holds no tensors")
    return {_our_name(path, name): _widened(path, name, tensor) for name, tensor in tensors.items()}


def _no_weights(path: Path) -> CheckpointError:
    also = "; its adapter_model.bin is not read, save it with safe_serialization=True" if (path / "adapter_model.bin").exists() else ""
    return CheckpointError(f"{path}: holds no {WEIGHTS}{also}")


def _our_name(path: Path, name: str) -> str:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{path}: {name}: is no tensor of Bone or MiSS, which are base_model.model.MODULE.bone_block or .miss_block")
    return f"{match[1]}.bone"


def _widened(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _READ_DTYPES:
        raise CheckpointError(f"{path}: {name}: is {str(tensor.dtype).removeprefix('torch.')}, not bfloat16, float16 or float32")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name}: holds NaN or infinite values")
    return tensor.float()


def _header(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], architecture: Architecture, source: Source) -> Header:
    """Targets and layers are read from the tensors' names, whatever way the configuration chose them."""
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    layers, targets = _coverage(path, tensors, architecture, model, source)
    header = Header(
        format_version=FORMAT_VERSION, architecture=architecture.name, method="bone", grouping=_grouping(path, config),
        rank=config["r"], alpha=None, targets=[target for target in architecture.targets if target in targets],
        layers=None if layers == (0, len(architecture.layers(model))) else list(layers), base=source.origin,
        base_revision=source.revision, base_dtype="bf16", base_fingerprint=source.fingerprint, step=0, form=_form(config),
        groups=config.get("groups"))
    adapter_file.check_describes_adapter(path, header, f"its {CONFIG}")
    return header


def _coverage(path: Path, tensors: dict[str, Tensor], architecture: Architecture, model: nn.Module,
              source: Source) -> tuple[tuple[int, int], set[str]]:
    names = [name for name, _ in architecture.layers(model)]
    found: dict[int, set[str]] = {}
    for tensor in tensors:
        module = tensor.removesuffix(".bone")
        layer = next((index for index, name in enumerate(names) if module.startswith(f"{name}.")), None)
        target = next((target for target in architecture.targets if f".{module}".endswith(f".{target}")), None)
        if layer is None or target is None:
            raise CheckpointError(f"{path}: {module}: is no module of {source.origin} that `bone-ds` adapts: "
                                  f"{', '.join(architecture.targets)} of {len(names)} layers")
        found.setdefault(layer, set()).add(target)
    return rectangle(path, found, names[0].rpartition(".")[0])
