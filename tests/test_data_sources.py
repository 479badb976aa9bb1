"""Good files: what is read is exactly what stands in them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_hub

from bone_ds import data_paths
from bone_ds.config import DataConfig
from bone_ds.data import fields
from bone_ds.data.rows import read as read_file
from bone_ds.data.rows import read_text
from bone_ds.data.sources import HubSplit, fingerprint, hub_rows, locate
from bone_ds.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]
COMMIT, OLD_COMMIT = "0123456789abcdef" * 2 + "01234567", "f" * 40
COLUMNS = {"query": "query", "response": "response"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(*paths, columns=COLUMNS, optional=()):
    rows = (fields.texts(place, row, columns, optional) for path in paths for place, row in read_file(path, list(columns.values())))
    return [(row["query"], row["response"]) for row in rows]


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
    path.write_text(lines({"query": "a", "response": "1"}, {"query": "b", "response": None}, {"query": "c"}))
    assert read(path, optional=("response",)) == [("a", "1"), ("b", ""), ("c", "")]


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*OBJECTS) + "{broken")
    assert [place for place, _ in itertools.islice(read_file(path, ["query"]), 2)] == [f"{path}:1", f"{path}:2"]


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
    assert read_text(path) == text


CSV = {
    "plain": b"query,level,response\none,3,1\n\"zw\xc3\xb6lf, \xe6\xbc\xa2\xe5\xad\x97\",3,12\n",
    "byte order mark": b"\xef\xbb\xbfquery,level,response\none,3,1\n\"zw\xc3\xb6lf, \xe6\xbc\xa2\xe5\xad\x97\",3,12\n",
    "windows line ends": b"query,level,response\r\none,3,1\r\n\"zw\xc3\xb6lf, \xe6\xbc\xa2\xe5\xad\x97\",3,12\r\n",
    "blank lines": b"query,level,response\n\none,3,1\n\n\"zw\xc3\xb6lf, \xe6\xbc\xa2\xe5\xad\x97\",3,12",
}


@pytest.mark.parametrize("case", CSV)
def test_csv(tmp_path, case):
    (tmp_path / "a.csv").write_bytes(CSV[case])
    assert read(tmp_path / "a.csv") == [("one", "1"), ("zwölf, 漢字", "12")]


def test_csv_is_text_and_nothing_is_guessed(tmp_path):
    (tmp_path / "a.csv").write_text('query,response\n007,NA\n2020-01-01,\n"a\nb, ""c""",null\n' + "x" * 200_000 + ",1\n")
    assert read(tmp_path / "a.csv") == [("007", "NA"), ("2020-01-01", ""), ('a\nb, "c"', "null"), ("x" * 200_000, "1")]


def write_table(path, rows, layout=None):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    else:
        new = pyarrow.ipc.new_file if layout == "file" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(("name", "layout"), [("a.parquet", None), ("a.arrow", "file"), ("a.arrow", "stream")])
def test_tables(tmp_path, name, layout):
    rows = [{"query": f"q{number}", "level": number, "response": str(number)} for number in range(3000)]
    path = write_table(tmp_path / name, rows, layout)
    assert read(path) == [(row["query"], row["response"]) for row in rows]
    assert next(iter(read_file(path, ["query"]))) == (f"{path}: row 1", {"query": "q0"})


def shards(directory, split, *parts, folder="data"):
    return [write_table(directory / folder / f"{split}-{number:05d}-of-{len(parts):05d}.parquet", part)
            for number, part in enumerate(parts)]


def rows_of(*names):
    return [{"query": name, "response": "1"} for name in names]


def located(path, **options):
    return locate(DataConfig(train=(str(path),), **options), "train")[0]


