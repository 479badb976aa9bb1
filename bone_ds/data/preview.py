"""What the model will see of a config's data: samples with what bears loss, lengths, counts, and how packs are filled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

import numpy as np

from bone_ds.config import RunConfig
from bone_ds.data.loading import load_samples
from bone_ds.data.order import GlobalOrder
from bone_ds.data.samples import Part, Report, Samples

_BINS = 10
_BAR_WIDTH = 40
_LEARNT_MARK, _MASKED_MARK = ">", "|"
_LEARNT_COLOUR, _MASKED_COLOUR, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a sample that all bear loss, or all don't."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class SamplePreview:
    number: int
    """From 1, within the source."""
    tokens: int
    label_tokens: int
    ends_with_eos: bool
    """Whether the last token that bears loss is EOS; a chat template may put white space after it."""
    segments: tuple[Segment, ...]
    """Their texts joined are the sample's text, special tokens included."""


@dataclass(frozen=True)
class SourcePreview:
    split: str
    """train or eval"""
    name: str
    commits: tuple[str, ...]
    weight: float | None
    report: Report
    histogram: tuple[tuple[int, int, int], ...]
    """(first length, last length, samples), of the samples that are kept."""
    samples: tuple[SamplePreview, ...]


@dataclass(frozen=True)
class EpochPreview:
    """The first epoch."""

    samples: dict[str, int]
    """By source, as many as an epoch takes."""
    packs: int
    """Samples without packing."""
    steps: int
    tokens: int
    label_tokens: int
    filled: float | None
    """Share of the packs' places that hold a token; None without packing, where nothing is padded either."""


@dataclass(frozen=True)
class Preview:
    sources: tuple[SourcePreview, ...]
    epoch: EpochPreview
    longest: int
    """Tokens of the longest training sample that is kept."""

    def as_dict(self) -> dict:
        return asdict(self)


def preview(config: RunConfig, tokenizer, count: int) -> Preview:
    """With the first `count` samples of every source. Raises DataError and ConfigError as training does."""
    data = config.data
    train = load_samples(data, tokenizer, "train", config.model.cache_dir)
    sources = list(_sources("train", train, tokenizer, count))
    if data.eval:
        sources += _sources("eval", load_samples(data, tokenizer, "eval", config.model.cache_dir), tokenizer, count)
    return Preview(tuple(sources), _epoch(config, train), int(train.lengths.max()))


def segments(samples: Samples, index: int, tokenizer) -> tuple[Segment, ...]:
    """A sample's text, cut where loss begins and ends.

    The whole is decoded and then cut: decoded apart, a character of several tokens would be lost at a border.
    """
    ids = samples[index].tolist()
    runs = [(learnt, len(list(run))) for learnt, run in groupby(samples.learnt_of(index).tolist())]
    text, found, end, start = tokenizer.decode(ids), [], 0, 0
    for learnt, length in runs:
        end += length
        border = len(text) if end == len(ids) else min(len(text), max(start, len(tokenizer.decode(ids[:end]))))
        found.append(Segment(text[start:border], learnt))
        start = border
    return tuple(found)


def _sources(split: str, samples: Samples, tokenizer, count: int) -> Iterator[SourcePreview]:
    first = 0
    for part in samples.parts:
        shown = tuple(_sample(samples, first + number, number + 1, tokenizer) for number in range(min(count, part.count)))
        lengths = samples.lengths[first:first + part.count]
        yield SourcePreview(split, part.name, part.commits, part.weight, part.report, _histogram(lengths), shown)
        first += part.count


