"""Conversations to tokens: every turn of the assistant is learnt, everything else is not.

Through a chat template, which is a program: which tokens are whose is found by rendering. For the assistant's turn number i the
turns before it are rendered with the generation prompt, and the turns up to it without; what the second has more than the first is
the turn. That holds only where each rendering is the beginning of the next, in tokens: a conversation for which it isn't is refused,
since the model would be asked to continue something else than it learnt.

A tokenizer without templates, RWKV's, words turns as `user_assistant` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bone_ds.config import DataConfig
from bone_ds.data import fields
from bone_ds.data.chat_template import ChatTemplate, template_text
from bone_ds.data.fields import Turn
from bone_ds.data.prompts import columns_of, without_blank_lines
from bone_ds.errors import ConfigError, DataError

Encoded = tuple[np.ndarray, np.ndarray]
"""A sample's tokens (length,) int32, and which of them are learnt (length,) bool."""

_NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}
_SHOWN_CHARACTERS = 30


@dataclass(frozen=True)
class ChatPrompt:
    """How conversations are read and rendered."""

    columns: tuple[str, ...]
    """Where a row may hold its conversation; the first that is there counts."""
    template: str | None
    """In place of the tokenizer's own."""

    @property
    def read_columns(self) -> tuple[str, ...]:
        return self.columns

    def values(self, place: str, row: Mapping[str, Any]) -> list[Turn]:
        column = next((column for column in self.columns if row.get(column) is not None), self.columns[0])
        return fields.turns(place, row, column)


def build_chat_prompt(data: DataConfig) -> ChatPrompt:
    """Raises ConfigError for a data.fields or a data.chat_template that can't be used."""
    columns = (columns_of(("messages",), data.fields)["messages"],) if data.fields else ("messages", "conversations")
    return ChatPrompt(columns, data.chat_template and template_text(data.chat_template))


def encode(prompt: ChatPrompt, tokenizer, rows: Sequence[tuple[str, list[Turn]]]) -> list[Encoded]:
    """Each conversation up to the assistant's last turn; one without such a turn has nothing to learn. rows: places and turns.

    Raises DataError naming the row and the turn where what is learnt can't be told, and where the tokenizer has no template.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        if prompt.template is not None:
            raise ConfigError("data.chat_template: this tokenizer knows no templates, turns are worded User: and Assistant:; remove it")
        return [_as_user_assistant(place, turns, tokenizer) for place, turns in rows]
    template = ChatTemplate(tokenizer, prompt.template)
    rendered = [_rendered(place, turns, template) for place, turns in rows]
    ids = iter(template.tokens([text for one in rendered for text in one]))
    return [_encoded(place, turns, one, list(islice(ids, len(one))), template, tokenizer.eos_token_id)
            for (place, turns), one in zip(rows, rendered, strict=True)]


def _answers(turns: Sequence[Turn]) -> list[int]:
    """The places of the assistant's turns. An empty one is none: a model would learn to say nothing."""
    return [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.content.strip()]


def _rendered(place: str, turns: list[Turn], template: ChatTemplate) -> list[str]:
    """For every turn of the assistant, the conversation before it and the conversation with it."""
    answers = _answers(turns)
    if answers[:1] == [0]:
        raise DataError(f"{place}: turn 1 is the assistant's: nothing before it asks for it; remove that turn, or the row")
    return [text for index in answers
            for text in (template.render(place, turns[:index], True), template.render(place, turns[:index + 1], False))]


def _encoded(place: str, turns: list[Turn], texts: list[str], ids: list[list[int]], template: ChatTemplate, eos: int) -> Encoded:
    """texts: as `_rendered` gives them; ids: their tokens."""
    if not texts:
        return _NOTHING
    for number in range(1, len(ids)):
        if ids[number][:len(ids[number - 1])] != ids[number - 1]:
            raise DataError(_unsafe(place, _answers(turns)[number // 2] + 1, *texts[number - 1:number + 1]))
    ends = [template.end(after, text.removeprefix(before), turns[index].content)
            for after, before, text, index in zip(ids[1::2], texts[::2], texts[1::2], _answers(turns), strict=True)]
    tokens = ids[-1] if ends[-1][1] else [*ids[-1], eos]
    learnt = np.zeros(len(tokens), bool)
    for before, (end, _) in zip(ids[::2], ends, strict=True):
        learnt[len(before):end] = True
    learnt[len(ids[-1]):] = True  # EOS, where the template has no end of its own
    return np.array(tokens, np.int32), learnt


def _unsafe(place: str, turn: int, before: str, after: str) -> str:
    """Why the second rendering doesn't begin with the first."""
    advice = "what would bear loss can't be told; give a template with data.chat_template"
    if after.startswith(before):
        return f"{place}: turn {turn}: the chat template leaves no border of tokens after {before[-_SHOWN_CHARACTERS:]!r}; {advice}"
    start = next((at for at, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after)))
    was, now = (text[start:start + _SHOWN_CHARACTERS] for text in (before, after))
    return (f"{place}: turn {turn}: the chat template renders what comes before otherwise once it is there: {was!r} becomes {now!r}; "
            f"{advice}")


def _as_user_assistant(place: str, turns: list[Turn], tokenizer) -> Encoded:
    """A turn ends with a blank line, the last one with EOS. Pieces are tokenised apart, as in generation."""
    answers = _answers(turns)
    if not answers:
        return _NOTHING
    pieces = [""]  # not learnt and learnt, by turns
    for number, (role, content) in enumerate(turns[:answers[-1] + 1], 1):
        if role not in _NAMES:
            raise DataError(f"{place}: turn {number}: the role {role!r} has no place in User: and Assistant: turns; remove the row")
        if number - 1 in answers:
            pieces[-1] += "Assistant:"
            pieces += [f" {content}\n\n", ""]
        else:
            pieces[-1] += f"{_NAMES[role]}: {without_blank_lines(content)}\n\n"
    pieces = pieces[:-1]
    pieces[-1] = pieces[-1].removesuffix("\n\n")
    ids = tokenizer(pieces)["input_ids"]
    ids[-1] = [*ids[-1], tokenizer.eos_token_id]
    learnt = np.concatenate([np.full(len(part), bool(number % 2)) for number, part in enumerate(ids)])
    return np.array([token for part in ids for token in part], np.int32), learnt


_NOTHING: Encoded = (np.empty(0, np.int32), np.empty(0, bool))