def test_a_directory_as_the_hub_lays_it_out(tmp_path):
    directory = tmp_path / "set"
    train = shards(directory, "train", rows_of("a", "b"), rows_of("c"), rows_of("d"))
    held_out = shards(directory, "test", rows_of("e"))
    assert list(located(directory).files) == train
    assert read(*located(directory).files) == [(name, "1") for name in "abcd"]
    assert list(locate(DataConfig(train=("x",), eval=(str(directory),)), "eval")[0].files) == held_out
    with pytest.raises(DataError, match="has no split 'validation', it has train, test\nName one with data.train_split"):
        located(directory, train_split="validation")


def test_a_directory_with_subsets(tmp_path):
    directory = tmp_path / "set"
    for subset in ("main", "socratic"):
        shards(directory, "train", rows_of(subset), folder=subset)
    (directory / "README.md").write_text("""---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: main/train-*}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train-*}]
---
""")
    assert read(*located(directory).files) == [("main", "1")]
    assert read(*located(directory, subset="socratic").files) == [("socratic", "1")]
    with pytest.raises(DataError, match="is a directory in which `datasets` finds no data set"):
        located(directory, subset="other")


def test_what_save_to_disk_writes(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(rows_of("a", "b", "c"))
    table.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert read(*located(tmp_path / "one").files) == read(*located(tmp_path / "splits").files) == [(name, "1") for name in "abc"]
    assert read(*located(tmp_path / "splits", train_split="test").files) == [("a", "1")]
    with pytest.raises(DataError, match="has no split 'dev', it has train, test"):
        located(tmp_path / "splits", train_split="dev")


@pytest.mark.parametrize(("name", "content", "named"), [
    ("one/state.json", '{"_data_files": [1]}', "state.json: is not what save_to_disk"),
    ("one/state.json", '{"_data_files": null}', "state.json: is not what save_to_disk"),
    ("splits/dataset_dict.json", '{"splits": null}', "dataset_dict.json: is not what save_to_disk"),
    ("one/state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow: there is no such file"),
])
def test_what_save_to_disk_did_not_write(tmp_path, name, content, named):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=named):
        located((tmp_path / name).parent)


def test_a_directory_of_several_data_sets_names_them(tmp_path):
    directory = tmp_path / "set"
    directory.mkdir()
    for subset in ("one", "two"):
        (directory / f"{subset}.jsonl").write_text('{"query": "q", "response": "a"}\n')
    (directory / "README.md").write_text("---\nconfigs:\n- {config_name: one, data_files: one.jsonl}\n"
                                         "- {config_name: two, data_files: two.jsonl}\n---\n")
    with pytest.raises(DataError, match="one.*two.*\nName one with data.subset"):
        located(directory)


def test_a_long_list_starts_with_its_first_character(tmp_path, monkeypatch):
    monkeypatch.setattr("bone_ds.data.rows._START_BYTES", 4)
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf \n       [" + json.dumps({"query": "q", "response": "a"}).encode() + b"]")
    assert [row["query"] for _, row in read_file(path, ("query", "response"))] == ["q"]


@pytest.mark.parametrize(("data", "named"), [
    ({"mixture": [{"path": "FILE", "revision": "main"}]}, "data.mixture.0.revision: 'main' is for a hub id"),
    ({"mixture": ["FILE", {"path": "FILE", "subset": "one"}]}, "data.mixture.1.subset: 'one' is for a directory or a hub id"),
    ({"mixture": [{"path": "FILE", "split": "test"}]}, "data.mixture.0.split: 'test' is for a directory or a hub id"),
    ({"train": "FILE", "train_split": "validation"}, "data.train_split: 'validation' is for a directory or a hub id"),
])
def test_fields_that_mean_nothing_to_a_file(tmp_path, data, named):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    tree = json.loads(json.dumps(data).replace("FILE", str(path)))
    with pytest.raises(ConfigError, match=named):
        data_paths.check(DataConfig.model_validate(tree))


def test_an_empty_directory_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="set: is a directory in which `datasets` finds no data set: .*\nLay it out as on the hub"):
        located(tmp_path / "set")


