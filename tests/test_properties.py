"""What readers make of anything at all: they read it, or refuse it by an error of ours that names the file or the field."""

import copy
import json
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import tiny_llama
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from bone_ds import adapter_file, checkpoint, ds_json
from bone_ds.checkpoint import manifest as manifests
from bone_ds.config import RunConfig, dump_yaml, load_config, validate
from bone_ds.data import GlobalOrder, Part, Report, Samples, deal, pack
from bone_ds.data.binidx import open_documents
from bone_ds.data.fields import turns
from bone_ds.data.rows import read
from bone_ds.errors import BoneError, CheckpointError, ConfigError, DataError
from bone_ds.plan.process import parse_bytes

bounded = settings(deadline=None, derandomize=True, max_examples=60)
"""The same examples every time."""

scalars = (st.none() | st.booleans() | st.integers(-10, 100) | st.integers() | st.floats() | st.text(max_size=10)
           | st.text(st.characters(), max_size=3))
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
                        max_leaves=6)
"""What JSON or YAML may hold."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def check_message(error: BoneError, start: str) -> str:
    message = str(error)
    assert message.startswith(start) and message.count("\n") < 2 and len(message) < 600 + len(start), message
    message.encode()  # a terminal can show it
    return message


# config

FIELDS = [(section, field) for section, info in RunConfig.model_fields.items() for field in info.annotation.model_fields]
PLAUSIBLE = [
    None, True, False, 0, 1, 2, 8, 64, 0.5, 1e-4, 1.0, 1e-8, "a", "a b\n", "é\x85\u2028", "1e5", "064", "on", "~", "", "{a}", ["a"], [0, 2],
    ["a", "a"], {"query": "q"}, [{"path": "a", "weight": 2}], ["a.jsonl", {"path": "b", "prompt": "text", "samples": 3}],
    "text", "chat", "template", "free", "col", "miss", "lora", "state", "full", "hadamard", "cosine_restarts", "exponential", "skip",
    "split", "layer", "bone", "fused", "factored"]
changes = st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(PLAUSIBLE) | anything), max_size=4)
TREE = {"model": {"path": "m"}, "adapter": {}, "data": {"train": "a.jsonl"}, "train": {}, "deepspeed": {}, "output": {"directory": "run"}}


@settings(bounded, max_examples=200)
@given(changes)
def test_a_config_is_read_back_equal_or_a_field_is_named(directory, changes):
    tree = copy.deepcopy(TREE)
    for (section, field), value in changes:
        tree[section][field] = value
    try:
        config = validate(tree, "run.yaml")
    except ConfigError as error:
        message = check_message(error, "run.yaml: ")
        assert any(f"{section}.{field}" in message for (section, field), _ in changes), message
    else:
        (directory / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(directory / "again.yaml") == config


TAGS = ("bool", "int", "float", "null", "timestamp", "binary", "str", "seq", "map", "set", "omap", "pairs", "python/name:os.system")
yaml_texts = st.text("ab:{}[],&*!%@`'\"#-?|> \n\t019.~<=\\_eE+x", max_size=40)


@settings(bounded, max_examples=200)
@given(st.sampled_from(["", "train: ", "train: {seed: ", "model: {path: m}\ndata: {train: a}\noutput: {directory: r}\n"]),
       st.sampled_from(["", *(f"!!{tag} " for tag in TAGS)]), yaml_texts | st.datetimes().map(str) | st.floats().map(str),
       st.sampled_from(["", "}", "\n"]))
def test_a_yaml_file(directory, before, tag, text, after):
    path = directory / "run.yaml"
    path.write_text(before + tag + text + after, encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        check_message(error, f"{path}: ")


@bounded
@given(st.binary(max_size=60))
def test_a_yaml_file_of_any_bytes(directory, content):
    path = directory / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:  # none makes a config
        load_config(path)
    check_message(error.value, f"{path}: ")


@settings(bounded, max_examples=120)
@given(st.sampled_from(FIELDS), yaml_texts | st.tuples(st.sampled_from(TAGS), yaml_texts).map(lambda pair: "!!{} {}".format(*pair)))
def test_an_override(directory, field, text):
    path = directory / "good.yaml"
    path.write_text("model: {path: m}\ndata: {train: a.jsonl}\noutput: {directory: run}\n")
    try:
        load_config(path, [f"{field[0]}.{field[1]}={text}"])
    except ConfigError as error:
        assert f"{field[0]}.{field[1]}" in str(error) and str(error).count("\n") < 2


SECTIONS = sorted(ds_json._OBEYED | {"bf16", "optimizer", "train_batch_size", "gradient_clipping", "fp16", "scheduler"})
zero_fields = st.dictionaries(st.sampled_from(sorted(ds_json._ZERO | ds_json._OFFLOAD.keys())),
                              st.sampled_from([True, False, 0, 1, 2, 5e8, 0.5, {"device": "cpu"}]) | anything, max_size=3)


@settings(bounded, max_examples=150)
@given(st.dictionaries(st.sampled_from(SECTIONS), anything, max_size=2), zero_fields, st.integers(0, 3), st.integers(1, 8))
def test_a_deepspeed_json_that_is_taken_is_taken_by_deepspeed(directory, sections, zero, stage, world_size):
    from deepspeed.runtime.zero.config import get_zero_config

    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage} | zero} | sections))
    config = RunConfig.model_validate(TREE | {"deepspeed": {"config": str(path)}, "train": {"global_batch_size": 840}})
    try:
        resolved = ds_json.resolve(config, world_size)
    except ConfigError as error:
        assert "ds.json: " in str(error) and str(error).count("\n") < 2 and len(str(error)) < 600
    else:
        get_zero_config(resolved)


@bounded
@given(st.text("0123456789.eE+-kKMGTtiIbB ", max_size=12) | st.text(max_size=5))
def test_an_amount_of_memory(text):
    try:
        assert 1 <= parse_bytes("--device-memory", text) < 2**63
    except ConfigError as error:
        check_message(error, "--device-memory: ")


# packing and order

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=80)


@bounded
@given(lengths, st.integers(40, 2**40))
def test_a_pack_that_holds_all_costs_no_memory(lengths, capacity):
    packs = pack(lengths, capacity)
    assert packs == pack(lengths, min(capacity, sum(lengths)))
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert len(packs) == 1 or sum(lengths) > capacity


@bounded
@given(lengths, st.booleans(), st.sampled_from([1, 2]), st.sampled_from([24, 840]), st.integers(0, 2),
       st.none() | st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_every_world_size_sees_the_same_samples_in_the_same_steps(lengths, packing, micro_batch_size, batch, seed, weights):
    samples = samples_of(lengths, weights)
    try:
        order = GlobalOrder(samples, packing, 40, batch, seed)
    except ConfigError as error:  # a source's weight is less than a sample
        assert "data.mixture" in str(error) and weights
        return
    world_sizes = [size for size in range(1, 9) if batch % (size * micro_batch_size) == 0]
    seen = [0] * len(lengths)
    for step in range(order.steps_in_epochs(2)):
        window = order.window(step)
        for world_size in world_sizes:
            hands = [deal(window, rank, world_size, micro_batch_size, batch) for rank in range(world_size)]
            assert sorted(unit for mine in hands for hand in mine for unit in hand.units) == sorted(window.units)
            assert len(set(map(len, hands))) == 1 and all(len(hand.units) <= micro_batch_size for mine in hands for hand in mine)
        for unit in window.units:
            for index in unit:
                seen[index] += 1
    if weights is None:
        assert seen == [2] * len(lengths)
    else:
        assert sum(seen) == 2 * len(lengths)
        for first, count, share in zip(np.cumsum([0, *(part.count for part in samples.parts)]), [part.count for part in samples.parts],
                                       order.epoch_counts):
            exact = Fraction(len(lengths)) * Fraction(weights[0]) / sum(map(Fraction, weights)) if first == 0 else None
            assert sum(seen[first:first + count]) == 2 * share and max(seen[first:first + count]) - min(seen[first:first + count]) <= 1
            assert exact is None or abs(share - exact) < 1


def samples_of(lengths, weights):
    """In three parts where there are weights."""
    tokens = sum(lengths)
    report = Report(len(lengths), len(lengths), 0, 0, 0, tokens, tokens, max(lengths))
    offsets, parts = np.cumsum([0, *lengths]), ()
    if weights:
        assume(len(lengths) >= 3)
        third = len(lengths) // 3
        counts = [third, third, len(lengths) - 2 * third]
        parts = tuple(Part(name, count, report, weight) for name, count, weight in zip("abc", counts, weights))
    return Samples(np.zeros(tokens, np.int32), offsets, np.ones(tokens, bool), 0, report, parts)


# bytes that were changed

edits = st.lists(st.tuples(st.sampled_from(["flip", "drop", "insert", "cut"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
                 min_size=1, max_size=4)
"""What is done, where as a share of the length, and with which byte."""


def edited(content: bytes, edits) -> bytes:
    changed = bytearray(content)
    for what, share, byte in edits:
        place = int(share * len(changed))
        if what == "flip" and changed:
            changed[place] ^= byte or 1
        elif what == "drop":
            del changed[place:place + 1 + byte % 16]
        elif what == "insert":
            changed[place:place] = bytes([byte]) * (1 + byte % 9)
        elif what == "cut":
            del changed[place:]
    return bytes(changed)


# adapters

@pytest.fixture(scope="module")
def adapter(directory):
    tiny_llama.save_tiny(directory / "llama")
    tiny_llama.random_adapter(directory / "llama", directory / "row.safetensors", rank=8)
    return directory / "row.safetensors"


def read_as(path, content: bytes):
    """The adapter of these bytes; None where they are refused."""
    path.write_bytes(content)
    try:
        return adapter_file.read(path)
    except CheckpointError as error:
        check_message(error, f"{path}: ")
        return None
    finally:
        try:
            adapter_file.outline(path)
        except CheckpointError as error:
            check_message(error, f"{path}: ")


@bounded
@given(st.binary(max_size=100)
       | st.tuples(st.integers(0, 300), st.binary(max_size=300)).map(lambda one: struct.pack("<Q", one[0]) + one[1]))
def test_an_adapter_of_any_bytes(directory, content):
    assert read_as(directory / "any.safetensors", content) is None


@settings(bounded, max_examples=120)
@given(edits)
def test_an_adapter_that_was_changed(directory, adapter, edits):
    content = adapter.read_bytes()
    changed = edited(content, edits)
    found = read_as(directory / "changed.safetensors", changed)
    assert found is None or changed == content


HEADER_FIELDS = ("format_version", "architecture", "method", "grouping", "rank", "alpha", "targets", "layers", "base", "base_revision",
                 "base_dtype", "base_fingerprint", "base_crc32", "step", "form", "groups", "sha256", "more")


@settings(bounded, max_examples=150)
@given(st.dictionaries(st.sampled_from(HEADER_FIELDS), st.sampled_from([1, 8, "row", "col", "lora", "state", "full", ["q_proj"], [0, 1]])
                       | anything, max_size=3), st.booleans())
def test_an_adapter_whose_header_was_rewritten(directory, adapter, changes, leaves_out):
    """Without a digest: a header that is read describes what can be put into a model."""
    with safe_open(adapter, "pt") as file:
        header = json.loads(file.metadata()["bone_ds"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del header["sha256"]
    for field, value in changes.items():
        header[field] = value
        if leaves_out:
            del header[field]
    found = read_as(directory / "header.safetensors", save(tensors, {"bone_ds": json.dumps(header)}))
    if found:
        read_header, _ = found
        assert isinstance(read_header.step, int) and isinstance(read_header.base_fingerprint, str)
        assert read_header.adapter.method == header["method"] and read_header.model.path == header["base"]


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.uint16, torch.complex64)


@bounded
@given(st.lists(st.tuples(st.sampled_from(["a.bone", "model.layers.0.self_attn.q_proj.bone", "bone", "", "a.lora_A", "é.bone"]),
                          st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 1, 4, 8]), max_size=4)), min_size=1, max_size=3),
       st.sampled_from(["bone", "lora", "state", "full"]))
def test_an_adapter_of_other_tensors(directory, adapter, tensors, method):
    with safe_open(adapter, "pt") as file:
        header = json.loads(file.metadata()["bone_ds"])
    del header["sha256"]
    if method != "bone":
        header |= {"method": method, "grouping": None, "form": None}
    content = save({name: torch.ones(shape).to(dtype) for name, dtype, shape in tensors}, {"bone_ds": json.dumps(header)})
    found = read_as(directory / "tensors.safetensors", content)
    if found:
        assert {tensor.dtype for tensor in found[1].values()} == {torch.float32}


# checkpoints

MANIFEST = checkpoint.Manifest(step=5, adam_step=5, base_fingerprint="b", data_fingerprint="d", world_size=2, held_out_loss=1.5, files={
    name: manifests.FileRecord(size_bytes=3, sha256="0" * 64) for name in ("adapter.safetensors", "state.safetensors", "config.yaml")})


def read_manifest(directory, content: bytes):
    (directory / manifests.NAME).write_bytes(content)
    try:
        return manifests.read(directory)
    except CheckpointError as error:
        check_message(error, f"{directory / manifests.NAME}: ")
        return None


@settings(bounded, max_examples=120)
@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode())
       | edits.map(lambda edits: edited(manifests.dump(MANIFEST).encode(), edits)))
def test_a_manifest_is_whole_or_refused(directory, content):
    found = read_manifest(directory, content)
    assert found in (None, MANIFEST)


@settings(bounded, max_examples=120)
@given(st.dictionaries(st.sampled_from(["step", "adam_step", "world_size", "held_out_loss", "files", "base_fingerprint", "format_version",
                                        "more"]), anything, min_size=1, max_size=2))
def test_a_manifest_whose_digest_is_right(directory, changes):
    fields = {"format_version": manifests.FORMAT_VERSION} | MANIFEST.model_dump() | changes
    found = read_manifest(directory, json.dumps(fields | {"sha256": manifests._digest(fields)}).encode())
    if found:
        assert found.step >= 1 and found.adam_step >= 0 and isinstance(found.files, dict) and "more" not in changes


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_a_manifest_about_as_deep_as_python_reads(directory, depth):
    assert read_manifest(directory, b'{"step": ' + b"[" * depth + b"]" * depth + b"}") is None


@bounded
@given(st.lists(st.from_regex(r"\A(step-)?[0-9]{0,12}[a-z.]{0,3}\Z") | st.sampled_from(["step-0000000٣", "step--0000001"]), max_size=5))
def test_only_what_has_a_checkpoint_s_name_is_one(tmp_path_factory, names):
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in {name for name in names if name not in ("", ".", "..")}:
        (directory / name).mkdir()
    found = checkpoint.existing(directory)
    assert [int(path.name.removeprefix("step-")) for path in found] == sorted(int(path.name.removeprefix("step-")) for path in found)
    assert {path.name for path in found} == {name for name in names if re.fullmatch(r"step-\d{8,}", name)}


# data

COLUMNS = ("query", "response")
json_lines = st.lists(st.dictionaries(st.sampled_from(["query", "response", "q"]), anything, max_size=3) | anything, max_size=4).map(
    lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())


@settings(bounded, max_examples=150)
@given(st.sampled_from([".jsonl", ".json", ".csv"]), st.binary(max_size=80) | json_lines | st.tuples(json_lines, edits).map(
    lambda one: edited(*one)) | st.text("query,response\n\"'\r\t;", max_size=60).map(str.encode))
def test_rows_of_any_bytes(directory, suffix, content):
    path = directory / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = list(read(path, COLUMNS))
    except DataError as error:
        check_message(error, str(path))
    else:
        assert rows and all(place.startswith(str(path)) and isinstance(row, dict) for place, row in rows)


@settings(bounded, max_examples=120)
@given(anything | st.lists(anything | st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls"]), st.sampled_from(["user", "assistant", "gpt", "a"]) | anything,
    max_size=4), max_size=3))
def test_a_conversation(conversation):
    try:
        found = turns("a.jsonl:1", {"messages": conversation}, "messages")
    except DataError as error:
        check_message(error, "a.jsonl:1")
    else:
        assert len(found) == len(conversation) > 0 and {turn.role for turn in found} <= {"user", "assistant", "system", "tool"}


small = st.integers(-1, 8)


@settings(bounded, max_examples=200)
@given(st.sampled_from([8, 8, 8, 1, 4, 5, 9]), st.lists(small, max_size=4), st.lists(small | st.integers(-2**63, 2**63 - 1), max_size=4),
       st.lists(small, max_size=5), st.binary(max_size=32), st.none() | st.integers(0, 2**64 - 1))
def test_a_corpus_of_any_index(directory, code, lengths, first_bytes, bounds, tokens, sequences):
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths) if sequences is None else sequences, len(bounds))
    index += np.array(lengths, "<i4").tobytes() + np.array(first_bytes, "<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    look_through(directory, index, tokens)


VALID = (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + np.array([4, 2, 6], "<i4").tobytes() + np.array([0, 8, 12], "<i8").tobytes()
         + np.array([0, 1, 2, 3], "<i8").tobytes())


@settings(bounded, max_examples=120)
@given(edits, st.booleans())
def test_a_corpus_that_was_changed(directory, edits, in_the_index):
    tokens = np.arange(12, dtype="<u2").tobytes()
    look_through(directory, *((edited(VALID, edits), tokens) if in_the_index else (VALID, edited(tokens, edits))))


@bounded
@given(st.binary(max_size=80), st.binary(max_size=16))
def test_a_corpus_of_any_bytes(directory, index, tokens):
    look_through(directory, index, tokens)


def look_through(directory, index: bytes, tokens: bytes) -> None:
    """Every document, which together hold every token once, or a refusal."""
    path = directory / "corpus.bin"
    path.write_bytes(tokens)
    path.with_suffix(".idx").write_bytes(index)
    try:
        documents = open_documents(path)
        found = [documents[number] for number in range(len(documents))]
        assert sorted(token for document in found for token in document.tolist()) == sorted(documents.tokens.tolist())
        assert sum(document.nbytes for document in found) == len(tokens)
        for number in range(len(documents)):
            assert documents.checked(number, 50).dtype == np.int32
    except DataError as error:
        check_message(error, str(path.with_suffix("")))
