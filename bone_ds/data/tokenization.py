"""Rows to tokens: each source's rows read, worded, tokenised, cut and counted."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bone_ds import child_process
from bone_ds.config import DataConfig
from bone_ds.data import binidx, chat, rows, sources
from bone_ds.data.binidx import Documents
from bone_ds.data.chat import ChatPrompt, Encoded
from bone_ds.data.prompts import Prompt
from bone_ds.data.rows import Row
from bone_ds.data.samples import Samples, Store
from bone_ds.data.sources import Located
from bone_ds.data_paths import CORPUS_SUFFIXES, TEXT_SUFFIX
from bone_ds.errors import DataError

Batch = list[tuple[str, Any]]
"""Rows' places and their checked values."""

_ROWS_PER_BATCH = 1024
_CHATS_PER_BATCH = 64
"""Each is rendered once or twice for every answer, and all of a batch are held at once."""
_BATCHES_ALONE = 16
"""So many are tokenised before processes are started, which takes seconds."""


def read(located: Sequence[Located], prompt: Prompt | ChatPrompt, tokenizer, data: DataConfig, limit: int | None) -> Samples:
    """The first `limit` rows of all sources together. Raises DataError, naming the place, for a row or a file that can't be used.

    Prompt and completion are tokenised apart: the split between them is exact and the same as in generation. BOS comes first where
    the tokenizer itself puts it; EOS ends the completion and is learnt. Neither is doubled where the text brings its own.
    """
    store = Store(data.max_length, data.overlong_rule)
    feeds = [feed for one in located for feed in _feeds(one, prompt, data)]
    for feed in feeds:
        room = None if limit is None else limit - store.rows
        if room == 0:
            break
        if isinstance(found := feed(room), Documents):
            _add_documents(store, found, _vocabulary_size(tokenizer), _bos(tokenizer), eos_of(tokenizer))
        else:
            _add_rows(store, found, prompt, tokenizer)
    return _not_empty(store.samples(eos_of(tokenizer)), ", ".join(one.name for one in located), data)


def tokenize(table: Iterable[Mapping[str, Any]], prompt: Prompt | ChatPrompt, tokenizer, data: DataConfig,
             origin: str = "the data") -> Samples:
    """Rows from anywhere, as `read` does those of files; a row's place is `origin: row n`."""
    store = Store(data.max_length, data.overlong_rule)
    _add_rows(store, ((f"{origin}: row {number}", row) for number, row in enumerate(table, 1)), prompt, tokenizer)
    return _not_empty(store.samples(eos_of(tokenizer)), origin, data)


def _feeds(located: Located, prompt: Prompt | ChatPrompt, data: DataConfig) -> Iterator[Callable[[int | None], Iterable[Row] | Documents]]:
    """For each file, what gives so many of its first rows or documents. A corpus is opened here, and a broken one found."""
    if located.hub:
        yield partial(sources.hub_rows, located.hub)
    for path in located.files:
        whole = path.suffix in (TEXT_SUFFIX, *CORPUS_SUFFIXES)
        if whole and data.prompt != "text":
            raise DataError(f"{path}: a {path.suffix} file holds whole documents, which need data.prompt: text; this is {data.prompt!r}")
        if path.suffix in CORPUS_SUFFIXES:
            yield partial(_first_documents, binidx.open_documents(path))
        elif whole:
            yield partial(_one_text, path, prompt.columns["text"])
        else:
            yield partial(_first_rows, path, prompt.read_columns)


def _one_text(path: Path, column: str, _: int | None) -> list[Row]:
    return [(str(path), {column: rows.read_text(path)})]


def _first_documents(documents: Documents, limit: int | None) -> Documents:
    return documents if limit is None else replace(documents, bounds=documents.bounds[:limit + 1])


def _first_rows(path: Path, columns: Sequence[str], limit: int | None) -> Iterator[Row]:
    return itertools.islice(rows.read(path, columns), limit)


