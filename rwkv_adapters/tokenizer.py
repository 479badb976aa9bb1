"""Text to token ids for RWKV models: the World vocabulary, or plain bytes.

The objects answer the calls that the project makes of a Hugging Face tokenizer. Id 0 ends a document.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bone_ds.errors import CheckpointError
from rwkv_adapters.weights import RwkvSource

WORLD_FILE = "rwkv_vocab_v20230424.txt"
END_OF_DOCUMENT = 0

_BY_VOCABULARY = {65536: "world", 256: "bytes"}
_ENCODINGS = {"bytes": "utf-8", "utf-16le": "utf-16-le"}


def tokenizer(source: RwkvSource) -> Tokenizer:
    """As model.tokenizer says. Raises CheckpointError where the model has no such vocabulary, or the file of one is wrong."""
    vocabulary = source.sizes.vocabulary
    kind = source.tokenizer
    if kind == "auto":
        if vocabulary not in _BY_VOCABULARY:
            raise CheckpointError(f"model.tokenizer: 'auto' knows no tokenizer for the {vocabulary} tokens of {source.path}; give world, "
                                  "bytes, utf-16le or the path of a World vocabulary file")
        kind = _BY_VOCABULARY[vocabulary]
    chosen = ByteTokenizer(_ENCODINGS[kind]) if kind in _ENCODINGS else WorldTokenizer(_vocabulary_file(kind))
    if chosen.vocab_size > vocabulary:
        raise CheckpointError(f"model.tokenizer: {source.tokenizer!r} has ids up to {chosen.vocab_size - 1}, {source.path} has an "
                              f"embedding of {vocabulary} tokens")
    return chosen


class Tokenizer:
    """What the vocabularies share. There is no BOS, and a text's tokens are the same with special tokens and without."""

    eos_token_id = END_OF_DOCUMENT
    bos_token_id = None
    vocab_size: int
    """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Bytes that are no text, such as a character that is cut off, become U+FFFD."""
        raise NotImplementedError

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, return_attention_mask: bool = False,
                 verbose: bool = False) -> dict[str, list[int] | list[list[int]]]:
        return {"input_ids": self.encode(text) if isinstance(text, str) else [self.encode(one) for one in text]}

    def fingerprint(self) -> str:
        """Equal for vocabularies that encode alike."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A token is a byte of the encoded text.

    The end of a document is the byte 0, which UTF-8 text has for the character U+0000 alone, but UTF-16 text for every other
    byte of ASCII.
    """

    vocab_size = 256

    def __init__(self, encoding: str = "utf-8"):
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        return list(text.encode(self.encoding, errors="replace"))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        text = bytes(int(token) for token in ids).decode(self.encoding, errors="replace")
        return text.replace("\0", "") if skip_special_tokens else text

    def fingerprint(self) -> str:
        return f"bytes of {self.encoding}, {_code_fingerprint()}"


class WorldTokenizer(Tokenizer):
    """Greedy longest match over a World vocabulary: the tokens of the `rwkv` package's TRIE_TOKENIZER.

    That one runs the vocabulary's lines as Python, so it is not given a file of the user's, and its trie takes 0.3 GB.
    """

    def __init__(self, path: Path):
        """Raises CheckpointError, naming the line, for a vocabulary that isn't one."""
        self._tokens = read_vocabulary(path)
        self.vocab_size = max(self._tokens) + 1
        self._ids = {token: index for index, token in self._tokens.items()}
        lengths = defaultdict(set)
        for token in self._ids:
            lengths[token[:2]].add(len(token))
        self._lengths = {start: sorted(found | {1}, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        data, ids = text.encode("utf-8", errors="replace"), []
        position = 0
        while position < len(data):
            for length in self._lengths.get(data[position:position + 2], (1,)):
                token = data[position:position + length]
                if token in self._ids:
                    break
            ids.append(self._ids[token])
            position += len(token)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids without a token, the end of a document among them, become nothing."""
        return b"".join(self._tokens.get(int(token), b"") for token in ids).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((sorted(self._tokens.items()), _code_fingerprint())).encode()).hexdigest()


def _code_fingerprint() -> str:
    """Of this module, which may encode otherwise in another version."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def read_vocabulary(path: Path) -> dict[int, bytes]:
    """The tokens of a World vocabulary by id: lines of `id 'text' length`, or `id b'bytes' length`. Raises CheckpointError."""
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}; model.tokenizer is world, bytes, utf-16le or the path of a "
                              "World vocabulary file") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no UTF-8 text (byte {error.start}), a World vocabulary is") from None
    tokens: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        index, token = _parse(line, f"{path}: line {number}")
        if index in tokens or token in ids:
            raise CheckpointError(f"{path}: line {number}: the {'id' if index in tokens else 'token'} of {line[:60]!r} stands twice")
        tokens[index], ids[token] = token, index
    for byte in range(256):
        if bytes([byte]) not in ids:
            raise CheckpointError(f"{path}: has no token for the byte {byte}, so not every text could be encoded")
    return tokens


def _parse(line: str, where: str) -> tuple[int, bytes]:
    """One line of a vocabulary. `literal_eval` reads literals alone, and runs nothing."""
    try:
        index, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        number, length_bytes = int(index), int(length)
        token = ast.literal_eval(literal)
        token = token.encode("utf-8") if isinstance(token, str) else token
        if not isinstance(token, bytes):
            raise ValueError("no text")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise CheckpointError(f"{where}: {line[:60]!r} is no line of a World vocabulary: id 'text' length") from None
    if len(token) != length_bytes or not token:
        raise CheckpointError(f"{where}: {line[:60]!r}: the token has {len(token)} bytes, not {length_bytes}")
    if number <= END_OF_DOCUMENT:
        raise CheckpointError(f"{where}: {line[:60]!r}: the id {number} is not above {END_OF_DOCUMENT}, which ends a document")
    return number, token


def _vocabulary_file(kind: str) -> Path:
    if kind != "world":
        return Path(os.path.expanduser(kind))
    from importlib.resources import files

    return Path(str(files("rwkv") / WORLD_FILE))
