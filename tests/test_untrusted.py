"""Files that were made to harm: nothing in them is run, no claim in them is believed before it is checked, no path in them leads away."""

import ast
import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import save_tiny, tiny_model, write_gguf

from bone_ds import adapter_file, tensor_file
from bone_ds.cli import main
from bone_ds.config import DataConfig, ModelConfig
from bone_ds.data import rows
from bone_ds.data.sources import locate
from bone_ds.errors import CheckpointError, DataError, printable
from llama_adapters import ARCHITECTURE, checks

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("bone_ds", "llama_adapters", "rwkv_adapters", "ds_configs") for path in (ROOT / package).rglob("*.py"))
AT_MOST_S = 20


# Nothing that a file says is run.


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    seen = set()
    for path in FILES:
        for call in calls(path):
            name, keywords = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            where = f"{path}:{call.lineno}: {name}"
            assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.unsafe_load", "marshal.loads",
                                "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput"), where
            assert keywords.get("shell") in (None, "False") and keywords.get("allow_pickle") in (None, "False"), where
            assert keywords.get("trust_remote_code") in (None, "False"), where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where
            assert name != "np.load" or keywords.get("allow_pickle") == "False", where
            if name.startswith("subprocess."):  # a list of words, which no shell parts
                assert isinstance(call.args[0], (ast.List, ast.Name)), where
            seen.add(name)
    assert {"torch.load", "np.load", "subprocess.run", "subprocess.Popen"} <= seen


# Safetensors headers.


def safetensors(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin: int, end: int, shape=(1,), dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


HEADERS = {
    "longer than any file": safetensors("{}", length=2**63),
    "longer than this file": safetensors("{}", length=3),
    "of no length": struct.pack("<Q", 0),
    "negative offsets": safetensors(f'{{"a": {entry(-4, 0)}}}', bytes(4)),
    "offsets the wrong way round": safetensors(f'{{"a": {entry(4, 0)}}}', bytes(4)),
    "offsets beyond the end": safetensors(f'{{"a": {entry(2**40, 2**40 + 4)}}}', bytes(4)),
    "overlapping tensors": safetensors(f'{{"a": {entry(0, 4)}, "b": {entry(0, 4)}}}', bytes(4)),
    "half overlapping tensors": safetensors(f'{{"a": {entry(0, 8, (2,))}, "b": {entry(4, 12, (2,))}}}', bytes(12)),
    "a gap": safetensors(f'{{"a": {entry(0, 4)}, "b": {entry(8, 12)}}}', bytes(12)),
    "a name twice": safetensors(f'{{"a": {entry(0, 4)}, "a": {entry(4, 8)}}}', bytes(8)),
    "a shape that overflows": safetensors(f'{{"a": {entry(0, 4, (2**32, 2**32))}}}', bytes(4)),
    "a negative shape": safetensors(f'{{"a": {entry(0, 4, (-1, -1))}}}', bytes(4)),
    "a shape of text": safetensors('{"a": {"dtype": "F32", "shape": "11", "data_offsets": [0, 4]}}', bytes(4)),
    "offsets of text": safetensors('{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}', bytes(4)),
    "offsets that are no numbers": safetensors('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, NaN]}}', bytes(4)),
    "a number of many digits": safetensors(f'{{"a": {{"dtype": "F32", "shape": [{"9" * 5000}], "data_offsets": [0, 4]}}}}', bytes(4)),
    "nested deeply": safetensors("[" * 200_000),
    "no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a list": safetensors("[]"),
    "no JSON": safetensors("{'a': 1}"),
    "an unknown dtype": safetensors(f'{{"a": {entry(0, 4, dtype="X9")}}}', bytes(4)),
    "metadata that is a number": safetensors('{"__metadata__": 7}'),
    "a million tensors": safetensors("{" + ", ".join(f'"{number}": {entry(0, 0, (0,))}' for number in range(10**6)) + "}"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path, case):
    """By the library, which reads adapters, and by ours, which reads a Llama's headers."""
    started = time.monotonic()
    (tmp_path / "model.safetensors").write_bytes(HEADERS[case])
    for read in (adapter_file.read, adapter_file.outline, tensor_file.outline, checks._read_header):
        if case == "metadata that is a number" and read is checks._read_header:
            continue  # metadata is no concern of it
        with pytest.raises(CheckpointError, match="model.safetensors: ") as error:
            read(tmp_path / "model.safetensors")
        assert str(error.value).count("\n") < 2 and len(str(error.value)) < 600
    assert time.monotonic() - started < AT_MOST_S


def test_a_llama_of_absurdly_many_layers(tmp_path):
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="config.json: transformers can't build this model: num_hidden_layers is 1000000000"):
        ARCHITECTURE.open(ModelConfig(path=str(tmp_path / "model")))


# GGUF headers.


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model())
    return path.read_bytes()


def after(content: bytes, key: bytes, skipped: int, packed: bytes) -> bytes:
    """Bytes put `skipped` behind the first place of a key."""
    place = content.index(key) + len(key) + skipped
    return content[:place] + packed + content[place + len(packed):]


