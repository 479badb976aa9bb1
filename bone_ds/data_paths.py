"""What the names in the config's data section can stand for; read without anything heavy, before a run is started."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bone_ds.config import DataConfig
from bone_ds.errors import ConfigError, DataError

JSON_SUFFIXES = (".jsonl", ".json")
ROW_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".parquet", ".arrow")
TEXT_SUFFIX = ".txt"
CORPUS_SUFFIXES = (".bin", ".idx")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether this can only be meant for the hub: nothing lies there, and it looks like owner/name, not like a file."""
    is_file_name = name.endswith((*ROW_SUFFIXES, TEXT_SUFFIX, *CORPUS_SUFFIXES))
    return bool(_HUB_ID.fullmatch(name)) and not is_file_name and not Path(name).exists()


def check(data: DataConfig) -> None:
    """Raises DataError for a file that isn't there, and ConfigError for fields that mean nothing to what is."""
    for field, names in (("data.train", data.train), ("data.mixture", data.train_paths if data.mixture else ()), ("data.eval", data.eval)):
        for name in names:
            path = Path(os.path.expanduser(name))
            if not path.exists() and not is_hub_id(name):
                raise DataError(f"{field}: {name}: there is no such file, looked in {path.absolute().parent}")
    _check_mixture(data)
    for field, names in (("train_split", data.train_paths), ("eval_split", data.eval)):
        value, default = getattr(data, field), DataConfig.model_fields[field].default
        if value != default and names and not any(map(_has_splits, names)):
            raise ConfigError(f"data.{field}: {value!r} is for a directory or a hub id, {names[0]} is a file; remove it")
    names = (*data.train_paths, *data.eval)
    if data.revision is not None and not any(map(is_hub_id, names)):
        raise ConfigError(f"data.revision: {data.revision!r} is for a hub id, {names[0]} is here; remove it")
    if data.subset is not None and not any(map(_has_splits, names)):
        raise ConfigError(f"data.subset: {data.subset!r} is for a directory or a hub id, {names[0]} is a file; remove it")


def _has_splits(name: str) -> bool:
    return is_hub_id(name) or Path(os.path.expanduser(name)).is_dir()


def _check_mixture(data: DataConfig) -> None:
    """Raises ConfigError for an entry's own field that means nothing to what it names."""
    for number, source in enumerate(data.mixture):
        if source.revision is not None and not is_hub_id(source.path):
            raise ConfigError(f"data.mixture.{number}.revision: {source.revision!r} is for a hub id, {source.path} is here; remove it")
        for field in ("subset", "split"):
            if getattr(source, field) is not None and not _has_splits(source.path):
                raise ConfigError(f"data.mixture.{number}.{field}: {getattr(source, field)!r} is for a directory or a hub id, "
                                  f"{source.path} is a file; remove it")
