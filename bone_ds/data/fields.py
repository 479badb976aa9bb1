"""The values of a row: every one that is needed, checked. The one place where a wrong value is named."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bone_ds.errors import DataError

SHOWN_CHARACTERS = 60
_SHOWN_FIELDS = 12
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "tool": "tool"}
_TURN_KEYS = (("role", "content"), ("from", "value"))


class Turn(NamedTuple):
    role: str
    """user, assistant, system or tool"""
    content: str


def texts(place: str, row: Mapping[str, Any], columns: Mapping[str, str], optional: Sequence[str] = ()) -> dict[str, str]:
    """column -> text of one row. columns: the prompt's field -> the row's column. optional: fields that may be missing or null: empty.

    Raises DataError naming the place, the field and the value.
    """
    found = {}
    for field, column in columns.items():
        if field in optional and row.get(column) is None:
            found[column] = ""
        elif column not in row:
            raise DataError(_missing(place, row, field, column))
        else:
            found[column] = _text(place, f"the field {column!r}", row[column])
    return found


def turns(place: str, row: Mapping[str, Any], column: str) -> list[Turn]:
    """The conversation that one column holds: a list of {role, content}, or ShareGPT's {from, value}. Raises DataError."""
    if column not in row:
        raise DataError(_missing(place, row, "messages", column))
    value = row[column]
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: the field {column!r} is {shown(value)}; make it a list of {{\"role\": ..., \"content\": ...}}")
    return [_turn(f"{place}: turn {number} of {column!r}", turn) for number, turn in enumerate(value, 1)]


def _turn(place: str, turn: Any) -> Turn:
    keys = next((keys for keys in _TURN_KEYS if isinstance(turn, dict) and set(keys) <= set(turn)), None)
    if keys is None:
        raise DataError(f"{place} is {shown(turn)}; make it an object with role and content, or from and value")
    role, content = (turn[key] for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{place}: the {keys[0]} is {shown(role)}, known are {', '.join(_ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{place} calls tools, which can't be rendered; remove the row")
    return Turn(_ROLES[role], _text(place, f"the {keys[1]}", content))


def _missing(place: str, row: Mapping[str, Any], field: str, column: str) -> str:
    names = ", ".join(map(shown, list(row)[:_SHOWN_FIELDS])) + (", ..." if len(row) > _SHOWN_FIELDS else "")
    lowered = {str(name).lower(): name for name in row}
    near = difflib.get_close_matches(column.lower(), lowered, n=1)
    advice = f"did you mean {lowered[near[0]]!r}? " if near else ""
    return (f"{place}: there is no field {column!r}, the row has {names or 'none'}\n"
            f"{advice}Say which one holds the prompt's {field!r} with data.fields: {{{field}: <name in the file>}}")


def _text(place: str, what: str, value: Any) -> str:
    if value is None:
        raise DataError(f"{place}: {what} is null, give it a text or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {shown(value)}, a {_kind(value)}; make it a text in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = value[error.start].encode("unicode_escape").decode()
        raise DataError(f"{place}: {what} holds {broken}, half a surrogate pair; mend or remove the row") from None
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}
    return kinds.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """As JSON, cut short."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
