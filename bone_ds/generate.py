"""Continuations of prompts: by a model of ours with its adapter, and by plain transformers, which knows nothing of this project."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bone_ds import adapter_file, arch, merge
from bone_ds.adapter_file import Header
from bone_ds.arch import Architecture, Reading, Source
from bone_ds.checksums import Checksums
from bone_ds.config import ModelConfig
from bone_ds.data import prompt_ids
from bone_ds.errors import CheckpointError, ConfigError, DataError
from bone_ds.resolution import DTYPES

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_SMALLEST_PENALTY = 1e-6
"""Below it, and above its inverse, logits in fp32 may become infinite."""

Choice = Callable[[Tensor], Tensor]
"""logits (D, V) -> tokens (D,)"""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to continue text."""

    architecture: Architecture
    model: nn.Module
    tokenizer: object


def load(config: ModelConfig, adapter: Path | None = None) -> Loaded:
    """The model with the adapter on it, on the GPU if there is one. Raises CheckpointError where they don't belong together."""
    architecture = arch.resolve(config)
    given = None if adapter is None else adapter_file.read(adapter)
    if given and given[0].architecture != architecture.name:
        raise CheckpointError(f"{adapter}: is an adapter for {given[0].architecture}, {config.path} is a {architecture.name} model")
    source = architecture.open(config)
    tokenizer = architecture.tokenizer(source)
    if given:
        merge.check_base(given[0], adapter, source)
        merge.check_fit(adapter, *given, architecture, source)
    checksums = merge.checksums_of(given[0], adapter, source) if given else None
    model = _adapted(architecture, source, DTYPES[config.dtype], *(given or (None, {})), checksums)
    return Loaded(architecture, model.eval(), tokenizer)


def _adapted(architecture: Architecture, source: Source, dtype: torch.dtype, header: Header | None,
             tensors: dict[str, Tensor], checksums: Checksums | None) -> nn.Module:
    """The base whose weights were merged as they came from the file, or with its initial state."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = architecture.build(source, dtype)
    is_state = header is not None and header.method == "state"
    change = merge.change_of(header, tensors) if header and not is_state else lambda name, weight: weight
    architecture.load(model, source, _Changing(model, change), checksums)
    if is_state:
        first, last = header.layers or (0, len(architecture.layers(model)))
        with torch.no_grad():
            for name, parameter in architecture.add_initial_state(model, first, last).items():
                parameter.copy_(tensors[name])
    return model.requires_grad_(False)


class _Changing:
    """A placement of whole parameters, each as change(name, tensor)."""

    def __init__(self, model: nn.Module, change: Callable[[str, Tensor], Tensor]):
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.change = change

    def empty(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        with torch.no_grad():
            param.copy_(self.change(self.names[param], tensor))


def generate(architecture: Architecture, model: nn.Module, prompts: list[list[int]], max_new_tokens: int, stop: Collection[int],
             choose: Choice, repetition_penalty: float = 1.0, ended: Callable[[int, list[int]], bool] | None = None,
             reading: Reading | None = None) -> list[list[int]]:
    """Continues every prompt until a token of `stop`, which is left out, or max_new_tokens; finished ones leave the batch.

    choose: logits (D, V) -> tokens (D,). ended: called with a prompt's index and its continuation after every token; true ends it.
    reading: has read what comes before the prompts, which the penalty doesn't see; by default nothing. The last token is not read.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    reading = reading or architecture.reading(model, len(prompts))
    going_on, unread = list(range(len(prompts))), prompts
    for _ in range(max_new_tokens):
        logits = reading.read(unread)
        if repetition_penalty != 1:
            logits = penalised(logits, [prompts[index] + continuations[index] for index in going_on], repetition_penalty)
        chosen = choose(logits).tolist()
        kept = []
        for place, (index, token) in enumerate(zip(going_on, chosen, strict=True)):
            if token in stop:
                continue
            continuations[index].append(token)
            if ended is None or not ended(index, continuations[index]):
                kept.append(place)
        if not kept:
            break
        if len(kept) < len(going_on):
            reading.keep(kept)
            going_on = [going_on[place] for place in kept]
        unread = [[chosen[place]] for place in kept]
    return continuations


