"""Each way a data file can be wrong ends in one short message that says where and what."""

import json
import os

import pytest

from bone_ds.config import DataConfig
from bone_ds.data import build_prompt
from bone_ds.data.rows import read, read_text
from bone_ds.errors import DataError

GOOD = '{"query": "one", "response": "1"}\n'


def row(**fields):
    return json.dumps(fields) + "\n"


# name of the file, its bytes, what the message names
BAD = {
    "empty": ("a.jsonl", b"", ["a.jsonl", "empty"]),
    "blank": ("a.jsonl", b"\n \n", ["a.jsonl", "no row"]),
    "empty list": ("a.json", b"[]", ["a.json", "no row"]),
    "not JSON": ("a.jsonl", GOOD + "query: two\n", ["a.jsonl:2", "not JSON", "query: two"]),
    "cut short": ("a.jsonl", GOOD + '{"query": "two", "respo', ["a.jsonl:2", "not JSON"]),
    "single quotes": ("a.jsonl", "{'query': 'two'}\n", ["a.jsonl:1", "not JSON", "column 2"]),
    "two objects in a line": ("a.jsonl", GOOD + GOOD.strip() + " " + '{"query": 3}', ["a.jsonl:2", "Extra data"]),
    "a number": ("a.jsonl", GOOD + "3\n", ["a.jsonl:2", "3 is no object"]),
    "a text": ("a.jsonl", '"one"\n"two"\n', ["a.jsonl:1", '"one" is no object']),
    "a list in a line": ("a.jsonl", GOOD + '["two", "2"]\n', ["a.jsonl:2", "is no object"]),
    "a list of texts": ("a.json", '["one", "two"]', ["a.json: item 1", "is no object"]),
    "a list with a hole": ("a.json", f"[{GOOD}, null]", ["a.json: item 2", "null is no object"]),
    "a broken list": ("a.json", f"[{GOOD}\n {GOOD}]", ["a.json", "line 3"]),
    "a list in an object": ("a.json", '{"data": [{"query": "one"}]}', ["a.json:1", "'query'", '"data"']),
    "an object over lines": ("a.json", '{\n "query": "one",\n "response": "1"\n}\n,\n{}', ["a.json:1", "not JSON"]),
    "nested too deeply": ("a.jsonl", GOOD + "[" * 100_000 + "\n", ["a.jsonl:2"]),
    "other column": ("a.jsonl", row(qeury="one", response="1"), ["a.jsonl:1", "'query'", "'qeury'", "data.fields"]),
    "column in capitals": ("a.jsonl", row(Query="one", response="1"), ["a.jsonl:1", "did you mean 'Query'"]),
    "no column": ("a.jsonl", "{}\n", ["a.jsonl:1", "none"]),
    "missing in one row": ("a.jsonl", GOOD + row(query="two") + GOOD, ["a.jsonl:2", "'response'"]),
    "null": ("a.jsonl", GOOD + "\n" + row(query="two", response=None), ["a.jsonl:3", "'response'", "null"]),
    "all null": ("a.jsonl", row(query=None, response="1") * 3, ["a.jsonl:1", "'query'", "null"]),
    "a number in a field": ("a.jsonl", GOOD + row(query="two", response=2), ["a.jsonl:2", "'response'", "2", "number"]),
    "only numbers in a field": ("a.jsonl", row(query="two", response=2.5) * 2, ["a.jsonl:1", "'response'", "2.5"]),
    "a truth value": ("a.jsonl", row(query="two", response=True), ["a.jsonl:1", "'response'", "true"]),
    "a list in a field": ("a.jsonl", GOOD + row(query=["two"], response="2"), ["a.jsonl:2", "'query'", '["two"]', "list"]),
    "an object in a field": ("a.jsonl", row(query={"text": "x" * 500}, response="2"), ["a.jsonl:1", "'query'", '{"text"', "..."]),
    "a number in a list": ("a.json", f"[{GOOD}, {row(query='x', response=7)}]", ["a.json: item 2", "'response'", "7"]),
    "a field twice": ("a.jsonl", GOOD + '{"query": "a", "query": "b", "response": "1"}', ["a.jsonl:2", "'query'", "twice"]),
    "half a surrogate pair": ("a.jsonl", GOOD + '{"query": "a\\ud800", "response": "1"}', ["a.jsonl:2", "'query'", "\\ud800"]),
    "Latin-1": ("a.jsonl", GOOD.encode() + '{"query": "ö", "response": "1"}'.encode("latin-1"), ["a.jsonl:2", "0xf6", "UTF-8"]),
    "Latin-1 in a list": ("a.json", '[\n\n{"query": "ö"}]'.encode("latin-1"), ["a.json:3", "0xf6", "UTF-8"]),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), ["a.jsonl:1", "0xff", "UTF-8"]),
    "a text file": ("a.txt", b"one", ["a.txt", "'.txt'", "data.prompt: text"]),
    "suffix": ("a.xml", b"query,response\n", ["a.xml", "'.xml'", ".jsonl", ".arrow"]),
    "a header alone": ("a.csv", "query,response\n", ["a.csv", "no row"]),
    "a comma that is not quoted": ("a.csv", "query,response\none,1\ntwo,2,3\n", ["a.csv:3", "3 values", "2 names"]),
    "a value that is missing": ("a.csv", 'query,response\n"one\nor",1\n\ntwo\n', ["a.csv:5", "1 values", "2 names"]),
    "a quote that is never closed": ("a.csv", 'query,response\none,1\n"two,2\n', ["a.csv:3", "not CSV"]),
    "a column twice": ("a.csv", "query,response,query\none,1,2\n", ["a.csv:1", "'query'", "twice"]),
    "other columns": ("a.csv", "question,response\none,1\n", ["a.csv:2", "'query'", '"question"', "data.fields"]),
    "semicolons": ("a.csv", "query;response\none;1\n", ["a.csv:2", "'query'", '"query;response"']),
    "Latin-1 in CSV": ("a.csv", "query,response\none,1\nö,2\n".encode("latin-1"), ["a.csv:3", "0xf6", "UTF-8"]),
    "no parquet": ("a.parquet", b"PAR1 and nothing else", ["a.parquet", "no whole .parquet file"]),
    "no arrow": ("a.arrow", b"ARROW1 and nothing else", ["a.arrow", "no whole .arrow file"]),
    "no arrow stream": ("a.arrow", b"nothing at all", ["a.arrow", "no whole .arrow file"]),
    "no suffix": ("train", GOOD.encode(), ["train", "''", ".jsonl"]),
}


