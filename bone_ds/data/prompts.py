"""Rows to text: a prompt, which bears no loss, and the completion, which is learnt."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bone_ds.config import DataConfig
from bone_ds.data import fields
from bone_ds.errors import ConfigError

_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{%s}\n\n### Response:")
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
_OPENING = re.compile(r"(?:[ \t>]|[-*+][ \t]|\d{1,9}[.)][ \t])*(`{3,}(?=[^`]*$)|~{3,})")
"""A fence at the head of a line, or of an item of a list, or of a quote."""
_CLOSING = re.compile(r"[ \t>]*(`{3,}|~{3,})\s*$")


@dataclass(frozen=True)
class Prompt:
    """How a row is worded. Templates hold {field} places; a brace itself is written twice."""

    template: str
    completion: str
    columns: Mapping[str, str]
    """The prompt's field -> the file's column, for every field that is read."""
    optional: tuple[str, ...] = ()
    """Fields that may be missing, null or empty in a row; empty ones choose `template_without_optional`."""
    template_without_optional: str | None = None
    without_blank_lines: tuple[str, ...] = ()
    """Fields that are stripped and whose runs of line ends become one."""
    drop_after_code: bool = False
    """Whether the completion ends with its first fenced code block."""

    @property
    def read_columns(self) -> tuple[str, ...]:
        return tuple(self.columns.values())

    def values(self, place: str, row: Mapping[str, Any]) -> dict[str, str]:
        """column -> text of a row as it was read. Raises DataError naming the place, the field and the value."""
        return fields.texts(place, row, self.columns, self.optional)

    @property
    def prompt_columns(self) -> dict[str, str]:
        """The part of `columns` that the prompt alone needs: enough to generate from rows without a completion."""
        wanted = {*_places("data.template", self.template), *self.optional}
        return {field: column for field, column in self.columns.items() if field in wanted}

    def prompt_text(self, row: Mapping[str, str | None]) -> str:
        """row: the file's column -> text."""
        values = self._values(row)
        filled = all(values.get(field, "").strip() for field in self.optional)
        template = self.template if filled or self.template_without_optional is None else self.template_without_optional
        return template.format_map(values)

    def completion_text(self, row: Mapping[str, str | None]) -> str:
        text = self.completion.format_map(self._values(row))
        return _until_code(text) if self.drop_after_code else text

    def _values(self, row: Mapping[str, str | None]) -> dict[str, str]:
        values = {field: row.get(column) or "" for field, column in self.columns.items()}
        return values | {field: without_blank_lines(values[field]) for field in self.without_blank_lines}


def without_blank_lines(text: str) -> str:
    """Stripped, runs of line ends made one: a blank line ends a turn for RWKV's World models."""
    return re.sub(r"\n+", "\n", text.replace("\r\n", "\n").strip())


def _until_code(text: str) -> str:
    """Up to the end of the first fenced code block; all of it where there is none, or one that is never closed."""
    fence, end = None, 0  # end: behind the line and its line end
    for line in text.split("\n"):
        end += len(line) + 1
        if fence is None:
            fence = (found := _OPENING.match(line)) and found[1]
        elif (found := _CLOSING.match(line)) and found[1].startswith(fence):
            return text[:end - 1]
    return text


def build_prompt(data: DataConfig) -> Prompt:
    """The prompt of one row that the config names. Raises ConfigError for a template or a data.fields that can't be used.

    user_assistant words a row as "User: {query}\\n\\nAssistant:" and " {response}". A blank line ends a turn for RWKV's World
    models, so the query is stripped and its runs of line ends become one, as BlinkDL's model cards advise ("better replace
    \\n\\n in xxx to \\n") and ChatRWKV's API_DEMO_CHAT.py does; the prompt ends with the colon, the space belongs to the answer,
    which is otherwise learnt as it stands.
    text has no prompt: the whole row is the completion. code is CodeFeedback as the paper trains on it, "removing explanations after
    code blocks": the answer ends with its first fenced block.
    """
    prompt = _worded(data)
    return replace(prompt, drop_after_code=True) if data.drop_after_code else prompt


def _worded(data: DataConfig) -> Prompt:
    if data.prompt == "metamath":
        return Prompt(_ALONE % "query", "{response}", columns_of(("query", "response"), data.fields))
    if data.prompt == "code":
        return Prompt(_ALONE % "query", "{answer}", columns_of(("query", "answer"), data.fields), drop_after_code=True)
    if data.prompt == "wizardlm":
        return Prompt(_ALONE % "instruction", "{output}", columns_of(("instruction", "output"), data.fields))
    if data.prompt == "instruction":
        columns = columns_of(("instruction", "input", "output"), data.fields)
        if "input" not in data.fields and "input" in data.fields.values():
            del columns["input"]  # the file's column of that name was given to another field
        return Prompt(_WITH_INPUT, "{output}", columns, optional=("input",), template_without_optional=_ALONE % "instruction")
    if data.prompt == "user_assistant":
        columns = columns_of(("query", "response"), data.fields)
        return Prompt("User: {query}\n\nAssistant:", " {response}", columns, without_blank_lines=("query",))
    if data.prompt == "text":
        return Prompt("", "{text}", columns_of(("text",), data.fields))
    assert data.template is not None and data.completion is not None, "the config checks this"
    learnt = _places("data.completion", data.completion)
    if not learnt:
        raise ConfigError(f"data.completion: {data.completion!r} holds no {{field}}, every row would teach the same text")
    names = tuple(dict.fromkeys((*_places("data.template", data.template), *learnt)))
    return Prompt(data.template, data.completion, columns_of(names, data.fields))


def columns_of(names: tuple[str, ...], mapping: Mapping[str, str]) -> dict[str, str]:
    """The prompt's fields -> the data's columns. Raises ConfigError for a mapping of a field that the prompt hasn't."""
    for name in mapping:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"data.fields: the prompt has no field {name!r}, it has {', '.join(names)}{advice}")
    return {name: mapping.get(name, name) for name in names}


def _places(origin: str, template: str) -> tuple[str, ...]:
    """The field names in a template, in order, each once. Raises ConfigError for anything but a plain {field}."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{origin}: {template!r}: {error}; write a literal brace twice, {{{{ or }}}}") from None
    names = []
    for _, name, layout, conversion in parts:
        if name is None:
            continue
        if not name.strip() or name.isdigit() or layout or conversion or any(mark in name for mark in ".[]{}"):
            raise ConfigError(f"{origin}: the place {{{name}}} is no plain {{field}}; write a literal brace twice, {{{{ or }}}}")
        names.append(name)
    return tuple(dict.fromkeys(names))
