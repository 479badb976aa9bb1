"""RWKV-PEFT's files of Bone adapters and initial states: a .pth that holds a dictionary of tensors.

Bone: `blocks.N.MODULE.bone`, later `.disha`, each (in/r, r, r). The program computes, with W (out, in) cut into blocks
(a, b, r, r), W + W_ab @ bone_b + bone_b: the grouping `row` of this project, block for block and without transposition
(github.com/JL-er/RWKV-PEFT: `.bone` in src/rwkvLinear.py, class BoneLinear, at 26c612d458542f208b7eefd71d2248cb804bae57 and
merge/merge_bone.py at 132ffe7cab7780df1e5f3f1dcbee1fe97e28b9b8; `.disha` in rwkvt/peft/rwkvLinear.py, class BatLinear, and
merge/merge_disha.py, both at 7912a0c5c928859d9d83b053ff62ae68c5c27520). Its two-dimensional `.disha` (r, out) add D to every shard
of the inputs, the last one filled up with zeros (class BoneLinear of that last commit): the grouping `miss`, as it stands too.

For some time before, its `.bone` was the grouping `col` (out/r, r, r), which merge_bone.py keeps as a comment. The shapes differ on
ffn.key and ffn.value, so such a file is refused there; one on square layers alone can't be told from `row`.

State: `blocks.N.att.time_state` (H, N, N), as this project keeps it (class RWKV_Tmix_x060_state of
src/rwkv6/rwkv_time_mix.py at 3d1909ae9cc73f8dccae20373d09a3292f956e13).

Values keep every bit both ways: a file in bf16 becomes an adapter in fp32, and that a file in bf16 again.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bone_ds import adapter_file, arch
from bone_ds.adapter_file import FORMAT_VERSION, Header
from bone_ds.arch import Source
from bone_ds.bone.grouping import bone_shape, matches, shape_pattern
from bone_ds.config import model_of
from bone_ds.errors import CheckpointError, ConfigError
from bone_ds.formats.coverage import rectangle
from bone_ds.formats.output import check_absent, chosen_dtype, write_aside
from bone_ds.resolution import DTYPES

_BONE = re.compile(r"blocks\.(\d{1,6})\.((?:att|ffn)\.\w+)\.(bone|disha)")
_STATE = re.compile(r"blocks\.(\d{1,6})\.(att)\.(time_state)")
_READ_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def import_adapter(path: Path, base: str, out: Path) -> Header:
    """Writes an RWKV-PEFT file as an adapter of this project for the model `base`. Raises CheckpointError, ConfigError."""
    check_absent(out)
    tensors = _read(path)
    kind = _kind(path, tensors)
    layers, modules = rectangle(path, _by_layer(tensors, _STATE if kind == "time_state" else _BONE), "blocks")
    architecture = arch.load("rwkv")
    source = architecture.open(model_of(path=base, architecture="rwkv"))
    with torch.device("meta"):
        model = architecture.build(source, torch.float32)
    count = len(architecture.layers(model))
    if layers[1] > count:
        raise CheckpointError(f"{path}: is for {layers[1]} layers or more, {base} has {count}")
    covered = None if layers == (0, count) else layers
    if kind == "time_state":
        _check_states(path, tensors, architecture.add_initial_state(model, *layers))
        header = _header("state", source, covered)
    else:
        grouping, rank = _grouping_and_rank(path, kind, tensors)
        for name, tensor in tensors.items():
            (_check_shards if grouping == "miss" else _check_block_affine)(path, name, tensor, rank, model, source)
        tensors = {name.removesuffix(kind) + "bone": tensor for name, tensor in tensors.items()}
        header = _header("bone", source, covered, grouping, rank, [target for target in architecture.targets if target in modules])
    write_aside(out, lambda aside: adapter_file.write(aside, header, tensors))
    return header


def export_adapter(path: Path, out: Path, dtype: str = "auto", name: str = "bone") -> str:
    """Writes an adapter of this project as an RWKV-PEFT file; returns the dtype it chose.

    dtype: bf16, fp32, or auto, which takes bf16 where that keeps every bit. name: `bone` or, for the later program, `disha`.
    """
    check_absent(out)
    if out.suffix != ".pth":
        raise ConfigError(f"--out: {out}: RWKV-PEFT reads .pth files, give it that ending")
    header, tensors = adapter_file.read(path)
    described = header.method + (f" with grouping {header.grouping}" if header.grouping else "")
    if header.form not in (None, "affine"):
        described += f" and form {header.form}"
    if header.architecture != "rwkv" or described not in ("bone with grouping row", "bone with grouping miss", "state"):
        raise ConfigError(f"{path}: is a {header.architecture} adapter, {described}; RWKV-PEFT has files for RWKV6's bone with "
                          "grouping row or miss, form affine, and state alone")
    if header.grouping == "miss" and name != "disha":
        raise ConfigError(f"--name: {name!r}: RWKV-PEFT reads grouping miss, which {path} has, as 'disha' alone; add --name disha")
    dtype = chosen_dtype(tensors, dtype)
    renamed = {re.sub(r"\.bone$", f".{name}", key): tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}
    write_aside(out, lambda aside: torch.save(renamed, aside))
    return dtype


def outline(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str | None, int | None, tuple[int, int], list[str]]:
    """Method, grouping, rank, layers [first, last) and modules of a file with these tensors. Raises CheckpointError.

    Whether a three-dimensional `.bone` is row or col is seen on layers that are not square alone; it is called row here.
    """
    kind = _kind(path, tensors)
    layers, modules = rectangle(path, _by_layer(tensors, _STATE if kind == "time_state" else _BONE), "blocks")
    if kind == "time_state":
        _check_states_alike(path, tensors)
        return "state", None, None, layers, []
    grouping, rank = _grouping_and_rank(path, kind, tensors)
    for name, tensor in tensors.items():
        if not matches(tensor.shape, shape_pattern(grouping, rank)):
            raise CheckpointError(f"{path}: {name}: has shape {tuple(tensor.shape)}, other tensors have block size {rank}")
    return "bone", grouping, rank, layers, sorted(modules)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are such an adapter rather than a model."""
    names = set(names)
    return "emb.weight" not in names and any(name.endswith((".bone", ".disha", ".time_state")) for name in names)


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors in fp32, which holds every value of theirs; nothing in the file is run."""
    if path.is_dir() or not path.exists():
        raise CheckpointError(f"{path}: {'is a directory, give a .pth file' if path.is_dir() else 'there is no such file'}")
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: is no .pth file, or a cut-off one: a .pth is a zip archive")
        contents = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{path}: holds more than tensors, or is damaged; nothing in it was run: {reason}") from None
    if not isinstance(contents, dict) or not contents:
        raise CheckpointError(f"{path}: holds {'nothing' if contents == {} else type(contents).__name__}, not tensors by their names")
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: holds {str(name)[:60]!r} of type {type(tensor).__name__}, not tensors alone")
    return {name: _widened(path, name, tensor) for name, tensor in contents.items()}


def _widened(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _READ_DTYPES:
        raise CheckpointError(f"{path}: {name}: is {str(tensor.dtype).removeprefix('torch.')}, not bfloat16, float16 or float32")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name}: holds NaN or infinite values")
    return tensor.detach().float()


def _kind(path: Path, tensors: dict[str, Tensor]) -> str:
    """bone, disha or time_state; the file holds one kind alone."""
    kinds = {}
    for name in tensors:
        match = _BONE.fullmatch(name) or _STATE.fullmatch(name)
        if not match:
            raise CheckpointError(
                f"{path}: {name}: is neither blocks.N.MODULE.bone (or .disha) nor blocks.N.att.time_state{_hint(name)}")
        kinds.setdefault(match[3], name)
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: holds tensors of two kinds, {' and '.join(kinds.values())}; import them from files of their own")
    return next(iter(kinds))


def _hint(name: str) -> str:
    if ".lora_" in name:
        return "; LoRA files are not read"
    if name.endswith(".weight") or ".time_" in name or ".ln" in name:
        return "; a model, or an adapter trained with more than it (--train_parts), is not read"
    return ""


def _by_layer(tensors: dict[str, Tensor], pattern: re.Pattern) -> dict[int, set[str]]:
    """The modules of each layer that the tensors are for."""
    found: dict[int, set[str]] = {}
    for name in tensors:
        layer, module, _ = pattern.fullmatch(name).groups()
        found.setdefault(int(layer), set()).add(module)
    return found


def _grouping_and_rank(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Of the first tensor, which the others are held against."""
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise CheckpointError(f"{path}: {name}: has shape {tuple(tensor.shape)}, Bone has (in/r, r, r) or, as .disha, (r, out)")
    first = next(iter(tensors.values()))
    return ("miss", len(first)) if kind == "disha" and first.dim() == 2 else ("row", first.shape[-1])


