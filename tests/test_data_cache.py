"""Tokenised data on disk: found again by its content, made once by ranks that start together, never half."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
from test_data_samples import word_tokenizer

from bone_ds.config import DataConfig
from bone_ds.data import cache, load_samples, loading, tokenization
from rwkv_adapters.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)


def write_rows(path, count=40):
    rows = [{"query": f"w{number % 50} w1", "response": "w2 " * (1 + number % 5)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def load(rows, directory, tokenizer=None, split="train", **options):
    return load_samples(DataConfig(train=(str(rows),), **options), tokenizer or word_tokenizer(adds_bos=True), split, directory)


def was_cached(samples):
    (part,) = samples.parts
    return part.was_cached


def test_the_second_time_it_is_read(rows, tmp_path):
    first, second, without = load(rows, tmp_path), load(rows, tmp_path), load(rows, None)
    assert [was_cached(samples) for samples in (first, second, without)] == [False, True, False]
    assert isinstance(second.tokens, np.memmap) and first.fingerprint() == second.fingerprint() == without.fingerprint()
    assert second.report == first.report and second.eos_token_id == first.eos_token_id
    assert second.parts[0].cached == first.parts[0].cached and without.parts[0].cached is None
    assert sorted(path.name for path in first.parts[0].cached.iterdir()) == [
        "learnt.npy", "manifest.json", "offsets.npy", "rows.npy", "tokens.npy"]


CHANGES = {
    "max_length": dict(max_length=256), "overlong": dict(overlong="drop"), "limit": dict(train_samples=30),
    "prompt": dict(prompt="user_assistant"), "fields": dict(fields={"query": "response"}), "code": dict(drop_after_code=True),
    "tokenizer": dict(tokenizer=word_tokenizer(adds_bos=False)), "other tokenizer": dict(tokenizer=ByteTokenizer()),
    "encoding": dict(tokenizer=ByteTokenizer("utf-16-le")),
}


def test_whatever_changes_the_samples_has_a_place_of_its_own(rows, tmp_path):
    places = {load(rows, tmp_path).parts[0].cached}
    for change in CHANGES.values():
        samples = load(rows, tmp_path, **change)
        assert not was_cached(samples)
        places.add(samples.parts[0].cached)
    assert len(places) == 1 + len(CHANGES)


def test_the_content_counts_and_not_the_name(rows, tmp_path):
    load(rows, tmp_path)
    rows.rename(tmp_path / "moved.jsonl")
    assert was_cached(load(tmp_path / "moved.jsonl", tmp_path))
    text = (tmp_path / "moved.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text.replace("w2", "w3", 1))
    assert not was_cached(load(tmp_path / "moved.jsonl", tmp_path))


def test_what_is_not_kept(rows, tmp_path, monkeypatch):
    assert load(rows, tmp_path, cache=False).parts[0].cached is None
    monkeypatch.setattr(cache, "SMALLEST_BYTES", rows.stat().st_size + 1)
    assert load(rows, tmp_path).parts[0].cached is None
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "learnt.npy", "rows.npy", "manifest.json"])
def test_a_flipped_bit_is_noticed(rows, tmp_path, name):
    whole = load(rows, tmp_path)
    path = whole.parts[0].cached / name
    for place in (5, path.stat().st_size // 2, path.stat().st_size - 3):
        content = bytearray(path.read_bytes())
        content[place] ^= 2
        path.write_bytes(content)
        again = load(rows, tmp_path)
        assert not was_cached(again) and again.fingerprint() == whole.fingerprint() and again.report == whole.report


@pytest.mark.parametrize("damage", ["cut", "no manifest", "no array", "half a manifest", "empty"])
def test_damaged_data_is_made_anew(rows, tmp_path, damage):
    place = load(rows, tmp_path).parts[0].cached
    if damage == "cut":
        (place / "tokens.npy").write_bytes((place / "tokens.npy").read_bytes()[:-20])
    elif damage == "empty":
        (place / "tokens.npy").write_bytes(b"")
    elif damage == "half a manifest":
        (place / "manifest.json").write_text((place / "manifest.json").read_text()[:50])
    else:
        (place / {"no manifest": "manifest.json", "no array": "learnt.npy"}[damage]).unlink()
    again = load(rows, tmp_path)
    assert not was_cached(again) and again.fingerprint() == load(rows, None).fingerprint()
    assert was_cached(load(rows, tmp_path))


def test_a_place_that_can_not_be_written_is_done_without(rows, tmp_path):
    (tmp_path / "tokens").write_text("a file")
    samples = load(rows, tmp_path)
    assert samples.parts[0].cached is None and len(samples) == 40


def test_a_full_disk_is_said_and_nothing_is_tokenised_twice(rows, tmp_path, monkeypatch, caplog):
    read, reads = loading.read, []
    monkeypatch.setattr(loading, "read", lambda *options: reads.append(options) or read(*options))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    samples = load(rows, tmp_path)
    assert len(samples) == 40 and len(reads) == 1 and samples.parts[0].cached is None
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]
    (line,) = caplog.messages
    assert "can't be kept: No space left on device" in line


def test_bad_data_leaves_nothing_behind(tmp_path):
    from bone_ds.errors import DataError

    rows = write_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text() + '{"query": "w1"}\n')
    with pytest.raises(DataError, match="rows.jsonl:41"):
        load(rows, tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


BUILDER = """
import sys, time
from bone_ds.config import DataConfig
from bone_ds.data import cache, load_samples, loading
from rwkv_adapters.tokenizer import ByteTokenizer