def refusal(*paths, **options):
    prompt = build_prompt(DataConfig(train=tuple(map(str, paths)), **options))
    with pytest.raises(DataError) as caught:
        for path in paths:
            for place, values in read(path, prompt.read_columns):
                prompt.values(place, values)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert max(map(len, message.replace(str(paths[-1].parent), "").splitlines())) < 300
    return message


@pytest.mark.parametrize("case", BAD)
def test_the_message_names_the_file_the_row_and_the_fault(tmp_path, case):
    name, content, named = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    assert str(path) in message
    assert [part for part in named if part not in message] == []


def write_table(path, **columns):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(("column", "named"), [
    (["1", None, "3"], "row 2: the field 'response' is null"), ([1, 2, 3], "row 1: the field 'response' is 1, a number"),
    ([["1"], ["2"], ["3"]], "row 1: the field 'response' is [\"1\"], a list"), ([b"1", b"2", b"3"], "row 1: the field 'response' is")])
def test_a_wrong_value_in_a_table(tmp_path, suffix, column, named):
    path = write_table(tmp_path / f"a{suffix}", query=["one", "two", "three"], response=column)
    assert f"{path}: {named}" in refusal(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_without_the_column_names_those_it_has(tmp_path, suffix):
    path = write_table(tmp_path / f"a{suffix}", question=["one"], response=["1"], level=[3])
    assert all(part in refusal(path) for part in ("row 1", "'query'", '"question", "response", "level"', "data.fields"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_cut_short(tmp_path, suffix):
    path = write_table(tmp_path / f"a{suffix}", query=["one"] * 5000, response=["1"] * 5000)
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])
    assert "no whole" in refusal(path)


def test_a_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "a.jsonl")


def test_a_directory(tmp_path):
    (tmp_path / "data.jsonl").mkdir()
    assert "is a directory" in refusal(tmp_path / "data.jsonl")


@pytest.mark.parametrize(("content", "named"), [
    (b"", "is empty"), ("one\nzwölf".encode("latin-1"), "a.txt:2: byte 0xf6 is not UTF-8"), ("one".encode("utf-16"), "a.txt:1: byte 0xff")])
def test_a_bad_text_file(tmp_path, content, named):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_text(path)
    assert str(path) in str(caught.value) and named in str(caught.value)


def test_a_text_file_too_large_for_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    os.truncate(path, 2**31)  # without a byte on the disk
    with pytest.raises(DataError, match=r"one document of 2147483648 bytes; make it rows of a \.jsonl"):
        read_text(path)


def test_the_second_file_is_named(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(GOOD * 5)
    bad.write_text(GOOD + row(query="two", response=3))
    assert f"{bad}:2" in refusal(good, bad)


def test_a_mapped_field_is_named_as_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row(question="one", answer="1"))
    message = refusal(path, fields={"query": "question", "response": "anwser"})
    assert "'anwser'" in message and "did you mean 'answer'" in message and "'response'" in message
