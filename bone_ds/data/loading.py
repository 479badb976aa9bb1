"""The samples that a config names, of one source after the other."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bone_ds.config import DataConfig
from bone_ds.data import cache, sources
from bone_ds.data.chat import ChatPrompt, build_chat_prompt
from bone_ds.data.prompts import Prompt, build_prompt
from bone_ds.data.samples import Part, Samples, joined
from bone_ds.data.tokenization import read


def load_samples(data: DataConfig, tokenizer, split: Literal["train", "eval"] = "train", cache_dir: str | Path | None = None) -> Samples:
    """The samples of data.train or data.mixture (data.eval). Raises DataError or ConfigError, naming what is wrong and where.

    cache_dir: where tokenised data is kept; None: nowhere.
    """
    if split == "eval" or not data.mixture:
        return _load(data, tokenizer, split, cache_dir, None)
    return joined([_load(data.of_source(source), tokenizer, split, cache_dir, source.weight) for source in data.mixture])


def _load(data: DataConfig, tokenizer, split: Literal["train", "eval"], cache_dir: str | Path | None, weight: float | None) -> Samples:
    prompt = _prompt(data)
    located = sources.locate(data, split)
    limit = data.train_samples if split == "train" else data.eval_samples
    samples, place, was_cached = None, None, False
    if cache_dir is not None and data.cache:
        place = cache.place_of(Path(os.path.expanduser(cache_dir)), located, prompt, tokenizer, data, limit)
    if place is not None:
        try:
            samples, was_cached = cache.read_or_build(place, lambda: read(located, prompt, tokenizer, data, limit))
        except OSError:
            place = None  # not ours to write to: the run goes on without
    if samples is None:
        samples = read(located, prompt, tokenizer, data, limit)
    if place is not None and not place.exists():
        place = None  # the disk became full
    part = Part(", ".join(one.name for one in located), len(samples), samples.report, weight,
                tuple(one.hub.commit for one in located if one.hub), place, was_cached)
    return replace(samples, parts=(part,))


def _prompt(data: DataConfig) -> Prompt | ChatPrompt:
    return build_chat_prompt(data) if data.prompt == "chat" else build_prompt(data)
