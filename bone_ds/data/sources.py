"""Names in the config to rows: a file, a directory of files as the hub lays them out, or a data set of the hub."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bone_ds.config import DataConfig
from bone_ds.data import rows
from bone_ds.data.fields import shown
from bone_ds.data.rows import Row
from bone_ds.data_paths import is_hub_id
from bone_ds.errors import DataError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What `datasets` writes beside the .arrow files of save_to_disk: the files' names, and those of the splits."""


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set of the hub, at one commit."""

    hub_id: str
    subset: str | None
    split: str
    commit: str


@dataclass(frozen=True)
class Located:
    """Where the rows of one name in the config lie."""

    name: str
    """As the config has it."""
    files: tuple[Path, ...] = ()
    hub: HubSplit | None = None


def locate(data: DataConfig, split: Literal["train", "eval"]) -> list[Located]:
    """Where data.train (data.eval) lies. Raises DataError for what isn't there."""
    names, split_name = (data.train, data.train_split) if split == "train" else (data.eval, data.eval_split)
    return [_locate(name, data.subset, split_name, data.revision) for name in names]


def _locate(name: str, subset: str | None, split: str, revision: str | None) -> Located:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return Located(name, _files_of(path, subset, split))
    if is_hub_id(name):
        return Located(name, hub=HubSplit(name, subset, split, _commit(name, revision)))
    rows.check_file(path)
    return Located(name, (path,))


def _files_of(directory: Path, subset: str | None, split: str) -> tuple[Path, ...]:
    """The files of a split, by the rules that `datasets` has for a repository of the hub, or as its save_to_disk wrote them."""
    if (directory / _SPLITS).exists():
        splits = _saved(directory / _SPLITS, "splits", str)
        if split not in splits:
            raise DataError(_no_split(str(directory), split, splits))
        directory = directory / split
    if (directory / _STATE).exists():
        return _saved_files(directory)
    from datasets import load_dataset_builder

    try:
        with silence():
            by_split = load_dataset_builder(str(directory.absolute()), name=subset).config.data_files
    except Exception as error:  # it raises whatever a README's YAML or a missing file leads to
        if subset is None and "config name is missing" in str(error).lower():
            raise DataError(f"{directory}: holds several data sets: {' '.join(str(error).splitlines()[1:2])}\n"
                            "Name one with data.subset or, in a mixture, subset") from None
        raise DataError(f"{directory}: is a directory in which `datasets` finds no data set: {_first_line(error)}\n"
                        f"Lay it out as on the hub, for example data/{split}-00000-of-00001.parquet, or name the files") from None
    if split not in (by_split or {}):
        raise DataError(_no_split(str(directory), split, list(by_split or {})))
    for path in by_split[split]:
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory)):
            raise DataError(f"{directory}: its README.md names {str(path)[:160]}, which does not lie in it; name such files in the config")
    return tuple(map(Path, by_split[split]))


def _saved_files(directory: Path) -> tuple[Path, ...]:
    names = [str(file.get("filename")) for file in _saved(directory / _STATE, "_data_files", dict)]
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{directory / _STATE}: names {shown(name)}, which is not beside it; save the data set anew")
        rows.check_file(directory / name)
    return tuple(directory / name for name in names)


def _saved(path: Path, field: str, kind: type) -> list:
    """A list of that kind alone."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[field]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise DataError(f"{path}: is not what save_to_disk of `datasets` writes; save the data set anew")
    return found


def _no_split(name: str, split: str, splits: Sequence[str]) -> str:
    return (f"{name}: has no split {split!r}, it has {', '.join(map(str, splits)) or 'none'}\n"
            "Name one with data.train_split, data.eval_split or, in a mixture, split")


def _commit(hub_id: str, revision: str | None) -> str:
    """The commit that the revision names; a whole commit is asked of nobody. Raises DataError."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, revision=revision).sha
    except Exception as error:  # the hub client raises network, permission and validation errors of many kinds
        at = f" at revision {revision!r}" if revision else ""
        raise DataError(f"{hub_id}: no such file or directory here, and the hub doesn't give it{at}: {_first_line(error)}") from None


def hub_rows(hub: HubSplit, limit: int | None) -> Iterator[Row]:
    """The first `limit` rows, streamed where there is a limit: a large data set is then not fetched whole. Raises DataError."""
    from datasets import load_dataset_builder

    try:
        with silence():
            builder = load_dataset_builder(hub.hub_id, hub.subset, revision=hub.commit)
            if builder.hash != hub.commit:  # without the hub, `datasets` takes what it has of that name
                raise DataError(f"it can't be reached, and `datasets` has commit {str(builder.hash)[:12]} of it alone")
            if limit is None:
                builder.download_and_prepare()
            table = builder.as_dataset(hub.split) if limit is None else builder.as_streaming_dataset(hub.split)
            for number, row in enumerate(itertools.islice(table, limit), 1):
                yield f"{hub.hub_id} ({hub.split}): row {number}", row
    except Exception as error:  # as above, and whatever its parsers raise
        raise DataError(f"{hub.hub_id}: `datasets` can't read split {hub.split!r} at {hub.commit[:12]}: {_first_line(error)}") from None


def fingerprint(located: Located) -> str:
    """Equal for equal content, wherever it lies."""
    digest = hashlib.sha256()
    if located.hub:
        digest.update(repr(located.hub).encode())
    for path in located.files:
        with path.open("rb") as file:
            digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def size_bytes(located: Located) -> int | None:
    """Of the files here; None for the hub's."""
    return None if located.hub else sum(path.stat().st_size for path in located.files)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:160] or type(error).__name__


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: what is wrong is said once, by a DataError."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
