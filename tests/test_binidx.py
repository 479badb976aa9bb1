"""Tokenised corpora: documents as they were written, and each way a corpus can be broken."""

import json
import struct

import numpy as np
import pytest

from bone_ds.config import DataConfig
from bone_ds.data import load_samples
from bone_ds.data.binidx import open_documents
from bone_ds.errors import DataError

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}
DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


class Numbers:
    """A tokenizer whose texts are numbers between spaces; RWKV's has no BOS and 0 as EOS too."""

    bos_token_id, eos_token_id, vocab_size = None, 0, 100

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def index_bytes(lengths, first_bytes, bounds, code=8, version=1, magic=b"MMIDIDX\0\0", sequences=None):
    return (magic + struct.pack("<QBQQ", version, code, len(lengths) if sequences is None else sequences, len(bounds))
            + np.array(lengths, "<i4").tobytes() + np.array(first_bytes, "<i8").tobytes() + np.array(bounds, "<i8").tobytes())


def write_corpus(directory, sequences=DOCUMENTS, dtype="u2", bounds=None, name="corpus"):
    """Written as the community's tools do, one sequence after the other -> the .bin"""
    lengths = [len(sequence) for sequence in sequences]
    first_bytes = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    bounds = range(len(sequences) + 1) if bounds is None else bounds
    path = directory / f"{name}.bin"
    path.write_bytes(b"".join(np.array(sequence, f"<{dtype}").tobytes() for sequence in sequences))
    path.with_suffix(".idx").write_bytes(index_bytes(lengths, first_bytes, bounds, CODES[dtype]))
    return path


def documents_of(path, limit=None):
    documents = open_documents(path, limit)
    return [documents[index].tolist() for index in range(len(documents))]


def samples_of(*paths, tokenizer=None, **options):
    return load_samples(DataConfig(train=tuple(map(str, paths)), prompt="text", **options), tokenizer or Numbers())


def tokens_of(samples):
    return [samples[index].tolist() for index in range(len(samples))]


# good corpora


def test_the_layout_is_megatrons():
    """34 bytes of header, then lengths, first bytes and bounds, for two sequences of one document."""
    expected = bytes.fromhex(
        "4d4d49444944580000" "0100000000000000" "08" "0200000000000000" "0200000000000000"
        "0300000001000000" "0000000000000000" "0600000000000000" "0000000000000000" "0200000000000000")
    assert index_bytes([3, 1], [0, 6], [0, 2]) == expected


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_documents_of_every_integer_type(tmp_path, dtype):
    path = write_corpus(tmp_path, dtype=dtype)
    assert documents_of(path) == documents_of(path.with_suffix(".idx")) == DOCUMENTS
    samples = samples_of(path)
    assert tokens_of(samples) == DOCUMENTS and samples.tokens.dtype == np.int32


def test_large_ids_survive(tmp_path):
    class World(Numbers):
        vocab_size = 65536

    assert tokens_of(samples_of(write_corpus(tmp_path, [[65535, 40000, 0]]), tokenizer=World())) == [[65535, 40000, 0]]


def test_sequences_of_a_document_are_joined(tmp_path):
    path = write_corpus(tmp_path, [[5, 6], [7, 0], [8, 0], []], bounds=[0, 2, 2, 3, 4])
    assert documents_of(path) == [[5, 6, 7, 0], [], [8, 0], []]
    samples = samples_of(path)
    assert tokens_of(samples) == [[5, 6, 7, 0], [8, 0]]
    assert (samples.report.rows, samples.report.kept, samples.report.label_less) == (4, 2, 2)


def test_sequences_may_lie_in_any_order(tmp_path):
    path = write_corpus(tmp_path)
    path.with_suffix(".idx").write_bytes(index_bytes([6, 4, 0, 2], [12, 0, 8, 8], [0, 1, 2, 3, 4]))
    assert documents_of(path) == [DOCUMENTS[2], DOCUMENTS[0], [], DOCUMENTS[1]]


@pytest.mark.parametrize("bounds", [[], [0]])
def test_without_bounds_each_sequence_is_a_document(tmp_path, bounds):
    assert documents_of(write_corpus(tmp_path, bounds=bounds)) == DOCUMENTS