def continuations(loaded: Loaded, prompts: list[str], max_new_tokens: int, choose: Choice, batch_size: int = 16,
                  ignore_eos: bool = False, repetition_penalty: float = 1.0, stops: Sequence[str] = (),
                  show: Callable[[str], None] | None = None) -> list[str]:
    """Each prompt's continuation up to EOS or a text or special token of `stops`, tokenised as in training; shortest prompts first.

    With `ignore_eos` all go on to max_new_tokens: for models of bytes whose text holds the byte that is EOS, as UTF-16 does.
    show: given the pieces of the text as they come, of one prompt alone. Raises DataError for an empty prompt.
    """
    ids = encoded(prompts, loaded.tokenizer)
    assert show is None or len(prompts) == 1, "texts that come at once can't be shown one after the other"
    stops, special = _texts_and_special_tokens(stops, loaded.tokenizer)
    stop = special if ignore_eos else {loaded.tokenizer.eos_token_id, *special}
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        streams = [TextStream(loaded.tokenizer, stops, show) for _ in batch]
        ended = (lambda place, row, streams=streams: streams[place].follow(row)) if stops or show else None
        rows = generate(loaded.architecture, loaded.model, [ids[index] for index in batch], max_new_tokens, stop, choose,
                        repetition_penalty, ended)
        for index, row, stream in zip(batch, rows, streams, strict=True):
            texts[index] = stream.finish(row)
    return texts


def encoded(prompts: list[str], tokenizer) -> list[list[int]]:
    """The tokens of each prompt. Raises DataError for an empty one, and what is no text."""
    for number, prompt in enumerate(prompts, 1):
        check_is_text(f"prompt {number} of {len(prompts)}", prompt)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    for number, row in enumerate(ids, 1):
        if not row:
            raise DataError(f"prompt {number} of {len(ids)}: is empty, there is nothing to continue")
    return ids


def check_is_text(place: str, text: str) -> None:
    """Raises DataError for half a surrogate pair: JSON may hold one, and Python has it for bytes of a terminal that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: is no UTF-8 text (character {error.start + 1} is {text[error.start]!a})") from None


def _texts_and_special_tokens(stops: Sequence[str], tokenizer) -> tuple[list[str], set[int]]:
    """Stops that are found in the text, and the tokens of those that are a special token, which decoding leaves out."""
    special = {token.content: number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return [stop for stop in stops if stop not in special], {special[stop] for stop in stops if stop in special}


class TextStream:
    """The text of tokens as they come, in pieces that are never taken back, up to the first of the stop texts, which is left out."""

    def __init__(self, tokenizer, stops: Sequence[str] = (), show: Callable[[str], None] | None = None):
        self._tokenizer = tokenizer
        self._stops = stops
        self._show = show
        self._shown = 0

    def follow(self, tokens: list[int]) -> bool:
        """Takes all tokens so far; whether the text holds a stop text."""
        text, stopped = self._text(tokens)
        # A character that is not complete is U+FFFD until it is; and what may be the head of a stop text waits.
        safe = len(text) if stopped else len(text.rstrip(_INCOMPLETE))
        if not stopped:
            safe -= max((size for stop in self._stops for size in range(1, len(stop)) if text[:safe].endswith(stop[:size])), default=0)
        self._show_to(text, safe)
        return stopped

    def finish(self, tokens: list[int]) -> str:
        """The whole text, of which what has not been shown is."""
        text, _ = self._text(tokens)
        self._show_to(text, len(text))
        return text

    def _text(self, tokens: list[int]) -> tuple[str, bool]:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [place for place in map(text.find, self._stops) if place >= 0]
        return (text[:min(ends)], True) if ends else (text, False)

    def _show_to(self, text: str, end: int) -> None:
        if self._show and end > self._shown:
            self._show(text[self._shown:end])
            self._shown = end


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, by the names and in the order of transformers: penalty, temperature, top_k, top_p."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """The likeliest tokens alone; 0 is all."""
    top_p: float = 1.0
    """The likeliest tokens alone that fill this share."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that stand in the prompt or the continuation, and multiplies the negative ones."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError naming the option."""
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"--temperature: {self.temperature} is no temperature, give a number above 0, or leave it out for the "
                              "likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: {self.top_p} is no share, give a number above 0 and up to 1")
        if self.top_k < 0:
            raise ConfigError(f"--top-k: {self.top_k} is no number of tokens, give 1 or more, or 0 for all")
        if not _SMALLEST_PENALTY <= self.repetition_penalty <= 1 / _SMALLEST_PENALTY:
            raise ConfigError(f"--repetition-penalty: {self.repetition_penalty} is no factor, give one such as 1.2; 1 is none")

    def choice(self) -> Choice:
        """What chooses from logits (D, V) that are already penalised. Equal seeds draw equally where the batches are equal."""
        self.check()
        if not self.do_sample:
            return most_likely
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            shares, tokens = self.shares(logits)
            drawn = torch.multinomial(shares, 1, generator=generator)
            return tokens.gather(1, drawn)[:, 0].to(logits.device)

        return choose

    def shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (D, V) -> fp64 shares (D, V) on the CPU, largest first, and the tokens they are of. They don't sum to 1."""
        logits_below_the_largest = (logits - logits.amax(dim=-1, keepdim=True)).double().cpu()  # so that no quotient overflows
        scaled, tokens = (logits_below_the_largest / self.temperature).sort(dim=-1, descending=True)
        if 0 < self.top_k < scaled.shape[-1]:
            scaled[:, self.top_k:] = -math.inf
        shares = scaled.softmax(dim=-1)
        shares[shares.cumsum(dim=-1) - shares >= self.top_p] = 0  # the likeliest token always stays
        return shares, tokens


