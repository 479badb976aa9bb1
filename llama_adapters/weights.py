"""Llama models on disk: find, check, build, and stream their weights into place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bone_ds.arch import Placement, Source
from bone_ds.checksums import Checksums, check_stated, stated_in
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError, ConfigError
from bone_ds.tensor_file import drop_pages
from llama_adapters import attention, blobs, checks

TOKENIZER_FILES = ("config.json", "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
"""Of a repository on the hub; with the model's config."""
_HUB_FILES = (*TOKENIZER_FILES, "generation_config.json", "model*.safetensors", checks.INDEX)


@dataclass(frozen=True)
class OutlinedSource(Source):
    """A model without weights: it can be built, not loaded."""

    config: LlamaConfig


def recognises(path: str) -> bool:
    """Whether this may be a Llama; what is no directory here is taken on its face, `open` says what it really is."""
    place = Path(os.path.expanduser(path))
    if not place.is_dir():
        return place.suffix not in (".pth", ".safetensors")
    try:
        return json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type") == "llama"
    except (OSError, ValueError, AttributeError):
        return any(place.glob("*.safetensors"))


def open(model: ModelConfig) -> Source:
    """Finds, downloads or converts the model and checks it without reading its weights.

    Raises CheckpointError, and ConfigError for fields that mean nothing to a Llama.
    """
    for field in ("tokenizer", "wkv"):
        if getattr(model, field) != "auto":
            raise ConfigError(f"model.{field}: {getattr(model, field)!r} is for RWKV6, {model.path} is a Llama; remove it")
    directory, revision = _find(model)
    blobs.check(path for path in directory.iterdir() if path.is_file() and path.suffix != ".safetensors")
    config = checks.read_config(directory)
    tensors = checks.check_tensors(config, checks.read_tensors(directory), directory)
    checks.check_tokenizer(directory)
    return Source(path=directory, origin=model.path, revision=revision, fingerprint=fingerprint(tensors))


def tokenizer(source: Source):
    """The directory's own tokenizer. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds for a damaged file
        raise CheckpointError(f"{source.path}: its tokenizer can't be loaded: {checks.one_line(error)}") from None


def build(source: Source, dtype: torch.dtype) -> nn.Module:
    """A LlamaForCausalLM with unset weights of `dtype` and our attention; called under `Placement.empty()`."""
    config = config_of(source)
    config.use_cache = False
    config.attention_dropout = 0.0
    config._attn_implementation = attention.NAME
    with _default_dtype(dtype), no_init_weights():
        model = LlamaForCausalLM(config)
    model.tie_weights()
    return model


def config_of(source: Source) -> LlamaConfig:
    return source.config if isinstance(source, OutlinedSource) else LlamaConfig.from_pretrained(source.path)  # `open` has checked it


def load(model: nn.Module, source: Source, placement: Placement, checksums: Checksums | None = None) -> None:
    """Streams the weights into the model, one tensor at a time, in the order of its parameters.

    A tensor's bytes leave memory once it is placed, so that the files are never there as a whole. Called outside
    `Placement.empty()`. Raises CheckpointError.

    checksums: of the tensors as they are stored, and of what else decides the model's outputs; None: none are taken but of files that
    state their own.
    """
    tensors = _read_checked(source.path, model.config)
    paths = sorted({stored.file for stored in tensors.values()})
    blobs.check(checksums.share(paths) if checksums else paths)
    with ExitStack() as stack:
        files = {path: stack.enter_context(_mapped(path)) for path in paths}
        stated = {path: stated_in(path, file.metadata()) for path, file in files.items()}
        if any(stated.values()):
            checksums = checksums or Checksums()
        for name, param in model.named_parameters():
            path = tensors[name].file
            tensor = files[path].get_tensor(name)
            with checksums.taking(name, tensor) if checksums else nullcontext() as taken:
                placement.assign(param, tensor)
            if taken:
                check_stated(path, stated[path], name, taken.result())
            drop_pages(tensor)
    if checksums:
        note_files(checksums, source)
        checksums.finish()
    _recompute_rotary_tables(model)


def note_files(checksums: Checksums, source: Source) -> None:
    """What beside the tensors decides the outputs."""
    checksums.note("config.json", lambda: checks.forward_fields(config_of(source)))
    checksums.note("tokenizer.json", lambda: checks.tokenizer_fields(source.path))


def fingerprint(tensors: dict[str, checks.Stored]) -> str:
    """Hash of names, dtypes, shapes and the first and last 4 KiB of each tensor; how they are sharded is no part of it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
        digest.update(checks.sample(stored))
    return digest.hexdigest()


def weight_files(source: Source) -> list[Path]:
    """The safetensors files that hold the model's parameters, sorted."""
    config = checks.read_config(source.path)
    return sorted({stored.file for stored in _read_checked(source.path, config).values()})


def _find(model: ModelConfig) -> tuple[Path, str | None]:
    """The directory that holds the model, and the hub commit where it came from the hub."""
    place = Path(os.path.expanduser(model.path))
    if place.is_dir():
        if model.revision is not None:
            raise CheckpointError(f"model.revision: {model.revision!r} is for a hub id, {place} is a directory here; remove it")
        return place, None
    if model.revision is not None and place.exists():
        raise CheckpointError(f"model.revision: {model.revision!r} is for a hub id, {place} is a file here; remove it")
    if place.suffix == ".gguf":
        from llama_adapters.gguf_conversion import convert_once

        return convert_once(place, model.dtype, Path(os.path.expanduser(model.cache_dir))), None
    if place.exists():
        raise CheckpointError(f"{place}: is neither a model directory nor a .gguf file")
    return download(model, _HUB_FILES)


def download(model: ModelConfig, files: tuple[str, ...]) -> tuple[Path, str]:
    """The directory of these files of a hub id, and their commit. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model.path)
    except HFValidationError:
        raise CheckpointError(f"{model.path}: there is no such file or directory, and it is no hub id either") from None
    try:
        directory = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises network, permission and disk errors of many kinds
        reason = checks.one_line(error) or type(error).__name__
        at = f" at revision {model.revision!r}" if model.revision else ""
        raise CheckpointError(f"{model.path}: no such directory here, and the hub doesn't give it{at}: {reason}") from None
    return directory, directory.name


def _read_checked(directory: Path, config: LlamaConfig) -> dict[str, checks.Stored]:
    return checks.check_tensors(config, checks.read_tensors(directory), directory)


@contextmanager
def _mapped(path: Path) -> Iterator[safe_open]:
    """A safetensors file in mapped memory: a tensor taken from it costs no memory of its own until it is copied."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from None


def _recompute_rotary_tables(model: nn.Module) -> None:
    """ZeRO-3's construction context rounds every new float tensor to the model's dtype, these tables included."""
    stale = model.model.rotary_emb
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(stale.inv_freq.device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
