"""Files to rows: .jsonl and .json into one table of text columns, a .txt into a table of one row.

`datasets` reads a well-formed file fast. It also guesses: text that looks like dates becomes dates, numbers become text when
most of a column is text. So its result is taken only where every needed column is text without gaps; anything else is read
again by `_read_exactly`, the one place where a bad row is found and named.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIX = ".txt"
_LARGEST_TEXT_BYTES = 2**31 - 1  # of one text in a table
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GLOB_CHARACTERS = "*?[]"
_SHOWN_CHARACTERS = 60
_SHOWN_FIELDS = 12


def read_rows(
        paths: Sequence[str], columns: Mapping[str, str], optional: Sequence[str] = (), limit: int | None = None) -> Dataset:
    """The first `limit` rows of the files, in order, as a table of the text columns that `columns` names.

    columns: the prompt's field -> the file's column. optional: fields that may be missing or null (read as empty text).
    Raises DataError naming the file, the row, the field and the value.
    """
    from datasets import concatenate_datasets

    needed = {column: field in optional for field, column in columns.items()}
    tables: list[Dataset] = []
    for path in (Path(path).expanduser() for path in paths):
        room = None if limit is None else limit - sum(map(len, tables))
        if room == 0:
            break
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: the suffix {path.suffix!r} is not supported, give a {' or '.join(SUFFIXES)} file; "
                            "data.prompt: text also takes .txt and .bin")
        check_file(path)
        table = _read_fast(path, needed, room)
        tables.append(_read_exactly(path, columns, optional, room) if table is None else table)
    return concatenate_datasets(tables)


def read_text(path: Path, column: str) -> Dataset:
    """A UTF-8 file as a table of one row. Raises DataError naming the file, and the line that is no UTF-8."""
    import datasets

    check_file(path)
    size_bytes = path.stat().st_size
    if size_bytes > _LARGEST_TEXT_BYTES:
        raise DataError(f"{path}: is one document of {size_bytes} bytes; make it rows of a .jsonl file, or a binidx corpus")
    text = _decode(path, path.read_bytes().removeprefix(_BYTE_ORDER_MARK), 1)
    return datasets.Dataset.from_dict({column: [text]}, features=datasets.Features({column: datasets.Value("string")}))


def check_file(path: Path) -> None:
    """Raises DataError unless it is a file that can be read and is not empty."""
    if path.is_dir():
        raise DataError(f"{path}: is a directory, name the files in it")
    if not path.exists():
        raise DataError(f"{path}: there is no such file, looked in {path.absolute().parent}")
    if not path.is_file():
        raise DataError(f"{path}: is no regular file; copy it to one, it is read more than once")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    if empty:
        raise DataError(f"{path}: is empty, give a file with at least one row")


def _read_fast(path: Path, needed: Mapping[str, bool], limit: int | None) -> Dataset | None:
    """The table by way of `datasets`, or None where it fails or guesses: then the exact reading decides.

    needed: column -> whether null is allowed.
    """
    import datasets

    if any(character in str(path.absolute()) for character in _GLOB_CHARACTERS):
        return None  # `datasets` takes the name for a pattern and might read other files
    try:
        with _silence():
            table = datasets.load_dataset("json", data_files=[str(path.absolute())], split="train")
    except Exception:  # it raises whatever its parsers raise, StopIteration among them
        return None
    if any(table.features.get(column) != datasets.Value("string") for column in needed):
        return None
    table = table.select_columns(list(needed))
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    return table if len(table) and all(_is_sound(table, column, may_be_null) for column, may_be_null in needed.items()) else None


def _is_sound(table: Dataset, column: str, may_be_null: bool) -> bool:
    import pyarrow

    values = table.data.column(column)
    try:
        values.validate(full=True)  # the JSON parser lets bytes through that are no UTF-8
    except pyarrow.ArrowInvalid:
        return False
    return may_be_null or not values.null_count


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: what is wrong is said once, by a DataError."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _read_exactly(path: Path, columns: Mapping[str, str], optional: Sequence[str], limit: int | None) -> Dataset:
    """The table by way of the json module, every needed value checked. Raises DataError at the first fault."""
    import datasets

    texts: dict[str, list[str]] = {column: [] for column in columns.values()}
    count = 0
    for place, row in _objects(path):
        if count == limit:
            break
        count += 1
        for column, text in _texts(place, row, columns, optional).items():
            texts[column].append(text)
    if not count:
        raise DataError(f"{path}: holds no row, give a file with at least one")
    return datasets.Dataset.from_dict(texts, features=datasets.Features(dict.fromkeys(texts, datasets.Value("string"))))


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) for each row; the place is `file:line`, or `file: item n` in a list."""
    data = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    if data.lstrip().startswith(b"["):
        places = ((f"{path}: item {number}", item) for number, item in enumerate(_items(path, data), start=1))
    else:
        places = _lines(path, data)
    for place, row in places:
        if not isinstance(row, dict):
            raise DataError(f"{place}: {_shown(row)} is no object; each row is one, like {{\"query\": ..., \"response\": ...}}")
        yield place, row


def _lines(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _parse(place, _decode(path, line, number), "write one JSON object per line")


def _items(path: Path, data: bytes) -> list:
    return _parse(str(path), _decode(path, data, 1), "the file is to be one list of objects, or one object per line")


def _decode(path: Path, data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8, save the file as UTF-8") from None


def _parse(place: str, text: str, advice: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        near = text[max(0, error.pos - 20):error.pos + 20]
        raise DataError(f"{place}: is not JSON: {error.msg} at {where}, near {near!r}; {advice}") from None
    except (_RepeatedField, RecursionError, ValueError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{place}: {reason}") from None


class _RepeatedField(ValueError):
    """A JSON object names one field twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedField(f"the field {repeated!r} stands twice in one object, keep one of them")
    return row


def _texts(place: str, row: dict, columns: Mapping[str, str], optional: Sequence[str]) -> dict[str, str]:
    """column -> text of one row."""
    texts = {}
    for field, column in columns.items():
        if field in optional and row.get(column) is None:
            texts[column] = ""
        elif column not in row:
            raise DataError(_missing(place, row, field, column))
        else:
            texts[column] = _text(place, column, row[column])
    return texts


def _missing(place: str, row: dict, field: str, column: str) -> str:
    names = ", ".join(map(_shown, list(row)[:_SHOWN_FIELDS])) + (", ..." if len(row) > _SHOWN_FIELDS else "")
    lowered = {name.lower(): name for name in row}
    near = difflib.get_close_matches(column.lower(), lowered, n=1)
    advice = f"did you mean {lowered[near[0]]!r}? " if near else ""
    return (f"{place}: there is no field {column!r}, the row has {names or 'none'}\n"
            f"{advice}Say which one holds the prompt's {field!r} with data.fields: {{{field}: <name in the file>}}")


def _text(place: str, column: str, value: Any) -> str:
    if value is None:
        raise DataError(f"{place}: the field {column!r} is null, give it a text or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{place}: the field {column!r} is {_shown(value)}, a {_kind(value)}; make it a text in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = value[error.start].encode("unicode_escape").decode()
        raise DataError(f"{place}: the field {column!r} holds {broken}, half a surrogate pair; mend or remove the row") from None
    return value


def _kind(value: Any) -> str:
    return {bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}[type(value)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
