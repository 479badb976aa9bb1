"""Tokenizers of RWKV models: ids as the `rwkv` package gives them, and text back from any ids."""

from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_rwkv import opened, save_tiny

from bone_ds.data import prompt_ids
from bone_ds.errors import CheckpointError
from rwkv_adapters import ARCHITECTURE, tokenizer

WORLD = files("rwkv") / tokenizer.WORLD_FILE
TEXTS = ["", "a", "Hello, world!\n\nUser: 1 + 1 = 2",
         "naïve 日本語 – Ωμέγα 🦀🇩🇪", " " * 300, "\r\n\t\x00\x7f", "def f(x):\n        return x ** 2\n"]


@pytest.fixture(scope="module")
def world():
    return tokenizer.WorldTokenizer(WORLD)


@pytest.fixture(scope="module")
def upstream():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(WORLD))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pth"
    save_tiny(path, vocabulary=256, layers=1)
    return opened(path)


def of_vocabulary(source, vocabulary, kind="auto"):
    return ARCHITECTURE.tokenizer(replace(source, tokenizer=kind, sizes=replace(source.sizes, vocabulary=vocabulary)))


@pytest.mark.parametrize("text", TEXTS)
def test_world_ids_are_those_of_the_package(world, upstream, text):
    ids = world(text)["input_ids"]
    assert ids == upstream.encode(text)
    assert world.decode(ids) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_world_ids_of_any_text(world, upstream, text):
    ids = world.encode(text)
    assert ids == upstream.encode(text)
    assert world.decode(ids, skip_special_tokens=True) == text