def penalised(logits: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    """Logits (D, V) with those of each row's seen tokens made smaller by a penalty above 1."""
    logits = logits.clone()
    for row, tokens in zip(logits, seen, strict=True):
        unique = torch.tensor(sorted(set(tokens)), device=logits.device)
        row[unique] = torch.where(row[unique] < 0, row[unique] * penalty, row[unique] / penalty)
    return logits


def most_likely(logits: Tensor) -> Tensor:
    """(D, V) -> (D,)"""
    return logits.argmax(dim=-1)


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of every line of a .jsonl file. Raises DataError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold what splitlines takes for a line's end
    except OSError as error:
        raise DataError(f"--prompts: {path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {path}: is no UTF-8 text (byte {error.start})") from None
    prompts = [_prompt_of(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"--prompts: {path}: holds no prompts")
    return prompts


def _prompt_of(place: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: is no JSON, give {{\"prompt\": ...}} a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{place}: holds {line[:60]!r}, give {{\"prompt\": text}} a line")
    return row["prompt"]


def as_jsonl(prompts: Iterable[str], completions: Iterable[str]) -> str:
    return "".join(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
                   for prompt, completion in zip(prompts, completions, strict=True))


def as_text(prompts: list[str], completions: list[str]) -> str:
    """One completion as it is; several under a line each that tells the prompt."""
    if len(completions) == 1:
        return completions[0]
    blocks = [f"=== {number} of {len(prompts)}: {' '.join(prompt.split())[:80]}\n{completion}"
              for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1)]
    return "\n".join(blocks)


def load_plain(directory: Path, dtype: torch.dtype):
    """A model directory as transformers alone reads it, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@torch.inference_mode()
def complete(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """What a plain transformers model continues each prompt with, most likely token by token; shortest prompts first."""
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        tokens, mask = _left_padded([ids[index] for index in batch], tokenizer.eos_token_id)
        output = model.generate(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.eos_token_id)
        for index, row in zip(batch, output[:, tokens.shape[1]:], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _left_padded(rows: list[list[int]], filling: int) -> tuple[Tensor, Tensor]:
    """(N, T) tokens and mask: generation continues each row at its right end."""
    width = max(map(len, rows))
    tokens = torch.tensor([[filling] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