def test_the_tokens_are_mapped_not_read(tmp_path):
    tokens = open_documents(write_corpus(tmp_path)).tokens
    while tokens.base is not None and not isinstance(tokens, np.memmap):
        tokens = tokens.base
    assert isinstance(tokens, np.memmap) and tokens.mode == "r"


def test_all_but_the_first_token_is_learnt_and_the_end_is_not_doubled(tmp_path):
    samples = samples_of(write_corpus(tmp_path, [[5, 6, 0], [7, 8], [9], [0], []]))
    assert tokens_of(samples) == [[5, 6, 0], [7, 8, 0], [9, 0]]
    assert samples.label_counts.tolist() == [2, 2, 1]
    assert (samples.report.rows, samples.report.label_less) == (5, 2)


def test_a_tokenizer_that_puts_bos_gets_it_once(tmp_path):
    class WithBos(Numbers):
        bos_token_id = 1

        def __call__(self, texts, **_):
            return {"input_ids": [1, 50]} if texts == "a" else super().__call__(texts)

    samples = samples_of(write_corpus(tmp_path, [[5, 6, 0], [1, 7, 0], [1, 0], []]), tokenizer=WithBos())
    assert tokens_of(samples) == [[1, 5, 6, 0], [1, 7, 0]]
    assert samples.label_counts.tolist() == [3, 2]


def test_the_same_samples_as_from_text(tmp_path):
    texts = [" ".join(map(str, ids[:-1])) for ids in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert samples_of(tmp_path / "a.jsonl").fingerprint() == samples_of(write_corpus(tmp_path)).fingerprint()


def test_mixed_files_join_in_order_and_the_limit_counts_over_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "20"}\n{"text": "21"}\n')
    (tmp_path / "c.txt").write_text("30 31")
    paths = [tmp_path / "a.jsonl", write_corpus(tmp_path), tmp_path / "c.txt"]
    expected = [[20, 0], [21, 0], *DOCUMENTS, [30, 31, 0]]
    assert tokens_of(samples_of(*paths)) == expected
    for limit in range(1, 8):
        assert tokens_of(samples_of(*paths, train_samples=limit)) == expected[:limit]


def test_split_learns_every_token_once(tmp_path):
    document = [*range(1, 30), 0]
    whole, cut = (samples_of(write_corpus(tmp_path, [document]), max_length=8, overlong="split") if overlong else
                  samples_of(write_corpus(tmp_path, [document])) for overlong in (False, True))
    assert (cut.report.rows, cut.report.kept, cut.report.split, cut.report.pieces) == (1, 5, 1, 5)
    assert cut.report.label_tokens == whole.report.label_tokens == 29
    assert tokens_of(cut) == [document[start:start + 8] for start in (0, 7, 14, 21, 28)]


def test_a_token_that_is_not_used_is_not_judged(tmp_path):
    assert tokens_of(samples_of(write_corpus(tmp_path, [[5, 0], [500, 0]]), train_samples=1)) == [[5, 0]]


# broken corpora


def good_index(**changes):
    fields = dict(lengths=[4, 2, 6], first_bytes=[0, 8, 12], bounds=[0, 1, 2, 3]) | changes
    return index_bytes(**fields)