def _not_empty(samples: Samples, origin: str, data: DataConfig) -> Samples:
    if not len(samples):
        report = samples.report
        raise DataError(f"{origin}: no sample is left of {report.rows} rows: {report.dropped} longer than data.max_length "
                        f"{data.max_length}, {report.label_less} without a token to learn\n"
                        f"The longest has {report.longest} tokens; raise data.max_length, or check data.prompt and data.fields")
    return samples


def _add_rows(store: Store, found: Iterable[Row], prompt: Prompt | ChatPrompt, tokenizer) -> None:
    checked = ((place, prompt.values(place, row)) for place, row in found)
    per_batch = _CHATS_PER_BATCH if isinstance(prompt, ChatPrompt) else _ROWS_PER_BATCH
    batches = iter(lambda: list(itertools.islice(checked, per_batch)), [])
    for encoded in _encoded(batches, partial(encode, prompt, tokenizer), tokenizer):
        for tokens, learnt in encoded:
            store.add(tokens, learnt)


def _encoded(batches: Iterator[Batch], encode_batch: Callable[[Batch], list[Encoded]], tokenizer) -> Iterator[list[Encoded]]:
    """Each batch encoded, in order. Hugging Face's fast tokenizers take every core by themselves; others get processes."""
    yield from map(encode_batch, itertools.islice(batches, _BATCHES_ALONE))
    workers = len(os.sched_getaffinity(0))
    following = next(batches, None)
    if following is None:
        return
    batches = itertools.chain([following], batches)
    if workers == 1 or getattr(tokenizer, "is_fast", False):
        yield from map(encode_batch, batches)
        return
    # No fork: this process may have threads. Its end does not reach what waits for the next batch.
    with ProcessPoolExecutor(workers, get_context("spawn"), child_process.end_with, (os.getpid(),)) as pool:
        pending = deque(pool.submit(encode_batch, batch) for batch in itertools.islice(batches, 2 * workers))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(encode_batch, batch) for batch in itertools.islice(batches, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode(prompt: Prompt | ChatPrompt, tokenizer, batch: Batch) -> list[Encoded]:
    """Each row's tokens and which of them are learnt, not yet cut."""
    if isinstance(prompt, ChatPrompt):
        return chat.encode(prompt, tokenizer, batch)
    eos, bos = eos_of(tokenizer), _bos(tokenizer)
    prompts = _ids(tokenizer, [prompt.prompt_text(values) for _, values in batch])
    texts = [prompt.completion_text(values) for _, values in batch]
    return [_encoded_row(ids, completion if text.strip() else None, bos, eos)
            for ids, text, completion in zip(prompts, texts, _ids(tokenizer, texts), strict=True)]


def _encoded_row(prompt: list[int], completion: list[int] | None, bos: int | None, eos: int) -> Encoded:
    if not prompt and completion and completion[0] == bos:
        prompt, completion = [bos], completion[1:]  # without a prompt, the user's own BOS stands at the head of the completion
    prompt = _with_bos(prompt, bos)
    completion = [] if completion is None else _with_eos(completion, eos)
    learnt = np.ones(len(prompt) + len(completion), bool)
    learnt[:len(prompt)] = False
    return np.array([*prompt, *completion], np.int32), learnt


def _add_documents(store: Store, documents: Documents, vocabulary_size: int, bos: int | None, eos: int) -> None:
    """As rows of the prompt `text`: BOS first and EOS last, neither doubled; a document of nothing else is empty."""
    head = np.array([] if bos is None else [bos], np.int32)
    tail = np.array([eos], np.int32)
    for index in range(len(documents)):
        text = documents.checked(index, vocabulary_size)
        text = text[1:] if len(text) and text[0] == bos else text
        text = text[:-1] if len(text) and text[-1] == eos else text
        tokens = np.concatenate([head, text, tail if len(text) else tail[:0]])
        store.add(tokens, np.arange(len(tokens)) >= len(head))


def prompt_ids(prompt_text: str, tokenizer) -> list[int]:
    """The tokens of one prompt exactly as training sees them, to generate from."""
    return _with_bos(_ids(tokenizer, [prompt_text])[0], _bos(tokenizer))


def eos_of(tokenizer) -> int:
    """Raises DataError for a tokenizer without EOS."""
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