def _sample(samples: Samples, index: int, number: int, tokenizer) -> SamplePreview:
    learnt = samples[index][samples.learnt_of(index)]
    return SamplePreview(number, int(samples.lengths[index]), len(learnt), bool(learnt[-1] == samples.eos_token_id),
                         segments(samples, index, tokenizer))


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    longest = int(lengths.max())
    width = -(-longest // _BINS)
    counts = np.bincount((lengths - 1) // width)
    return tuple((number * width + 1, min((number + 1) * width, longest), int(count)) for number, count in enumerate(counts))


def _epoch(config: RunConfig, samples: Samples) -> EpochPreview:
    data = config.data
    order = GlobalOrder(samples, data.packing, data.max_length, config.train.global_batch_size, config.train.seed)
    windows = [order.window(step) for step in range(order.steps_in_epochs(1))]
    packs, tokens = sum(len(window.units) for window in windows), sum(sum(window.unit_tokens) for window in windows)
    return EpochPreview(_by_name(samples.parts, order.epoch_counts), packs, len(windows), tokens,
                        sum(window.label_tokens for window in windows), tokens / (packs * data.max_length) if data.packing else None)


def _by_name(parts: tuple[Part, ...], counts: list[int]) -> dict[str, int]:
    """A source that is named twice, with another prompt perhaps, counts once with both."""
    by_name: dict[str, int] = {}
    for part, count in zip(parts, counts or [part.count for part in parts], strict=True):
        by_name[part.name] = by_name.get(part.name, 0) + count
    return by_name


def as_text(shown: Preview, max_length: int, colour: bool = False) -> str:
    """For a terminal. What bears loss is told by a mark at the head of the line, and by colour if there is one."""
    lines = [f"{_LEARNT_MARK} bears loss, {_MASKED_MARK} does not; a change within a line of the text begins a new line here"]
    for source in shown.sources:
        lines += ["", *_source_lines(source, max_length, colour)]
    return "\n".join([*lines, "", *_epoch_lines(shown.epoch, max_length)])


def _source_lines(source: SourcePreview, max_length: int, colour: bool) -> Iterator[str]:
    report = source.report
    at = f" at {', '.join(commit[:12] for commit in source.commits)}" if source.commits else ""
    weight = f", weight {source.weight:g}" if source.weight is not None else ""
    yield f"{source.split}: {printable(source.name)}{at}{weight}"
    yield (f"  {report.kept:,} samples of {report.rows:,} rows: {report.truncated:,} truncated, {report.dropped:,} dropped as too long, "
           f"{report.label_less:,} left out without a token to learn" + (f", {report.split:,} split into {report.pieces:,}"
                                                                         if report.split else ""))
    yield (f"  {report.tokens:,} tokens, {report.label_tokens:,} of them ({report.label_tokens / report.tokens:.0%}) bear loss; the "
           f"longest row has {report.longest:,}")
    yield "  tokens of a sample"
    most = max(count for *_, count in source.histogram)
    for first, last, count in source.histogram:
        yield f"  {first:>7,} - {last:>6,} {count:>9,}  {'█' * round(_BAR_WIDTH * count / most)}".rstrip()
    for sample in source.samples:
        end = "EOS last" if sample.ends_with_eos else f"cut at {max_length:,}" if sample.tokens == max_length else "without EOS"
        yield ""
        yield f"  sample {sample.number:,}: {sample.tokens:,} tokens, {sample.label_tokens:,} bear loss, {end}"
        for segment in sample.segments:
            yield from _segment_lines(segment, colour)


def _segment_lines(segment: Segment, colour: bool) -> Iterator[str]:
    mark = _LEARNT_MARK if segment.learnt else _MASKED_MARK
    before, after = ((_LEARNT_COLOUR if segment.learnt else _MASKED_COLOUR), _PLAIN) if colour else ("", "")
    for line in segment.text.removesuffix("\n").split("\n"):
        yield f"  {mark} {before}{printable(line)}{after}".rstrip(" ")


def _epoch_lines(epoch: EpochPreview, max_length: int) -> Iterator[str]:
    samples = sum(epoch.samples.values())
    if epoch.filled is None:
        yield f"an epoch: {samples:,} samples without packing or padding"
    else:
        yield (f"an epoch: {samples:,} samples in {epoch.packs:,} packs of {max_length:,} tokens, {epoch.filled:.1%} filled, "
               f"{samples / epoch.packs:.1f} samples a pack")
    yield f"  optimizer steps {epoch.steps:,}, tokens {epoch.tokens:,}, of which {epoch.label_tokens:,} bear loss"
    if len(epoch.samples) > 1:
        for name, count in epoch.samples.items():
            yield f"  {count:>9,} of {printable(name)} ({count / samples:.1%})"


def printable(text: str) -> str:
    """Control characters as escapes: data must not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\t" else letter.encode("unicode_escape").decode() for letter in text)
