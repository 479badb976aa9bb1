"""Text to tokens: every sample of a data set, end to end in one flat array."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bone_ds.config import DataConfig
from bone_ds.data import binidx
from bone_ds.data.binidx import Documents
from bone_ds.data.prompts import Prompt, build_prompt
from bone_ds.data.sources import TEXT_SUFFIX, read_rows, read_text
from bone_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Report:
    """What became of the rows (a document of a corpus is one): rows = kept - pieces + split + dropped + label_less."""

    rows: int
    kept: int
    """Samples: rows, or pieces of them."""
    truncated: int
    """Kept, but cut to max_length tokens."""
    dropped: int
    """Longer than max_length under data.overlong: drop."""
    label_less: int
    """Left out because no token of theirs would be learnt: an empty completion or document, or a prompt that fills max_length."""
    tokens: int
    label_tokens: int
    longest: int
    """Tokens of the longest row before it was cut, dropped ones included."""
    split: int = 0
    """Longer than max_length under data.overlong: split."""
    pieces: int = 0
    """The samples that the split rows were cut into, all together."""

    def __str__(self) -> str:
        parts = [f"{self.kept} samples of {self.rows} rows", f"{self.tokens} tokens", f"{self.label_tokens} bear loss",
                 f"longest {self.longest}"]
        parts += [f"{count} {what}" for count, what in (
            (self.truncated, "truncated"), (self.split, f"split into {self.pieces}"), (self.dropped, "dropped as too long"),
            (self.label_less, "left out without a token to learn")) if count]
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples. Token j of a sample bears loss from j = prompt length on, predicted by token j - 1."""

    tokens: np.ndarray
    """(sum of lengths,) int32"""
    offsets: np.ndarray
    """(n + 1,) int64; sample i is tokens[offsets[i]:offsets[i + 1]]."""
    prompt_lengths: np.ndarray
    """(n,) int32, BOS included."""
    eos_token_id: int
    report: Report

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """(length,) int32"""
        return self.tokens[self.offsets[index]:self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64"""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """(n,) int64, loss-bearing tokens; nothing predicts the first token of a sample without prompt."""
        return self.lengths - np.maximum(self.prompt_lengths, 1)

    def label_count(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index] - max(1, self.prompt_lengths[index]))

    def fingerprint(self) -> str:
        """Equal for equal samples in equal order; a resumed run compares it."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.offsets, self.prompt_lengths):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()[:16]


def load_samples(data: DataConfig, tokenizer, split: Literal["train", "eval"] = "train") -> Samples:
    """Files to samples, as the config says. Raises DataError or ConfigError, naming what is wrong and where."""
    paths, limit = (data.train, data.train_samples) if split == "train" else (data.eval, data.eval_samples)
    prompt = build_prompt(data)
    return _samples(list(_read(paths, data.prompt, prompt, limit)), prompt, tokenizer, data, origin=", ".join(paths))


def tokenize(rows: Dataset, prompt: Prompt, tokenizer, data: DataConfig, origin: str = "the data") -> Samples:
    """Prompt and completion are tokenised apart: the split between them is exact and the same as in generation.

    BOS comes first where the tokenizer itself puts it; EOS ends the completion and is learnt. Neither is doubled where the
    text brings its own. Raises DataError, naming `origin`, for a tokenizer without EOS and when no sample is left.
    """
    return _samples([rows], prompt, tokenizer, data, origin)


def _read(paths: Sequence[str], prompt_name: str, prompt: Prompt, limit: int | None) -> Iterator[Dataset | Documents]:
    """Each file's rows or documents, the first `limit` of them all together."""
    count = 0
    for path in (Path(path).expanduser() for path in paths):
        room = None if limit is None else limit - count
        if room == 0:
            break
        if path.suffix in (TEXT_SUFFIX, *binidx.SUFFIXES) and prompt_name != "text":
            raise DataError(f"{path}: a {path.suffix} file holds whole documents, which need data.prompt: text; this is {prompt_name!r}")
        if path.suffix in binidx.SUFFIXES:
            part = binidx.open_documents(path, room)
        elif path.suffix == TEXT_SUFFIX:
            part = read_text(path, prompt.columns["text"])
        else:
            part = read_rows((str(path),), prompt.columns, prompt.optional, room)
        count += len(part)
        yield part


def _samples(parts: Sequence[Dataset | Documents], prompt: Prompt, tokenizer, data: DataConfig, origin: str) -> Samples:
    eos = _eos(tokenizer)
    bos = _bos(tokenizer)
    store = _Store(data.max_length, data.overlong)
    for part in parts:
        if isinstance(part, Documents):
            _add_documents(store, part, _vocabulary_size(tokenizer), bos, eos)
        else:
            _add_rows(store, part, prompt, tokenizer, bos, eos)
    samples = store.samples(eos)
    if not len(samples):
        report = samples.report
        raise DataError(f"{origin}: no sample is left of {report.rows} rows: {report.dropped} longer than data.max_length "
                        f"{data.max_length}, {report.label_less} without a token to learn\n"
                        f"The longest has {report.longest} tokens; raise data.max_length, or check data.prompt and data.fields")
    return samples


def _add_rows(store: _Store, rows: Dataset, prompt: Prompt, tokenizer, bos: int | None, eos: int) -> None:
    for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
        columns = list(batch)
        batch_rows = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        prompts = _ids(tokenizer, [prompt.prompt_text(row) for row in batch_rows])
        completion_texts = [prompt.completion_text(row) for row in batch_rows]
        for prompt_part, text, ids in zip(prompts, completion_texts, _ids(tokenizer, completion_texts), strict=True):
            if not prompt_part and ids[:1] == [bos]:
                ids = ids[1:]  # without a prompt, the user's own BOS stands at the head of the completion
                prompt_part = [bos]
            prompt_part = _with_bos(prompt_part, bos)
            completion = _with_eos(ids, eos) if text.strip() else []
            store.add(np.array([*prompt_part, *completion], np.int32), len(prompt_part))


def _add_documents(store: _Store, documents: Documents, vocabulary_size: int, bos: int | None, eos: int) -> None:
    """As rows of the prompt `text`: BOS first and EOS last, neither doubled; a document of nothing else is empty."""
    head = np.array([] if bos is None else [bos], np.int32)
    tail = np.array([eos], np.int32)
    for index in range(len(documents)):
        text = documents.checked(index, vocabulary_size)
        text = text[1:] if len(text) and text[0] == bos else text
        text = text[:-1] if len(text) and text[-1] == eos else text
        store.add(np.concatenate([head, text, tail if len(text) else tail[:0]]), len(head))


class _Store:
    """Samples as they are added, in flat arrays, and the counts of those left out."""

    def __init__(self, max_length: int, overlong: Literal["truncate", "drop", "split"]):
        self.max_length, self.overlong = max_length, overlong
        self.tokens, self.offsets, self.prompt_lengths = array("i"), array("q", [0]), array("i")
        self.rows = self.truncated = self.dropped = self.label_less = self.label_tokens = self.longest = self.split = self.pieces = 0

    def add(self, tokens: np.ndarray, prompt_length: int) -> None:
        """tokens: (length,) int32, prompt and completion; a row without a completion has nothing to learn."""
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        overlong = len(tokens) > self.max_length
        if overlong and self.overlong == "drop":
            self.dropped += 1
        elif min(len(tokens), self.max_length) <= max(1, prompt_length):
            self.label_less += 1
        elif overlong and self.overlong == "split":
            self._split(tokens, prompt_length)
        else:
            self.truncated += overlong
            self._keep(tokens[:self.max_length], prompt_length)

    def _split(self, tokens: np.ndarray, prompt_length: int) -> None:
        """Each piece starts with the last token of the piece before it, not learnt again: every token is learnt once.

        Nothing else carries over: to the model a piece is a document of its own.
        """
        self.split += 1
        for start in range(0, len(tokens) - 1, self.max_length - 1):
            self.pieces += 1
            self._keep(tokens[start:start + self.max_length], 1 if start else prompt_length)

    def _keep(self, tokens: np.ndarray, prompt_length: int) -> None:
        self.label_tokens += len(tokens) - max(1, prompt_length)
        self.tokens.frombytes(tokens.tobytes())
        self.offsets.append(len(self.tokens))
        self.prompt_lengths.append(prompt_length)

    def samples(self, eos: int) -> Samples:
        """The arrays without a copy: nothing can be added after it."""
        kept = len(self.prompt_lengths)
        report = Report(self.rows, kept, self.truncated, self.dropped, self.label_less, len(self.tokens), self.label_tokens,
                        self.longest, self.split, self.pieces)
        tokens, prompt_lengths = np.frombuffer(self.tokens, np.int32), np.frombuffer(self.prompt_lengths, np.int32)
        return Samples(tokens, np.frombuffer(self.offsets, np.int64), prompt_lengths, eos, report)


def prompt_ids(prompt_text: str, tokenizer) -> list[int]:
    """The tokens of one prompt exactly as training sees them, to generate from."""
    return _with_bos(_ids(tokenizer, [prompt_text])[0], _bos(tokenizer))


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(f"tokenizer {name}: has no EOS token, so a model could not learn where a completion ends; "
                        "set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def _vocabulary_size(tokenizer) -> int:
    # Hugging Face's vocab_size leaves out added tokens, its len() counts them; others need not have a len()
    return len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.vocab_size


def _bos(tokenizer) -> int | None:
    """The token that the tokenizer itself puts before a text."""
    # asked with a letter: with an empty text, an EOS that is appended and serves as BOS too would look the same
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the model's context, the report counts them
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _with_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _with_eos(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