@pytest.fixture(scope="module")
def from_the_hub(tmp_path_factory):
    """What a process finds whose hub is the stand-in: a data set of two commits, and one that isn't there."""
    root = tmp_path_factory.mktemp("hub")
    for commit, name in ((COMMIT, "new"), (OLD_COMMIT, "old")):
        shards(root / "owner/name" / commit, "train", rows_of(f"{name} a", f"{name} b"), rows_of(f"{name} c"))
    program = root / "program.py"
    program.write_text(f"""
import json, sys
from bone_ds.config import DataConfig
from bone_ds.data.sources import hub_rows, locate
from bone_ds.errors import ConfigError, DataError

def found(name, limit=None, **options):
    try:
        hub = locate(DataConfig(train=(name,), **options), "train")[0].hub
        return [hub.commit, [[place, row["query"]] for place, row in hub_rows(hub, limit)]]
    except DataError as error:
        return str(error)

print(json.dumps({{
    "newest": found("owner/name"), "branch": found("owner/name", revision="v1"), "commit": found("owner/name", revision="{OLD_COMMIT}"),
    "streamed": found("owner/name", 2, revision="{COMMIT}"), "absent": found("owner/other"),
    "no such branch": found("owner/name", revision="v9"), "no such split": found("owner/name", train_split="dev")}}))
""")
    with stand_in_hub.serving(root, {"main": COMMIT, "v1": OLD_COMMIT}) as endpoint:
        environment = os.environ | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1") | {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("case", "commit", "names"), [
    ("newest", COMMIT, ["new a", "new b", "new c"]), ("branch", OLD_COMMIT, ["old a", "old b", "old c"]),
    ("commit", OLD_COMMIT, ["old a", "old b", "old c"]), ("streamed", COMMIT, ["new a", "new b"])])
def test_rows_of_the_hub(from_the_hub, case, commit, names):
    assert from_the_hub[case] == [commit, [[f"owner/name (train): row {number}", name] for number, name in enumerate(names, 1)]]


@pytest.mark.parametrize(("case", "says"), [
    ("absent", "owner/other: no such file or directory here, and the hub doesn't give it: "),
    ("no such branch", "owner/name: no such file or directory here, and the hub doesn't give it at revision 'v9': "),
    ("no such split", "owner/name: `datasets` can't read split 'dev' at 0123456789ab: ")])
def test_what_the_hub_does_not_have(from_the_hub, case, says):
    message = from_the_hub[case]
    assert message.startswith(says) and "\n" not in message and len(message) > len(says)


class Builder:
    """`datasets`' own, of which only what is asked is seen."""

    def __init__(self, commit):
        self.hash, self.calls = commit, []

    def download_and_prepare(self):
        self.calls.append("fetched whole")

    def as_dataset(self, split):
        self.calls.append(split)
        return rows_of("a", "b", "c")

    def as_streaming_dataset(self, split):
        self.calls.append(f"{split} streamed")
        return rows_of("a", "b", "c")


@pytest.mark.parametrize(("limit", "calls"), [(None, ["fetched whole", "train"]), (2, ["train streamed"])])
def test_only_what_is_wanted_is_fetched(monkeypatch, limit, calls):
    builder = Builder(COMMIT)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *names, revision: builder)
    assert len(list(hub_rows(HubSplit("owner/name", None, "train", COMMIT), limit))) == (limit or 3)
    assert builder.calls == calls


def test_another_commit_than_the_one_asked_for_is_not_taken(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *names, revision: Builder(OLD_COMMIT))
    with pytest.raises(DataError, match="it can't be reached, and `datasets` has commit ffffffffffff of it alone"):
        list(hub_rows(HubSplit("owner/name", None, "train", COMMIT), None))


def test_the_fingerprint_is_of_the_content(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl", "a.csv")]
    for path, text in zip(paths, ("one", "one", "two", "one"), strict=True):
        path.write_text(text)
    one, same, other, csv = (fingerprint(located(path)) for path in paths)
    assert one == same and len({one, other, csv}) == 3


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("local files need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    shards(tmp_path / "set", "train", rows_of("a"))
    assert read(*located(tmp_path / "set").files) == [("a", "1")]