def test_the_calls_that_data_and_generation_make(world):
    texts = ["one two", "three"]
    batch = world(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    assert batch == [world(text)["input_ids"] for text in texts]
    assert prompt_ids("one two", world) == batch[0]
    assert (world.eos_token_id, world.bos_token_id, world.vocab_size) == (0, None, 65530)
    assert world.decode([*batch[0], 0], skip_special_tokens=True) == "one two"


def test_cut_off_characters_and_unused_ids_become_something(world):
    cut = [*world.encode("ab"), *[1 + byte for byte in "日".encode()[:2]]]  # ids 1 to 256 are the single bytes
    assert world.decode(cut).rstrip("\ufffd") == "ab" and world.decode(cut) != "ab"
    assert world.decode([65535, 0, 98]) == "a"
    assert tokenizer.ByteTokenizer().decode(list("ab日".encode()[:-1])) == "ab\ufffd"
    assert tokenizer.ByteTokenizer("utf-16-le").decode([97, 0, 98]) == "a\ufffd"


def test_half_a_surrogate_pair_is_replaced(world):
    assert world.decode(world.encode("a\ud800b")) == "a?b"
    assert tokenizer.ByteTokenizer().encode("\ud800") == [ord("?")]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_bytes_are_the_encoded_text(text, encoding):
    bytes_ = tokenizer.ByteTokenizer(encoding)
    assert bytes_.encode(text) == list(text.encode(encoding))
    assert bytes_.decode(bytes_.encode(text)) == text
    assert bytes_.decode(bytes_.encode(text), skip_special_tokens=True) == text.replace("\0", "")


def test_auto_goes_by_the_vocabulary(source):
    assert of_vocabulary(source, 65536).vocab_size == 65530
    assert of_vocabulary(source, 256)("aé")["input_ids"] == list("aé".encode())


@pytest.mark.parametrize(("kind", "expected"), [("bytes", [97, 195, 169]), ("utf-16le", [97, 0, 233, 0])])
def test_bytes_by_name(source, kind, expected):
    assert of_vocabulary(source, 300, kind)("aé")["input_ids"] == expected


def write_vocabulary(path, lines=(), drop=None):
    single = [f"{byte + 1} {chr(byte) if byte < 128 else bytes([byte])!r} 1" for byte in range(128, 256)]
    single += [f"{byte + 1} {chr(byte)!r} 1" for byte in range(128)]
    path.write_text("\n".join([*(line for index, line in enumerate(single) if index != drop), *lines]) + "\n", encoding="utf-8")
    return path


def test_a_vocabulary_of_ones_own(source, tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt", ["257 'ab' 2", "258 'abcd' 4", r"259 b'\xe6\x97' 2"])
    own = of_vocabulary(source, 260, str(path))
    assert own("abcdabc日")["input_ids"] == [258, 257, 100, 259, 1 + 0xA5]
    assert own.vocab_size == 260


@pytest.mark.parametrize(("lines", "message"), [
    (["257 'ab'"], r"line 257: \"257 'ab'\" is no line of a World vocabulary"),
    (["x 'ab' 2"], r"line 257: \"x 'ab' 2\" is no line"),
    (["257 ab 2"], r"line 257: '257 ab 2' is no line"),
    (["257 12 2"], r"line 257: '257 12 2' is no line"),
    (["257 __import__('os').abort() 2"], r"line 257: .* is no line of a World vocabulary"),
    (["257 'ab' 3"], r"line 257: .* the token has 2 bytes, not 3"),
    (["257 'é' 1"], r"line 257: .* the token has 2 bytes, not 1"),
    (["257 '' 0"], r"line 257: .* the token has 0 bytes"),
    (["257 'ab' 2", "257 'cd' 2"], r"line 258: the id of \"257 'cd' 2\" stands twice"),
    (["257 'ab' 2", "258 'ab' 2"], r"line 258: the token of \"258 'ab' 2\" stands twice"),
    (["0 'ab' 2"], r"line 257: .* the id 0 is not above 0, which ends a document"),
    (["-5 'ab' 2"], r"line 257: .* the id -5 is not above 0"),
    (["", "257 'ab' 2"], r"line 257: '' is no line"),
    (["300 'ab' 2"], r"has ids up to 300, .*m.pth has an embedding of 300 tokens")])
def test_a_wrong_vocabulary_is_refused(source, tmp_path, lines, message):
    path = write_vocabulary(tmp_path / "vocab.txt", lines)
    with pytest.raises(CheckpointError, match=message) as caught:
        of_vocabulary(source, 300, str(path))
    assert "vocab.txt" in str(caught.value) and str(caught.value).count("\n") == 0


@pytest.mark.parametrize(("content", "message"), [
    (None, "vocab.txt: can't be read: No such file or directory; model.tokenizer is world, bytes, utf-16le or the path"),
    (b"1 '\xff' 1\n", r"vocab.txt: is no UTF-8 text \(byte 3\)"),
    (b"", "vocab.txt: line 1: '' is no line of a World vocabulary")])
def test_a_file_that_is_no_vocabulary_is_refused(source, tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        of_vocabulary(source, 300, str(tmp_path / "vocab.txt"))


def test_a_vocabulary_without_every_byte_is_refused(source, tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt", drop=130)
    with pytest.raises(CheckpointError, match="has no token for the byte 2, so not every text could be encoded"):
        of_vocabulary(source, 300, str(path))


@pytest.mark.parametrize(("vocabulary", "kind", "message"), [
    (96, "auto", r"model.tokenizer: 'auto' knows no tokenizer for the 96 tokens of .*m.pth; give world, bytes"),
    (256, "world", r"model.tokenizer: 'world' has ids up to 65529, .*m.pth has an embedding of 256 tokens"),
    (96, "bytes", r"model.tokenizer: 'bytes' has ids up to 255, .*m.pth has an embedding of 96 tokens"),
    (65536, "wrld", r"wrld: can't be read: No such file")])
def test_a_tokenizer_that_does_not_fit_is_refused(source, vocabulary, kind, message):
    with pytest.raises(CheckpointError, match=message):
        of_vocabulary(source, vocabulary, kind)