cache.SMALLEST_BYTES = 0
write = cache._write
def slowly(place, samples):
    place.with_name(place.name + ".partial").mkdir()
    print("building", flush=True)
    time.sleep(60)
    write(place, samples)
cache._write = slowly
load_samples(DataConfig(train=(sys.argv[1],)), ByteTokenizer(), "train", sys.argv[2])
"""


def test_a_builder_that_is_killed_hangs_nobody(rows, tmp_path):
    """It dies within the lock, with its data half written; the next one gets the lock, builds, and no half is ever read."""
    with subprocess.Popen([sys.executable, "-c", BUILDER, rows, tmp_path], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as builder:
        assert builder.stdout.readline() == "building\n"
        builder.send_signal(signal.SIGKILL)
    (left,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    assert left.suffix == ".partial"
    started = time.monotonic()
    samples = load(rows, tmp_path, ByteTokenizer())
    assert time.monotonic() - started < 10 and not was_cached(samples) and not left.exists()
    assert was_cached(load(rows, tmp_path, ByteTokenizer()))


def test_of_two_ranks_one_builds(tmp_path):
    """They start together; on the second start both read."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": "ab" * 200, "a": f"c{number}"}) + "\n" for number in range(3000)))  # more than 1 MiB
    tree = tiny.config_tree(tiny.write_model(tmp_path / "model"), path, tmp_path / "run", data={"max_length": 512}, model={})
    case = {"run": "seen", "config": tree, "cache_dir": str(tmp_path / "cache")}
    outcomes = []
    for start in ("first", "second"):
        (tmp_path / start).mkdir()
        outcomes.append(ranks.run({"seen": dict(case)}, 2, tmp_path / start)["seen"])
    first, second = outcomes
    assert sorted(first["cached"]) == [[False], [True]] and second["cached"] == [[True], [True]]
    assert first["fingerprint"] == second["fingerprint"] and first["units"] == second["units"]
    shutil.rmtree(tmp_path / "cache")


def test_processes_tokenise_as_one_does(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", 300)
    whole = load(path, None, ByteTokenizer())
    monkeypatch.setattr(tokenization, "_ROWS_PER_BATCH", 7)
    monkeypatch.setattr(tokenization, "_BATCHES_ALONE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    started = []
    pool = tokenization.ProcessPoolExecutor
    monkeypatch.setattr(tokenization, "ProcessPoolExecutor", lambda *options: started.append(options) or pool(*options))
    parallel = load(path, None, ByteTokenizer())
    assert len(started) == 1 and parallel.fingerprint() == whole.fingerprint() and parallel.report == whole.report


def test_an_error_in_a_process_names_the_row(tmp_path, monkeypatch):
    from bone_ds.errors import DataError

    path = tmp_path / "chats.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[good] * 9, bad]))
    monkeypatch.setattr(tokenization, "_CHATS_PER_BATCH", 2)
    monkeypatch.setattr(tokenization, "_BATCHES_ALONE", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(DataError, match="chats.jsonl:10: turn 1: the role 'tool'"):
        load(path, None, ByteTokenizer(), prompt="chat")
