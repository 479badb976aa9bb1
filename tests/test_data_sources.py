"""Good files: what is read is exactly what stands in them."""

import json

import pytest

from bone_ds.data import read_rows
from bone_ds.data.sources import read_text

COLUMNS = {"query": "query", "response": "response"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(*paths, **options):
    table = read_rows([str(path) for path in paths], options.pop("columns", COLUMNS), **options)
    return [(row["query"], row["response"]) for row in table]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = [("one", "1"), ("zwölf 漢字 \u2028 x", "12")]
OBJECTS = [{"query": query, "response": response, "level": 3} for query, response in PAIRS]
FILES = {
    "lines": ("a.jsonl", lines(*OBJECTS).encode()),
    "utf-8 unescaped": ("a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS).encode()),
    "list": ("a.json", json.dumps(OBJECTS, indent=2).encode()),
    "list in one line": ("a.json", json.dumps(OBJECTS).encode()),
    "list after white space": ("a.json", b"\n\n " + json.dumps(OBJECTS).encode()),
    "lines named .json": ("a.json", lines(*OBJECTS).encode()),
    "list named .jsonl": ("a.jsonl", json.dumps(OBJECTS).encode()),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(*OBJECTS).encode()),
    "list with byte order mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode()),
    "windows line ends": ("a.jsonl", lines(*OBJECTS).replace("\n", "\r\n").encode()),
    "blank lines": ("a.jsonl", b"\n" + lines(*OBJECTS).replace("\n", "\n\n").encode()),
    "no last line end": ("a.jsonl", lines(*OBJECTS).rstrip().encode()),
    "pattern in the name": ("a[1]*.jsonl", lines(*OBJECTS).encode()),
    "unused column of mixed types": ("a.jsonl", lines(OBJECTS[0], {**OBJECTS[1], "level": "hard"}).encode()),
    "unused column in some rows": ("a.jsonl", lines(OBJECTS[0], {**OBJECTS[1], "tags": ["x"]}).encode()),
    "fields in another order": ("a.jsonl", lines(OBJECTS[0], dict(reversed(OBJECTS[1].items()))).encode()),
}


@pytest.mark.parametrize("case", FILES)
def test_the_rows_are_what_stands_in_the_file(tmp_path, case):
    name, content = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == PAIRS


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    rows = [("2020-01-01", "1"), ("2021-01-01", "null"), ("2022-01-01T00:00:00Z", "[1]")]
    path = tmp_path / "dates.jsonl"
    path.write_text(lines(*[{"query": query, "response": response} for query, response in rows]))
    assert read(path) == rows


def test_files_with_other_columns_join_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"query": "a", "response": "1", "level": 3}))
    (tmp_path / "b.json").write_text(json.dumps([{"response": "2", "query": "2020-01-01", "level": "hard", "more": {"x": 1}}]))
    (tmp_path / "c.jsonl").write_text(lines({"query": "c", "response": "3"}))
    paths = [tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl", "a.jsonl")]
    assert read(*paths) == [("a", "1"), ("2020-01-01", "2"), ("c", "3"), ("a", "1")]


def test_a_pattern_in_the_name_reads_no_other_file(tmp_path):
    (tmp_path / "a1.jsonl").write_text(lines({"query": "other", "response": "file"}))
    (tmp_path / "a[1].jsonl").write_text(lines({"query": "this", "response": "file"}))
    assert read(tmp_path / "a[1].jsonl") == [("this", "file")]


def test_optional_fields_may_be_missing_or_null(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"query": "a", "response": "1"}, {"query": "b", "response": None}, {"query": "c", "response": "3"}))
    table = read_rows([str(path)], COLUMNS, optional=("response",))
    assert [(row["query"], row["response"] or "") for row in table] == [("a", "1"), ("b", ""), ("c", "3")]
    path.write_text(lines({"query": "a"}, {"query": "b"}))
    assert [row["response"] for row in read_rows([str(path)], COLUMNS, optional=("response",))] == ["", ""]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_the_limit_counts_over_files_and_ignores_what_follows(tmp_path, limit):
    rows = [{"query": str(number), "response": "x"} for number in range(4)]
    (tmp_path / "a.jsonl").write_text(lines(*rows[:2]))
    (tmp_path / "b.jsonl").write_text(lines(*rows[2:]))
    found = read(tmp_path / "a.jsonl", tmp_path / "b.jsonl", limit=limit)
    assert found == [(row["query"], "x") for row in rows[:limit]]


def test_a_bad_row_after_the_limit_is_not_used(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"query": "a", "response": "1"}, {"query": "b", "response": 2}))
    assert read(path, limit=1) == [("a", "1")]


def test_a_rewritten_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for word in ("first", "other"):
        path.write_text(lines({"query": word, "response": "1"}))
        assert read(path) == [(word, "1")]


@pytest.mark.parametrize("text", ["one", "zwölf 漢字\u2028\n\n x\r\ny\n", "[1]", '{"text": 1}'])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_is_one_row_as_it_stands(tmp_path, text, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + text.encode())
    assert read_text(path, "body").to_list() == [{"body": text}]


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*OBJECTS))
    from bone_ds.data import sources

    assert len(sources._read_fast(path, {"query": False, "response": False}, None)) == 2