# the bytes of the index, what the message names; the .bin is that of DOCUMENTS, 24 bytes
BROKEN_INDEX = {
    "empty": (b"", ["corpus.idx", "is empty"]),
    "other magic": (good_index(magic=b"TNTIDX\0\0\0"), ["corpus.idx", "no binidx index", "TNTIDX"]),
    "a few bytes": (b"MMI", ["corpus.idx", "no binidx index"]),
    "header cut": (good_index()[:20], ["corpus.idx", "cut short", "20 bytes"]),
    "other version": (good_index(version=2), ["corpus.idx", "version 2"]),
    "unknown dtype": (good_index(code=9), ["corpus.idx", "dtype code 9"]),
    "a float dtype": (good_index(code=7), ["corpus.idx", "floating-point"]),
    "cut in the lengths": (good_index()[:40], ["corpus.idx", "cut short", "40 bytes", "102"]),
    "last byte missing": (good_index()[:-1], ["corpus.idx", "cut short"]),
    "a byte too many": (good_index() + b"\0", ["corpus.idx", "does not match", "103"]),
    "a count of sequences too large": (good_index(sequences=2**62), ["corpus.idx", "cut short"]),
    "a count of sequences too small": (good_index(sequences=2), ["corpus.idx", "does not match"]),
    "no sequence": (index_bytes([], [], [0]), ["corpus.idx", "no sequence"]),
    "negative length": (good_index(lengths=[4, -2, 10]), ["corpus.idx", "sequence 2", "negative"]),
    "lengths beyond the tokens": (good_index(lengths=[4, 2, 7]), ["corpus.bin", "24 bytes", "26", "cut short"]),
    "tokens of no sequence": (good_index(lengths=[4, 2, 5]), ["corpus.bin", "24 bytes", "22", "another index"]),
    "negative pointer": (good_index(first_bytes=[0, -8, 12]), ["corpus.idx", "sequence 2", "byte -8"]),
    "pointer beyond the tokens": (good_index(first_bytes=[0, 8, 2**63 - 1]), ["corpus.idx", "sequence 3", "outside of corpus.bin"]),
    "overlap": (good_index(first_bytes=[0, 6, 12]), ["corpus.idx", "1 and 2 overlap"]),
    "the same place twice": (good_index(lengths=[6, 0, 6], first_bytes=[12, 0, 12]), ["corpus.idx", "1 and 3 overlap"]),
    "a sequence inside a token": (good_index(lengths=[4, 0, 8], first_bytes=[0, 3, 8]), ["corpus.idx", "1 and 2 overlap"]),
    "bounds that start late": (good_index(bounds=[1, 2, 3]), ["corpus.idx", "1 to 3"]),
    "bounds beyond the sequences": (good_index(bounds=[0, 1, 2, 4]), ["corpus.idx", "0 to 4", "0 to 3"]),
    "bounds that end early": (good_index(bounds=[0, 1, 2]), ["corpus.idx", "0 to 2"]),
    "bounds that fall": (good_index(bounds=[0, 2, 1, 3]), ["corpus.idx", "document 2", "ends before it starts"]),
}


def refusal(*paths, **options):
    with pytest.raises(DataError) as caught:
        samples_of(*paths, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message.replace(str(paths[-1].parent), "")) < 250
    return message


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_broken_index_is_named_with_its_fault(tmp_path, case):
    path = write_corpus(tmp_path)
    content, named = BROKEN_INDEX[case]
    path.with_suffix(".idx").write_bytes(content)
    message = refusal(path)
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize(("content", "named"), [(b"", "is empty"), (b"\0" * 23, "cut short"), (b"\0" * 26, "another index")])
def test_tokens_that_do_not_fit_the_index(tmp_path, content, named):
    path = write_corpus(tmp_path)
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message and named in message


@pytest.mark.parametrize(("given", "missing"), [(".bin", ".idx"), (".idx", ".bin")])
def test_a_missing_partner(tmp_path, given, missing):
    path = write_corpus(tmp_path)
    path.with_suffix(missing).unlink()
    message = refusal(path.with_suffix(given))
    assert f"corpus{missing}: there is no such file beside corpus{given}" in message


def test_a_missing_corpus(tmp_path):
    assert "no such file" in refusal(tmp_path / "corpus.bin")


@pytest.mark.parametrize(("dtype", "token"), [("u2", 100), ("i4", -1), ("i8", 2**40)])
def test_a_token_outside_the_vocabulary(tmp_path, dtype, token):
    path = write_corpus(tmp_path, [[5, 0], [6, token, 7, 0]], dtype)
    message = refusal(path)
    assert f"{path}: document 2 holds token {token}" in message and "0 to 99" in message


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".txt"])
def test_whole_documents_need_the_prompt_text(tmp_path, suffix):
    path = write_corpus(tmp_path).with_suffix(suffix)
    path.with_suffix(".txt").write_text("5 6")
    with pytest.raises(DataError, match="need data.prompt: text; this is 'metamath'"):
        load_samples(DataConfig(train=(str(path),)), Numbers())


def test_a_broken_second_corpus_is_found_before_the_first_is_used(tmp_path):
    first, second = write_corpus(tmp_path), write_corpus(tmp_path, name="second")
    second.write_bytes(b"\0")

    class Unused(Numbers):
        @property
        def eos_token_id(self):
            raise AssertionError("the files are opened first")

    assert "second.bin" in refusal(first, second, tokenizer=Unused())
