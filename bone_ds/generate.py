"""Continuations of prompts: by a model of ours with its adapter, and by plain transformers, which knows nothing of this project."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bone_ds import adapter_file, arch, merge
from bone_ds.adapter_file import Header
from bone_ds.arch import Architecture, Source
from bone_ds.config import ModelConfig
from bone_ds.data import prompt_ids
from bone_ds.errors import CheckpointError, ConfigError, DataError
from bone_ds.resolution import DTYPES

_NO_TOKEN = -1


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
    model = _adapted(architecture, source, DTYPES[config.dtype], *(given or (None, {})))
    return Loaded(architecture, model.eval(), tokenizer)


def _adapted(architecture: Architecture, source: Source, dtype: torch.dtype, header: Header | None,
             tensors: dict[str, Tensor]) -> nn.Module:
    """The base whose weights were merged as they came from the file, or with its initial state."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = architecture.build(source, dtype)
    is_state = header is not None and header.method == "state"
    change = merge.change_of(header, tensors) if header and not is_state else lambda name, weight: weight
    architecture.load(model, source, _Changing(model, change))
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


def continuations(loaded: Loaded, prompts: list[str], max_new_tokens: int, choose: Callable[[Tensor], Tensor],
                  batch_size: int = 16, ignore_eos: bool = False) -> list[str]:
    """Each prompt's continuation up to EOS, tokenised as in training; shortest prompts first. Raises DataError for an empty one.

    With `ignore_eos` all go on to max_new_tokens: for models of bytes whose text holds the byte that is EOS, as UTF-16 does.
    """
    ids = [prompt_ids(prompt, loaded.tokenizer) for prompt in prompts]
    for number, row in enumerate(ids, 1):
        if not row:
            raise DataError(f"prompt {number} of {len(ids)}: is empty, there is nothing to continue")
    stop = _NO_TOKEN if ignore_eos else loaded.tokenizer.eos_token_id
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        rows = loaded.architecture.generate(loaded.model, [ids[index] for index in batch], max_new_tokens, stop, choose)
        for index, row in zip(batch, rows, strict=True):
            texts[index] = loaded.tokenizer.decode(row, skip_special_tokens=True)
    return texts


def most_likely(logits: Tensor) -> Tensor:
    """(D, V) -> (D,)"""
    return logits.argmax(dim=-1)


def sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Draws from softmax(logits / temperature), of which the least likely tokens that fill 1 - top_p are left out.

    Equal seeds draw equally where the batches are equal. Raises ConfigError.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"--temperature: {temperature} is no temperature, give a number above 0, or leave it out for the likeliest token")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p: {top_p} is no share, give a number above 0 and up to 1")
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        logits_below_the_largest = (logits - logits.amax(dim=-1, keepdim=True)).double().cpu()  # so that no quotient overflows
        shares, tokens = (logits_below_the_largest / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        shares[shares.cumsum(dim=-1) - shares >= top_p] = 0  # the likeliest token always stays
        drawn = torch.multinomial(shares, 1, generator=generator)
        return tokens.gather(1, drawn)[:, 0].to(logits.device)

    return choose


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of every line of a .jsonl file. Raises DataError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