def _check_block_affine(path: Path, name: str, tensor: Tensor, rank: int, model: nn.Module, source: Source) -> None:
    """That it is `row`'s tensor for this layer of the base, with the file's one block size."""
    shape = tuple(tensor.shape)
    if tensor.dim() == 2:
        raise CheckpointError(f"{path}: {name}: has shape {shape}: two-dimensional tensors are an additive method, grouping miss, and are "
                              "read where they are called .disha and all tensors are such")
    if tensor.dim() != 3 or shape[1] != shape[2] or 0 in shape:
        raise CheckpointError(f"{path}: {name}: has shape {shape}, block affine Bone has (in/r, r, r)")
    if shape[1] != rank:
        raise CheckpointError(f"{path}: {name}: has block size {shape[1]}, other layers have {rank}; an adapter has one")
    linear = _linear(path, name, model, source)
    needed = bone_shape("row", linear.out_features, linear.in_features, rank)
    if shape != needed or linear.out_features % rank or linear.in_features % rank:
        raise CheckpointError(f"{path}: {name}: has shape {shape}, a layer of (out, in) = ({linear.out_features}, {linear.in_features}) "
                              f"of {source.origin} in blocks of {rank} needs {needed}")


def _check_shards(path: Path, name: str, tensor: Tensor, rank: int, model: nn.Module, source: Source) -> None:
    """That it is `miss`'s tensor for this layer of the base, with the file's one shard size."""
    linear = _linear(path, name, model, source)
    needed = bone_shape("miss", linear.out_features, linear.in_features, rank)
    if tuple(tensor.shape) != needed or not 1 <= rank <= linear.in_features:
        raise CheckpointError(f"{path}: {name}: has shape {tuple(tensor.shape)}, a layer of (out, in) = ({linear.out_features}, "
                              f"{linear.in_features}) of {source.origin} in shards of {rank} needs {needed}, shards of 1 to "
                              f"{linear.in_features} inputs")


