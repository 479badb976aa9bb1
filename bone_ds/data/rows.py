"""Files to rows as they stand in them: .jsonl, .json, .csv, .parquet and .arrow, each row with its place for messages.

Nothing is guessed: a value has the type that the file gives it, and what a .csv holds is text. Rows come one at a time: a file
is never held whole, but for a .json that is one list.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bone_ds.data.fields import shown
from bone_ds.data_paths import JSON_SUFFIXES, ROW_SUFFIXES
from bone_ds.errors import DataError

LARGEST_TEXT_BYTES = 2**31 - 1
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARROW_FILE_MAGIC = b"ARROW1"
_ROWS_AT_ONCE = 1024
_START_BYTES = 2**16

Row = tuple[str, dict[str, Any]]
"""The row's place, such as `file:line`, and its values by column."""


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


def read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file. columns: those that matter; of a columnar file only they are read, if all are there.

    Raises DataError naming the file and the row for what can't be read, and at the end for a file without rows.
    """
    check_file(path)
    if path.suffix in JSON_SUFFIXES:
        rows = _objects(path)
    elif path.suffix == ".csv":
        rows = _records(path)
    elif path.suffix == ".parquet":
        rows = _numbered(path, _parquet_batches(path, columns))
    elif path.suffix == ".arrow":
        rows = _numbered(path, _arrow_batches(path, columns))
    else:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not supported, give a {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]} "
                        "file; data.prompt: text also takes .txt and .bin")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no row, give a file with at least one")


def read_text(path: Path) -> str:
    """A UTF-8 file as one text. Raises DataError naming the file, and the line that is no UTF-8."""
    check_file(path)
    size_bytes = path.stat().st_size
    if size_bytes > LARGEST_TEXT_BYTES:
        raise DataError(f"{path}: is one document of {size_bytes} bytes; make it rows of a .jsonl file, or a binidx corpus")
    return _whole(path)


def _whole(path: Path) -> str:
    return _decode(path, path.read_bytes().removeprefix(_BYTE_ORDER_MARK), 1)


def _objects(path: Path) -> Iterator[Row]:
    """The place is `file:line`, or `file: item n` in a list."""
    if _is_list(path):
        items = _parse(str(path), _whole(path), "the file is to be one list of objects, or one object per line")
        places = ((f"{path}: item {number}", item) for number, item in enumerate(items, start=1))
    else:
        places = ((f"{path}:{number}", _parse(f"{path}:{number}", line, "write one JSON object per line"))
                  for number, line in enumerate(_lines(path), start=1) if line.strip())
    for place, row in places:
        if not isinstance(row, dict):
            raise DataError(f"{place}: {shown(row)} is no object; each row is one, like {{\"query\": ..., \"response\": ...}}")
        yield place, row


def _is_list(path: Path) -> bool:
    """Whether a JSON file's first character opens a list."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
        while not start and (part := file.read(_START_BYTES)):
            start = part.lstrip()
    return start.startswith(b"[")


def _lines(path: Path) -> Iterator[str]:
    """With their ends; the byte order mark is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_TEXT_BYTES + 1), b""), start=1):
            if len(line) > LARGEST_TEXT_BYTES:
                raise DataError(f"{path}:{number}: the line has more than {LARGEST_TEXT_BYTES} bytes; a row stands on a line of its own")
            yield _decode(path, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, number)


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


def _records(path: Path) -> Iterator[Row]:
    """Of a .csv with a header; the place is the line that the record starts at. Quoted texts may hold commas and line ends."""
    csv.field_size_limit(LARGEST_TEXT_BYTES)  # of the whole process; csv's own is 128 KiB
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{place}: is not CSV: {error}; quote texts that hold commas, quotes or line ends") from None
        if record is None:
            return
        if not record:
            continue  # a blank line
        if header is None:
            header = record
            _check_header(place, header)
        elif len(record) != len(header):
            raise DataError(f"{place}: holds {len(record)} values, the header has {len(header)} names; quote texts that hold commas, "
                            "quotes or line ends")
        else:
            yield place, dict(zip(header, record, strict=True))


def _check_header(place: str, header: Sequence[str]) -> None:
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{place}: the header names {repeated!r} twice, keep one of them")


def _numbered(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    """The rows of record batches; the place is `file: row n`."""
    number = 0
    with closing(_readable(path, batches)) as readable:
        for row in readable:
            number += 1
            yield f"{path}: row {number}", row


def _readable(path: Path, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in batches:
            batch.validate(full=True)  # a text may be no UTF-8
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    # ArithmeticError, LookupError, ValueError: a date that Python has no day for, a column that is there twice.
    except (pyarrow.ArrowException, OSError, ArithmeticError, LookupError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise DataError(f"{path}: is no whole {path.suffix} file: {reason}; write it anew") from None


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=_chosen(path, file.schema_arrow.names, columns))


def _arrow_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Both of Arrow's layouts: the file, and the stream, which `datasets` writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        chosen = _chosen(path, reader.schema.names, columns)
        for batch in batches:
            yield batch if chosen is None else batch.select(chosen)


def _chosen(path: Path, names: Sequence[str], columns: Sequence[str]) -> list[str] | None:
    """The columns to read; None is all, so that a message about a missing one can name those that are there."""
    _check_header(str(path), names)
    return list(dict.fromkeys(columns)) if set(columns) <= set(names) else None