EMBEDDING = b"token_embd.weight"
TYPE_BYTES, COUNT_BYTES = 4, 8
GGUFS = {
    "2^60 tensors": lambda c: c[:8] + struct.pack("<Q", 2**60) + c[16:],
    "2^60 fields": lambda c: c[:16] + struct.pack("<Q", 2**60) + c[24:],
    "a key of 2^63 bytes": lambda c: c[:24] + struct.pack("<Q", 2**63) + c[32:],
    "a text of 2^62 bytes": lambda c: after(c, b"general.architecture", TYPE_BYTES, struct.pack("<Q", 2**62)),
    "a field of unknown type": lambda c: after(c, b"llama.block_count", 0, struct.pack("<I", 99)),
    "2^60 tokens": lambda c: after(c, b"tokenizer.ggml.tokens", 2 * TYPE_BYTES, struct.pack("<Q", 2**60)),
    "tokens that are arrays": lambda c: after(c, b"tokenizer.ggml.tokens", TYPE_BYTES, struct.pack("<I", 9)),
    "10^9 layers": lambda c: after(c, b"llama.block_count", TYPE_BYTES, struct.pack("<I", 10**9)),
    "2^31 dimensions": lambda c: after(c, EMBEDDING, 0, struct.pack("<I", 2**31)),
    "dimensions whose product overflows": lambda c: after(c, EMBEDDING, 4, struct.pack("<QQ", 2**33, 2**33)),
    "dimensions of nothing": lambda c: after(c, EMBEDDING, 4, struct.pack("<QQ", 0, 96)),
    "a tensor of unknown type": lambda c: after(c, EMBEDDING, 20, struct.pack("<I", 12345)),
    "a tensor beyond the end": lambda c: after(c, EMBEDDING, 24, struct.pack("<Q", 2**40)),
    "a tensor before the beginning": lambda c: after(c, EMBEDDING, 24, struct.pack("<Q", 2**64 - 64)),
    "a tensor on another's bytes": lambda c: after(c, b"output_norm.weight", 4 + 8 + 4, struct.pack("<Q", 0)),
    "a tensor a little later": lambda c: after(c, EMBEDDING, 24, struct.pack("<Q", 32)),
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("case", GGUFS)
def test_gguf_headers(tmp_path, gguf, case):
    started = time.monotonic()
    content = GGUFS[case](gguf)
    assert content != gguf and len(content) == len(gguf)
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.gguf: ") as error:
        ARCHITECTURE.open(ModelConfig(path=str(tmp_path / "bad.gguf"), cache_dir=str(tmp_path / "cache")))
    assert str(error.value).count("\n") < 2 and len(str(error.value)) < 600
    assert not list(tmp_path.glob("cache/*/")) and time.monotonic() - started < AT_MOST_S


@pytest.mark.parametrize("alignment, depth", [(0, 0), (3, 0), (None, 5000)])
def test_gguf_fields_that_writers_do_not_write(tmp_path, alignment, depth):
    """An alignment of 0, and arrays in arrays in arrays."""
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    if alignment is None:
        field = text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 7)
    else:
        field = text(b"general.alignment") + struct.pack("<II", 4, alignment)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(64))
    with pytest.raises(CheckpointError, match="bad.gguf: is no whole GGUF file"):
        ARCHITECTURE.open(ModelConfig(path=str(tmp_path / "bad.gguf"), cache_dir=str(tmp_path / "cache")))


def test_a_gguf_header_of_more_values_than_any_vocabulary_has(tmp_path, gguf, monkeypatch):
    from llama_adapters import gguf_conversion

    monkeypatch.setattr(gguf_conversion, "_MOST_VALUES", 100)
    (tmp_path / "large.gguf").write_bytes(gguf)
    with pytest.raises(CheckpointError, match="large.gguf: is no whole GGUF file: its header holds more than 100 values"):
        ARCHITECTURE.open(ModelConfig(path=str(tmp_path / "large.gguf"), cache_dir=str(tmp_path / "cache")))


# Data.


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST_TEXT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"query": "a"}\n{"query": "' + "x" * 2000 + '"}\n')
    with pytest.raises(DataError, match="a.jsonl:2: the line has more than 1000 bytes"):
        list(rows.read(tmp_path / "a.jsonl", ["query"]))


@pytest.mark.parametrize("named", ["../outside.jsonl", "{outside}", "inside/../../outside.jsonl"])
def test_a_data_sets_readme_names_no_file_outside_of_it(tmp_path, named, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "outside.jsonl").write_text('{"query": "secret", "response": "1"}\n')
    (tmp_path / "set/inside").mkdir(parents=True)
    named = named.format(outside=tmp_path / "outside.jsonl")
    files = f"- split: train\n    path: {named}"
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  {files}\n---\n")
    with pytest.raises(DataError, match=r"set: (its README.md names .*outside.jsonl, which does not lie in it|is a directory in which)"):
        locate(DataConfig(train=(str(tmp_path / "set"),)), "train")


# Messages.


def test_a_message_steers_no_terminal(tmp_path, capsys):
    save_file({"\x1b[2J\rq_proj\u202e": torch.ones(1)}, tmp_path / "adapter.safetensors", metadata={"bone_ds": "\x1b]0;owned\x07"})
    assert main(["inspect", str(tmp_path / "adapter.safetensors")]) == 2
    assert main(["merge", str(tmp_path / "adapter.safetensors"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert not any(character in said.out + said.err for character in "\x1b\r\x07\u202e")


def test_what_is_printable():
    assert printable("zwölf 漢字\nline") == "zwölf 漢字\nline" and printable("a\x1b[0m\ud800") == "a\\x1b[0m\\ud800"
    assert len(printable("x" * 10**6)) < 5000
