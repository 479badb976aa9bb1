"""A chat template in use: a program that words conversations, the tokenizer's own or one that is given in its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bone_ds.data.fields import Turn
from bone_ds.errors import ConfigError, DataError

_DATE = {"%d": "26", "%-d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday",
         "%H": "00", "%M": "00", "%S": "00"}
"""The day that Llama 3's template takes where nothing tells it the time."""
_CLOCK = ("{%- macro strftime_now(layout) -%}{{ layout" + "".join(f"|replace('{code}', '{text}')" for code, text in _DATE.items())
          + " }}{%- endmacro %}\n")
"""Before a template that asks for the date: the wall clock would make other tokens every day. The line end is no part of the text."""
_REASON_CHARACTERS = 160


class ChatTemplate:
    """Renders conversations, and tells where a turn ends in their tokens."""

    def __init__(self, tokenizer: Any, given: str | None, asked_by: str = "data.prompt: chat", option: str = "data.chat_template"):
        """given: in place of the tokenizer's own. asked_by, option: what errors name. Raises DataError where there is no template."""
        if given is None and not tokenizer.chat_template:
            raise DataError(f"{asked_by}: the tokenizer has no chat template; give one with {option}")
        try:
            text = tokenizer.get_chat_template(given)
        except ValueError as error:  # several by name, and none of them is the default
            raise DataError(f"{asked_by}: {_reason(error)}; give one with {option}") from None
        self._tokenizer = tokenizer
        self._option = option
        self._text = _CLOCK + text if "strftime_now" in text else text

    def render(self, place: str, turns: Sequence[Turn], asks: bool) -> str:
        """asks: whether the generation prompt stands at the end.

        Raises ConfigError for a template that is none, and DataError naming the place where it refuses the turns.
        """
        import jinja2

        messages = [turn._asdict() for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(messages, chat_template=self._text, add_generation_prompt=asks, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{self._option}: line {_line(error)}: {error.message}") from None
        except Exception as error:  # a template raises what it likes
            raise DataError(f"{place}: the chat template refuses it: {_reason(error)}") from None

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Of rendered texts, which name special tokens themselves."""
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"] if texts else []

    def end(self, ids: list[int], answer: str, content: str) -> tuple[int, bool]:
        """Where the turn that these tokens end with ends, and whether a token of its own says so: EOS, or an added one of the template's.

        answer: the turn as rendered. What the template puts behind its content counts: the content may itself end with an added token,
        such as one of a tool's. White space behind the ending token is between turns: a model that has said it is not asked to go on.
        """
        tail = answer.split(content.strip(), 1)[-1]
        for end in range(len(ids), 0, -1):
            if ids[end - 1] == self._tokenizer.eos_token_id or ids[end - 1] in self._added and self._added[ids[end - 1]] in tail:
                return end, True
            if self._tokenizer.decode(ids[end - 1:end]).strip():
                break
        return len(ids), False

    @cached_property
    def _added(self) -> dict[int, str]:
        return {index: text for text, index in self._tokenizer.get_added_vocab().items()}


def template_text(given: str, option: str = "data.chat_template") -> str:
    """A template, or the content of a .jinja file. Raises ConfigError, naming the option."""
    if not given.endswith(".jinja"):
        return given
    try:
        return Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: {given}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {given}: is no UTF-8 text (byte {error.start})") from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:_REASON_CHARACTERS]


def _line(error) -> int:
    """Of the template as it was given."""
    return error.lineno - _CLOCK.count("\n") if (error.source or "").startswith(_CLOCK) else error.lineno
