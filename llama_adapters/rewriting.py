"""A Llama directory written again with changed weights, file by file: no more than one file is held."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from bone_ds.arch import Source
from bone_ds.checksums import Checksums, check_stated, not_stating, stated_in
from bone_ds.errors import ConfigError
from bone_ds.tensor_file import save_file
from llama_adapters import blobs, checks, weights

_NOT_COPIED = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".lock")


def rewrite(source: Source, out: Path, change: Callable[[str, Tensor], Tensor], checksums: Checksums | None = None) -> None:
    """Writes a Hugging Face directory: the source's files and shards, each weight as change(name, weight) in its own dtype.

    Written aside and renamed. Raises ConfigError where `out` is named like a file, and CheckpointError where the source is found damaged,
    by the names of its blobs or by `checksums`.
    """
    if out.suffix in _NOT_COPIED:
        raise ConfigError(f"--out: {out}: a Llama is written as a directory, not a {out.suffix} file; name one without that ending")
    files = weights.weight_files(source)
    blobs.check(files)
    config = checks.read_config(source.path)
    checksums = checksums or Checksums()
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in files:
            _rewrite_file(file, aside / file.name, change, config, checksums)
        weights.note_files(checksums, source)
        checksums.finish()
        _copy_the_rest(source.path, aside, {file.name for file in files})
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rewrite_file(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], config: LlamaConfig, checksums: Checksums) -> None:
    changed, parameters = {}, checks.parameter_shapes(config)
    with safe_open(source, framework="pt") as file:
        stated = stated_in(source, file.metadata())
        for name in file.keys():
            weight = file.get_tensor(name)
            # Some files of tied models hold the embedding twice.
            parameter = "model.embed_tokens.weight" if config.tie_word_embeddings and name == "lm_head.weight" else name
            with checksums.taking(parameter, weight) if parameter in parameters else nullcontext() as taken:
                changed[name] = change(parameter, weight).to(weight.dtype, copy=parameter != name)
            if taken:
                check_stated(source, stated, name, taken.result())
        metadata = not_stating(file.metadata())
    save_file(changed, target, metadata=metadata)


def _copy_the_rest(source: Path, target: Path, written: set[str]) -> None:
    """Config, tokenizer, the shards' index; no other weights, which would be the unchanged ones, and no directories."""
    sharded = checks.SINGLE not in written
    for path in source.iterdir():
        is_index = path.name.endswith(".index.json")
        wanted = sharded and path.name == checks.INDEX if is_index else path.suffix not in _NOT_COPIED
        if path.is_file() and wanted:
            shutil.copy2(path, target / path.name)