def _linear(path: Path, name: str, model: nn.Module, source: Source) -> nn.Linear:
    """The layer that a tensor MODULE.bone or MODULE.disha is for."""
    module = name.rpartition(".")[0]
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{path}: {name}: {source.origin} has no linear layer {module}")
    return linear


def _check_states_alike(path: Path, tensors: Mapping[str, Tensor]) -> None:
    first = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.shape[1] != tensor.shape[2] or tensor.shape != first:
            raise CheckpointError(f"{path}: {name}: has shape {tuple(tensor.shape)}, initial states are (H, N, N), alike in all layers")


def _check_states(path: Path, tensors: dict[str, Tensor], expected: dict[str, nn.Parameter]) -> None:
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(f"{path}: {name}: has shape {tuple(tensors[name].shape)}, the base needs {tuple(parameter.shape)}")


def _header(method: str, source: Source, layers: tuple[int, int] | None, grouping: str | None = None, rank: int | None = None,
            targets: list[str] | None = None) -> Header:
    return Header(
        format_version=FORMAT_VERSION, architecture="rwkv", method=method, grouping=grouping, rank=rank, alpha=None,
        targets=targets or [], layers=None if layers is None else list(layers), base=source.origin, base_revision=source.revision,
        base_dtype="bf16", base_fingerprint=source.fingerprint, step=0, form="affine" if method == "bone" else None)
