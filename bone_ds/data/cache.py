"""Tokenised sources on disk: found by what they were made of, made once per host, never seen half.

`CACHE/tokens/KEY/` holds `tokens.npy`, `offsets.npy`, `learnt.npy` and `rows.npy`, which are mapped into memory, so that the ranks of a
host share them, and `manifest.json`, which has the CRC-32 of each and of itself: what has changed since is made anew. KEY hashes
everything that decides what is in it: the files' content (the commit, for the hub), the tokenizer, the prompt, lengths and limits, and
the code itself.

The ranks of a host come at once. The one that takes the lock first builds aside and renames; the others wait for the lock and
find it done. The system frees the lock of a rank that dies, and the next one builds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bone_ds.config import DataConfig
from bone_ds.data import sources
from bone_ds.data.chat import ChatPrompt
from bone_ds.data.prompts import Prompt
from bone_ds.data.samples import Report, Samples
from bone_ds.data.sources import Located
from bone_ds.data_paths import CORPUS_SUFFIXES

SMALLEST_BYTES = 2**20
"""Files of less are tokenised in about a second, at every start."""
_ARRAYS = ("tokens", "offsets", "learnt", "rows")
_MANIFEST = "manifest.json"
_READ_BYTES = 2**20


def place_of(directory: Path, located: Sequence[Located], prompt: Prompt | ChatPrompt, tokenizer, data: DataConfig,
             limit: int | None) -> Path | None:
    """Where these samples are or would be kept; None for those that aren't: small files, tokens already, an unknown tokenizer."""
    sizes_bytes = [sources.size_bytes(one) for one in located]
    are_tokens = any(path.suffix in CORPUS_SUFFIXES for one in located for path in one.files)
    of_tokenizer = _tokenizer_fingerprint(tokenizer)
    if are_tokens or of_tokenizer is None or (None not in sizes_bytes and sum(sizes_bytes) < SMALLEST_BYTES):
        return None
    made_of = {
        "sources": [sources.fingerprint(one) for one in located], "tokenizer": of_tokenizer, "prompt": repr(prompt), "limit": limit,
        "max_length": data.max_length, "overlong": data.overlong_rule, "code": _code_fingerprint(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")}}
    return directory / "tokens" / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def read_or_build(place: Path, build: Callable[[], Samples]) -> tuple[Samples, bool]:
    """The samples that are kept at `place`, and whether they were there already. A disk that is full is said, and done without.

    Raises OSError where nothing can be kept, before anything is built.
    """
    from filelock import FileLock

    if (kept := _read(place)) is not None:
        return kept, True
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{place.name}.lock")):
        if (kept := _read(place)) is not None:  # by another rank, meanwhile
            return kept, True
        samples = build()
        try:
            _write(place, samples)
        except OSError as error:
            shutil.rmtree(_aside(place), ignore_errors=True)
            logging.getLogger("bone_ds").warning("%s: tokenised data can't be kept: %s; the next start tokenises anew", place,
                                                 error.strerror or error)
    return samples, False


def _read(place: Path) -> Samples | None:
    """None where there is nothing, or what is there is damaged."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("crc32") != _crc32_of(manifest) or manifest["files"] != _crc32s(place):
            return None
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return Samples(**arrays, eos_token_id=manifest["eos_token_id"], report=Report(**manifest["report"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _crc32s(place: Path) -> dict[str, int]:
    """Of each array's file."""
    return {name: _crc32_of_file(place / f"{name}.npy") for name in _ARRAYS}


def _crc32_of_file(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            found = zlib.crc32(part, found)
    return found


def _crc32_of(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _aside(place: Path) -> Path:
    return place.with_name(f"{place.name}.partial")


def _write(place: Path, samples: Samples) -> None:
    aside = _aside(place)
    for left_over in (aside, place):  # of a process that was killed; damaged
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    arrays = {name: getattr(samples, name) for name in _ARRAYS}
    for name, array in arrays.items():
        np.save(aside / f"{name}.npy", array, allow_pickle=False)
    manifest = {"eos_token_id": samples.eos_token_id, "report": asdict(samples.report), "files": _crc32s(aside)}
    (aside / _MANIFEST).write_text(json.dumps(manifest | {"crc32": _crc32_of(manifest)}, indent=2) + "\n", encoding="utf-8")
    for path in aside.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # a name must not outlive its content when the power fails
    aside.rename(place)


def _tokenizer_fingerprint(tokenizer) -> str | None:
    """Of all that decides which tokens a text becomes; None for a tokenizer that doesn't say it."""
    if hasattr(tokenizer, "fingerprint"):
        return tokenizer.fingerprint()
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template,
             tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _code_fingerprint() -> str:
    """Of this package, which may word or cut otherwise in another version."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
