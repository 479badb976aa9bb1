"""Text to tokens: every sample of a data set, end to end in one flat array."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bone_ds.config import DataConfig
from bone_ds.data.prompts import Prompt, build_prompt
from bone_ds.data.sources import read_rows
from bone_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Report:
    """What became of the rows: rows = kept + dropped + label_less."""

    rows: int
    kept: int
    truncated: int
    """Kept, but cut to max_length tokens."""
    dropped: int
    """Longer than max_length under data.overlong: drop."""
    label_less: int
    """Left out because no token of theirs would be learnt: an empty completion, or a prompt that fills max_length."""
    tokens: int
    label_tokens: int
    longest: int
    """Tokens of the longest sample before truncation, dropped ones included."""

    def __str__(self) -> str:
        parts = [f"{self.kept} samples of {self.rows} rows", f"{self.tokens} tokens", f"{self.label_tokens} bear loss",
                 f"longest {self.longest}"]
        parts += [f"{count} {what}" for count, what in (
            (self.truncated, "truncated"), (self.dropped, "dropped as too long"),
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
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]


def load_samples(data: DataConfig, tokenizer, split: Literal["train", "eval"] = "train") -> Samples:
    """Files to samples, as the config says. Raises DataError or ConfigError, naming what is wrong and where."""
    paths, limit = (data.train, data.train_samples) if split == "train" else (data.eval, data.eval_samples)
    prompt = build_prompt(data)
    rows = read_rows(paths, prompt.columns, prompt.optional, limit)
    return tokenize(rows, prompt, tokenizer, data, origin=", ".join(paths))


def tokenize(rows: Dataset, prompt: Prompt, tokenizer, data: DataConfig, origin: str = "the data") -> Samples:
    """Prompt and completion are tokenised apart: the split between them is exact and the same as in generation.

    BOS comes first where the tokenizer itself puts it; EOS ends the completion and is learnt. Neither is doubled where the
    text brings its own. Raises DataError, naming `origin`, for a tokenizer without EOS and when no sample is left.
    """
    eos = _eos(tokenizer)
    bos = _bos(tokenizer)
    store = _Store(data.max_length, drop=data.overlong == "drop")
    for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
        columns = list(batch)
        batch_rows = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        prompts = _ids(tokenizer, [prompt.prompt_text(row) for row in batch_rows])
        completion_texts = [prompt.completion_text(row) for row in batch_rows]
        for prompt_part, text, ids in zip(prompts, completion_texts, _ids(tokenizer, completion_texts), strict=True):
            if not prompt_part and ids[:1] == [bos]:
                ids = ids[1:]  # without a prompt, the user's own BOS stands at the head of the completion
                prompt_part = [bos]
            store.add(_with_bos(prompt_part, bos), _with_eos(ids, eos) if text.strip() else [])
    samples = store.samples(eos)
    if not len(samples):
        report = samples.report
        raise DataError(f"{origin}: no sample is left of {report.rows} rows: {report.dropped} longer than data.max_length "
                        f"{data.max_length}, {report.label_less} without a completion token\n"
                        f"The longest has {report.longest} tokens; raise data.max_length, or check data.prompt and data.fields")
    return samples


class _Store:
    """Samples as they are added, in flat arrays, and the counts of those left out."""

    def __init__(self, max_length: int, drop: bool):
        self.max_length, self.drop = max_length, drop
        self.tokens, self.offsets, self.prompt_lengths = array("i"), array("q", [0]), array("i")
        self.rows = self.truncated = self.dropped = self.label_less = self.label_tokens = self.longest = 0

    def add(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        """An empty completion is a row without a text to learn."""
        length = len(prompt) + len(completion)
        kept_length = min(length, self.max_length)
        labels = kept_length - max(1, len(prompt)) if completion else 0
        self.rows += 1
        self.longest = max(self.longest, length)
        if length > self.max_length and self.drop:
            self.dropped += 1
        elif labels <= 0:
            self.label_less += 1
        else:
            self.truncated += length > self.max_length
            self.label_tokens += labels
            self.tokens.extend([*prompt, *completion][:kept_length])
            self.offsets.append(len(self.tokens))
            self.prompt_lengths.append(len(prompt))

    def samples(self, eos: int) -> Samples:
        kept = len(self.prompt_lengths)
        report = Report(self.rows, kept, self.truncated, self.dropped, self.label_less, len(self.tokens), self.label_tokens,
                        self.longest)
        tokens, prompt_lengths = np.array(self.tokens, np.int32), np.array(self.prompt_lengths, np.int32)
        return Samples(tokens, np.array(self.offsets, np.int64), prompt_lengths, eos, report)


def prompt_ids(prompt_text: str, tokenizer) -> list[int]:
    """The tokens of one prompt exactly as training sees them, to generate from."""
    return _with_bos(_ids(tokenizer, [prompt_text])[0], _bos(tokenizer))


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(f"tokenizer {name}: has no EOS token, so a model could not learn where a completion ends; "
                        "set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


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
