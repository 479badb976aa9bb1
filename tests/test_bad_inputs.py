"""Bad configs, data, models, adapters and arguments, a row each: exit code 2, one message that names the field or file and its value, and
nothing left behind. What single readers refuse is in the other test_bad_*.py; here commands run as a shell would run them, in this process.
"""

import json
import os
from collections import Counter

import pytest
import tiny_llama
import tiny_rwkv
import torch
from safetensors.torch import save_file

from bone_ds import launch
from bone_ds.cli import main

RUN = """model: {path: MADE/llama, dtype: fp32, cache_dir: cache}
adapter: {rank: 8}
data: {train: rows.jsonl, max_length: 256}
train: {steps: 2, global_batch_size: 2}
output: {directory: run}
"""
GOOD = '{"query": "ab", "response": "cd"}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and adapters that are whole."""
    directory = tmp_path_factory.mktemp("made")
    tiny_llama.save_tiny(directory / "llama")
    tiny_rwkv.save_tiny(directory / "rwkv.pth", vocabulary=256)
    tiny_llama.random_adapter(directory / "llama", directory / "row.safetensors", rank=8)
    tiny_llama.random_adapter(directory / "llama", directory / "lora.safetensors", method="lora", rank=4)
    save_file({"a": torch.ones(2)}, directory / "other.safetensors")
    return directory


@pytest.fixture
def refuse(made, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Runs a command that must be refused in a directory with a config and rows: arguments, files -> the message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr(launch, "_run_to_their_end", lambda *_: pytest.fail("ranks were started"))

    def run(arguments, files=()) -> str:
        given = {"run.yaml": RUN, "rows.jsonl": GOOD * 4} | dict(files)
        for name, content in given.items():
            write(tmp_path / name, content.replace("MADE", str(made)) if isinstance(content, str) else content)
        before = listing(tmp_path) + listing(made)
        code = main([word.replace("MADE", str(made)) for word in arguments])
        output = capsys.readouterr()
        assert (code, output.out) == (2, "")
        message = output.err.removesuffix("\n")
        assert message.startswith("bone-ds: ") and message.count("\n") < 2 and "Traceback" not in message, message
        assert max(map(len, message.replace(str(tmp_path), "").replace(str(made), "").splitlines())) < 450, message
        assert listing(tmp_path) + listing(made) == before
        return message

    return run


def write(path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listing(directory) -> list:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*"))


def link_to(target):
    return lambda path: path.symlink_to(target)


def table(**columns):
    """Writes a .parquet or .arrow file."""
    def write(path):
        import pyarrow
        import pyarrow.parquet

        names, arrays = zip(*((name.rstrip("_"), pyarrow.array(*column)) for name, column in columns.items()))
        content = pyarrow.Table.from_arrays(arrays, names)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(content, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as writer:
                writer.write_table(content)

    return write


# A field and its value as YAML, and what the message says besides the field.
NO_TEXT = "holds what files and tokenizers don't take"
FIELDS = [
    ("model.path", "[a, b]", "['a', 'b']: give text"),
    ("model.path", '"a\\0b"', NO_TEXT),
    ("model.revision", "''", "is empty"),
    ("model.revision", "1.0", "1.0: give text, in quotes"),
    ("model.tokenizer", "5", "5: give text"),
    ("model.wkv", "true", "True is not one of 'auto'"),
    ("model.dtype", "16", "16 is not one of 'bf16' or 'fp32'"),
    ("model.dtype", "[[bf16]]", "[['bf16']] is not one of"),
    ("model.architecture", "null", "None is not one of"),
    ("model.cache_dir", "''", "is empty"),
    ("model.cache_dir", "~no-such-user/cache", "knows no such home directory"),
    ("adapter.method", "null", "None is not one of 'bone'"),
    ("adapter.grouping", "[row]", "['row'] is not one of 'row'"),
    ("adapter.strategy", "1", "1 is not one of 'auto'"),
    ("adapter.rank", "8.0", "8.0: give a whole number"),
    ("adapter.rank", "064", "'064': give a whole number"),
    ("adapter.rank", "100000", "less than or equal to 65536"),
    ("adapter.rank", "null", "None: give a whole number"),
    ("adapter.parameters", "1e6", "1000000.0: give a whole number"),
    ("adapter.parameters", "9000000000000", "less than or equal to 1000000000000"),
    ("adapter.alpha", ".nan", "nan: input should be a finite number"),
    ("adapter.alpha", "-1", "-1: input should be greater than 0"),
    ("adapter.alpha", "1e300", "1e+300: input should be less than or equal to"),
    ("adapter.groups", "2.5", "2.5: give a whole number"),
    ("adapter.targets", "['']", "'': is empty"),
    ("adapter.targets", "[q_proj, 5]", "5: give text"),
    ("adapter.layers", "[0, 1.5]", "1.5: give a whole number"),
    ("adapter.layers", "[0, 18446744073709551616]", "less than or equal to 9223372036854775807"),
    ("data.train", "[rows.jsonl, null]", "None: give text"),
    ("data.train", "[rows.jsonl, '']", "'': is empty"),
    ("data.eval", "{path: rows.jsonl}", "{'path': 'rows.jsonl'}: give a list"),
    ("data.train_samples", "-1", "-1: input should be greater than or equal to 1"),
    ("data.train_samples", "18446744073709551616", "less than or equal to 9223372036854775807"),
    ("data.train_samples", "1k", "'1k': give a whole number"),
    ("data.eval_samples", "true", "True: give a whole number"),
    ("data.subset", "''", "is empty"),
    ("data.train_split", "''", "is empty"),
    ("data.eval_split", "null", "None: give text"),
    ("data.revision", "''", "is empty"),
    ("data.prompt", "null", "None is not one of 'metamath'"),
    ("data.prompt", "{metamath: 1}", "{'metamath': 1} is not one of"),
    ("data.fields", "{query: null}", "data.fields.query: None: give text"),
    ("data.fields", "{query: [a]}", "data.fields.query: ['a']: give text"),
    ("data.fields", '{query: "\\ud800"}', NO_TEXT),
    ("data.template", "[a]", "['a']: give text"),
    ("data.completion", "5", "5: give text"),
    ("data.chat_template", "''", "is empty"),
    ("data.drop_after_code", "2", "2: give true or false"),
    ("data.max_length", "512.5", "512.5: give a whole number"),
    ("data.max_length", "'512'", "'512': give a whole number"),
    ("data.max_length", "100000000", "less than or equal to 16777216"),
    ("data.overlong", "false", "False is not one of 'truncate'"),
    ("data.packing", "null", "None: give true or false"),
    ("data.cache", "none", "'none': give true or false"),
    ("data.mixture", "[null]", "data.mixture.0: None: is no section"),
    ("data.mixture", "[{path: 5}]", "data.mixture.0.path: 5: give text"),
    ("data.mixture", "[{path: ''}]", "data.mixture.0.path: '': is empty"),
    ("data.mixture", "[a, {path: a, weight: 0}]", "data.mixture.1.weight: 0: input should be greater than 0"),
    ("data.mixture", "[{path: a, weight: -1}]", "data.mixture.0.weight: -1: input should be greater than 0"),
    ("data.mixture", "[{path: a, weight: .nan}]", "data.mixture.0.weight: nan: input should be a finite number"),
    ("data.mixture", "[{path: a, samples: 2.5}]", "data.mixture.0.samples: 2.5: give a whole number"),
    ("data.mixture", "[{path: a, prompt: poem}]", "data.mixture.0.prompt: 'poem' is not one of"),
    ("data.mixture", "[{path: a, fields: [b]}]", "data.mixture.0.fields: ['b']: give pairs"),
    ("data.mixture", "[{path: a, split: ''}]", "data.mixture.0.split: '': is empty"),
    ("train.steps", "2000000000", "less than or equal to 1000000000"),
    ("train.steps", "1:30", "'1:30': give a whole number"),
    ("train.steps", "0x1F.0", "'0x1F.0': give a whole number"),
    ("train.epochs", "1000000", "less than or equal to 100000"),
    ("train.epochs", "0.5", "0.5: give a whole number"),
    ("train.global_batch_size", "2.0", "2.0: give a whole number"),
    ("train.global_batch_size", "10000000000", "less than or equal to 2147483648"),
    ("train.micro_batch_size", "100000", "less than or equal to 65536"),
    ("train.learning_rate", "-1e-4", "-0.0001: input should be greater than 0"),
    ("train.learning_rate", "1000", "less than or equal to 100"),
    ("train.learning_rate", "'1e-4'", "'1e-4': give a number"),
    ("train.learning_rate", "1e-4x", "'1e-4x': give a number"),
    ("train.learning_rate", "1,5", "'1,5': give a number"),
    ("train.warmup_steps", "0.1", "0.1: give a whole number"),
    ("train.final_lr_ratio", "-0.1", "-0.1: input should be greater than or equal to 0"),
    ("train.final_lr_ratio", "10%", "'10%': give a number"),
    ("train.cycles", "1", "1: input should be greater than or equal to 2"),
    ("train.optimizer", "adam", "did you mean 'adamw'?"),
    ("train.weight_decay", ".inf", "inf: input should be a finite number"),
    ("train.weight_decay", "[0.1]", "[0.1]: give a number"),
    ("train.beta1", ".nan", "nan: input should be a finite number"),
    ("train.beta2", "1", "1: input should be less than 1"),
    ("train.eps", "2", "2: input should be less than or equal to 1"),
    ("train.max_grad_norm", "none", "'none': give a number"),
    ("train.max_grad_norm", "-.inf", "-inf: input should be a finite number"),
    ("train.recompute_every", "-2", "-2: input should be greater than or equal to 1"),
    ("train.recompute_modules", "[mlp, 5]", "train.recompute_modules.1: 5: give text"),
    ("train.activation_checkpointing", "true", "True is not one of 'auto'"),
    ("train.loss_chunk", "0.5", "0.5: give a whole number"),
    ("train.chunk_length", "100.5", "100.5: give a whole number"),
    ("train.l2wrap", "5", "5: input should be less than or equal to 1"),
    ("train.seed", "9223372036854775808", "9223372036854775808: input should be less than"),
    ("train.seed", "null", "None: give a whole number"),
    ("train.on_nan", "ignore", "'ignore' is not one of 'stop' or 'skip'"),
    ("train.max_skipped", "0", "0: input should be greater than or equal to 1"),
    ("train.collective_timeout_s", "0.001", "0.001: input should be greater than or equal to 1"),
    ("train.collective_timeout_s", "10min", "'10min': give a number"),
    ("train.collective_timeout_s", "1e300", "1e+300: input should be less than or equal to 10000000"),
    ("train.eval_every", "2.5", "2.5: give a whole number"),
    ("train.log_norms_every", "-1", "-1: input should be greater than or equal to 0"),
    ("train.save_every", "null", "None: give a whole number"),
    ("train.keep_best", "1", "1: give true or false"),
    ("train.async_save", "'yes'", "'yes': give true or false"),
    ("deepspeed.config", "2", "2: give text"),
    ("output.directory", "null", "None: give text"),
    ("output.directory", "5", "5: give text"),
    ("output.directory", '"run\\ud800"', NO_TEXT),
    ("output.directory", "~no-such-user/run", "knows no such home directory"),
]


@pytest.mark.parametrize("field, value, says", FIELDS)
def test_a_field(refuse, field, value, says):
    message = refuse(["train", "run.yaml", f"{field}={value}"])
    assert f"run.yaml: {field}" in message and says in message, message


# Overrides that go not together, and what the message says.
COMBINATIONS = [
    (["train.learning_rate=1", "train.weight_decay=1"], ["train.weight_decay: 1.0", "train.learning_rate: 1.0", "lower one"]),
    (["train.schedule=exponential"], ["train.final_lr_ratio: 0.0", "exponential", "0.1"]),
    (["train.cycles=3"], ["train.cycles: 3", "'cosine'", "remove one"]),
    (["train.schedule=cosine_restarts", "train.steps=3"], ["train.cycles: 2 in the 3 steps", "give fewer"]),
    (["train.schedule=cosine_restarts", "train.steps=90", "train.cycles=50"], ["train.cycles: 50 in the 90 steps"]),
    (["train.epochs=2"], ["train.steps: 2", "train.epochs: 2", "keep one"]),
    (["train.micro_batch_size=4"], ["train.global_batch_size: 2 is no multiple of train.micro_batch_size: 4"]),
    (["train.chunk_length=300"], ["train.chunk_length: 300", "data.max_length: 256"]),
    (["train.recompute_every=2", "train.activation_checkpointing=bone"], ["train.recompute_every: 2", "'bone'", "remove one"]),
    (["adapter.method=full"], ["adapter.rank: 8", "full", "remove it"]),
    (["adapter.method=state", "adapter.rank=null", "adapter.parameters=5"], ["adapter.rank: None"]),
    (["adapter.method=lora", "adapter.groups=4"], ["adapter.groups: 4", "lora", "remove it"]),
    (["adapter.method=lora", "adapter.grouping=free", "adapter.form=hadamard"], ["adapter.grouping: 'free'", "lora"]),
    (["adapter.grouping=left", "adapter.groups=4"], ["adapter.groups: 4", "'left'", "remove one"]),
    (["adapter.grouping=col", "adapter.form=hadamard", "adapter.strategy=factored"], ["adapter.strategy: 'factored'", "hadamard"]),
    (["adapter.layers=[1, 1]"], ["adapter.layers: [1, 1] is no range"]),
    (["data.train=[]"], ["data.train: [] names no data"]),
    (["data.train=null"], ["data.train: None: give a list"]),
    (["data.mixture=[]", "data.train=[]"], ["data.train: [] names no data"]),
    (["data.prompt=text", "data.template='{text}'"], ["data.template: '{text}'", "'text'"]),
    (["data.prompt=template", "data.template='{a}'", "data.completion='{b}'", "data.chat_template=x"], ["data.chat_template: 'x'", "chat"]),
    (["data.prompt=text", "data.drop_after_code=true"], ["data.drop_after_code: True", "'text'", "remove it"]),
    (["data.prompt=template", "data.template='{a'", "data.completion='{b}'"], ["data.template: '{a'", "write a literal brace twice"]),
    (["data.prompt=template", "data.template='{a!r}'", "data.completion='{b}'"], ["data.template: the place {a}", "brace twice"]),
    (["data.prompt=template", "data.template='{a}'", "data.completion=yes sir"], ["data.completion: 'yes sir' holds no {field}"]),
    (["data.prompt=template", "data.template='{0}'", "data.completion='{b}'"], ["data.template: the place {0} is no plain {field}"]),
    (["data.fields={qwery: a}"], ["data.fields: the prompt has no field 'qwery'", "did you mean 'query'?"]),
    (["data.prompt=instruction", "data.fields={response: a}"], ["the prompt has no field 'response'", "instruction, input, output"]),
    (["data.prompt=chat", "data.fields={query: a}"], ["the prompt has no field 'query', it has messages"]),
    (["data.train=[]", "data.mixture=[{path: rows.jsonl, chat_template: x}]"], ["data.mixture.0.chat_template: 'x'", "'metamath'"]),
    (["data.train=[]", "data.mixture=[{path: rows.jsonl, prompt: text, drop_after_code: true}]"],
     ["data.mixture.0.drop_after_code: True", "'text'"]),
    (["data.train=[]", "data.mixture=[{path: rows.jsonl, revision: main}]"], ["data.mixture.0.revision: 'main'", "hub id"]),
    (["data.train_split=validation"], ["data.train_split: 'validation'", "rows.jsonl is a file", "remove it"]),
    (["data.eval=rows.jsonl", "data.eval_split=dev"], ["data.eval_split: 'dev'", "rows.jsonl is a file"]),
    (["model.tokenizer=world"], ["model.tokenizer: 'world' is for RWKV6", "remove it"]),
    (["model.revision=main"], ["model.revision: 'main' is for a hub id", "remove it"]),
    (["model.wkv=c"], ["model.wkv: 'c' is for RWKV6", "remove it"]),
    (["model.architecture=rwkv"], ["llama: is a directory, an RWKV6 model is a .pth or .safetensors file"]),
]
DATA_ALONE = ("data.template='{", "data.prompt=template", "data.fields", "data.prompt=instruction", "data.prompt=chat", "model.")


@pytest.mark.parametrize("overrides, says", COMBINATIONS, ids=lambda value: " ".join(value))
def test_a_combination(refuse, overrides, says):
    """Those that take the data or the model to be seen are seen by `data` too, which needs no ranks."""
    message = refuse(["data" if overrides[0].startswith(DATA_ALONE) else "train", "run.yaml", *overrides])
    assert all(part in message for part in says), message


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghijk", "bcdefghijkl"))
# What is put behind a good file of three lines.
YAML = {
    "an alias of nothing": ("train: *a\n", ["line 4", "'a'"]),
    "an alias of gigabytes as a value": (LAUGHS + "train: {steps: *l}\n", ["train.steps: [[[[", "more)"]),
    "an alias of gigabytes as a choice": (LAUGHS + "adapter: {method: *l}\n", ["adapter.method: [[[[", "is not one of"]),
    "an alias of gigabytes as a section": (LAUGHS + "train: *l\n", ["train: [[[[", "is no section"]),
    "a merge key": ("base: &base {seed: 1}\ntrain: {<<: *base}\n", ["line 5", "<<", "write the fields out"]),
    "no truth value": ("train: {keep_best: !!bool maybe}\n", ["line 4", "'maybe' is no bool"]),
    "no day": ("train: {steps: 2024-02-30}\n", ["line 4", "'2024-02-30' is no timestamp", "quotes"]),
    "no time": ("train: {seed: !!timestamp soon}\n", ["'soon' is no timestamp"]),
    "a time": ("train: {seed: 2024-01-01T00:00:00+02:00}\n", ["train.seed: datetime.datetime(2024", "give a whole number"]),
    "an empty number": ("train: {seed: !!int ''}\n", ["'' is no int"]),
    "a number of words": ("train: {learning_rate: !!float much}\n", ["'much' is no float"]),
    "a number of 5,000 digits": ("train: {seed: " + "9" * 5000 + "}\n", ["line 4", "is no int"]),
    "binary that is none": ("train: {seed: !!binary ö}\n", ["line 4"]),
    "a tag of its own": ("train: !bone {seed: 1}\n", ["line 4", "!bone"]),
    "nested too deeply": ("train: " + "[" * 1200 + "\n", ["run.yaml: "]),
    "a set": ("train: !!set {seed}\n", ["train", "no section"]),
    "a key of several words": ("? [a, b]\n: 5\n", ["line 4", "['a', 'b']", "no text"]),
    "a section twice, once in quotes": ('"data": {train: a}\n', ["line 4", "'data' stands twice"]),
    "a reserved character": ("train: {seed: @5}\n", ["line 4", "'@'"]),
    "a colon in a value": ("train: seed: 5\n", ["line 4", "mapping values are not allowed"]),
    "a closing bracket too many": ("train: {seed: 5}}\n", ["line 4", "'}'"]),
    "a text that is never closed": ("train: {seed: '5}\n", ["line "]),
    "an escape that is none": ('train: {schedule: "C:\\data"}\n', ["line 4", "escape"]),
    "a list of sections": ("- train: {seed: 5}\n", ["line 4"]),
    "a section of text": ("train: |\n  seed: 5\n", ["train: 'seed: 5\\n': is no section"]),
    "an empty list for a section": ("train: []\n", ["train: []: is no section"]),
}
FILES_OF_YAML = {
    "a directive of another version": ("%YAML 3.0\n---\n" + RUN, ["line 1"]),
    "Latin-1": ("# für\n".encode("latin-1"), ["no UTF-8 text (byte 3)"]),
    "UTF-16 without a mark": (RUN.encode("utf-16-le"), ["#x0000"]),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["no UTF-8 text (byte 0)"]),
    "a model": (b"PK\x03\x04\0\0\x08", ["run.yaml: "]),
    "JSON lines": (GOOD * 2, ["line 2"]),
    "a dangling link": (link_to("gone.yaml"), ["can't be read: No such file"]),
    "a link to itself": (link_to("run.yaml"), ["can't be read: Too many levels of symbolic links"]),
    "one word": ("rwkv", ["holds 'rwkv'", "sections like model:"]),
    "a number": ("64", ["holds 64"]),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(refuse, case):
    text, says = YAML[case]
    message = refuse(["train", "run.yaml"], {"run.yaml": "model: {path: m}\ndata: {train: rows.jsonl}\noutput: {directory: run}\n" + text})
    assert "run.yaml: " in message and all(part in message for part in says), message


@pytest.mark.parametrize("case", FILES_OF_YAML)
def test_a_file_that_is_no_config(refuse, case):
    content, says = FILES_OF_YAML[case]
    message = refuse(["config", "run.yaml"], {"run.yaml": content})
    assert "run.yaml: " in message and all(part in message for part in says), message


VALUES = ["!!bool x", "2024-02-30", "[" * 1200, "9" * 5000, "*a", "\x07", "{a: 1, a: 2}"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_an_override_that_is_no_yaml(refuse, value):
    message = refuse(["train", "run.yaml", f"train.seed={value}"])
    assert "override 'train.seed=" in message and "is no YAML value; quote it" in message, message


UNKNOWN = [
    (["train.learning-rate=1"], "train.learning-rate: is no such field; did you mean 'learning_rate'?"),
    (["Train.steps=1"], "Train: is no such field; did you mean 'train'?"), (["lora.rank=1"], "lora: is no such field; known are model"),
    (["adapter.dropout=0.1"], "adapter.dropout: is no such field"),
    (["data.mixture=[{path: a, max_length: 5}]"], "data.mixture.0.max_length: is no such field"),
    (["model.path.x=1"], "override 'model.path.x=1'"), (["output.overwrite=true"], "output.overwrite: is no such field"),
]


@pytest.mark.parametrize("overrides, says", UNKNOWN, ids=str)
def test_an_unknown_key(refuse, overrides, says):
    assert says in refuse(["train", "run.yaml", *overrides])


STAGE = {"zero_optimization": {"stage": 2}}
# The JSON's sections beside stage 2, or fields of zero_optimization, and what the message says.
DEEPSPEED = [
    ({"communication_data_type": "fp8"}, ["communication_data_type: 'fp8' is not fp32, bf16 or fp16"]),
    ({"communication_data_type": 16}, ["communication_data_type: 16 is not"]),
    ({"prescale_gradients": "yes"}, ["prescale_gradients: 'yes' is not true or false"]),
    ({"gradient_predivide_factor": 0}, ["gradient_predivide_factor: 0 is not a number above 0"]),
    ({"gradient_predivide_factor": "2"}, ["gradient_predivide_factor: '2' is not"]),
    ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown: 1 is not true or false"]),
    ({"data_types": {"grad_accum_dtype": "fp99"}}, ["data_types.grad_accum_dtype: 'fp99' is not fp32, bf16"]),
    ({"data_types": {"grad_accum_dtype": ["fp32"]}}, ["data_types.grad_accum_dtype: ['fp32'] is not"]),
    ({"data_types": {"grad_dtype": "fp32"}}, ["data_types.grad_dtype: is no field known here; known are grad_accum_dtype"]),
    ({"flops_profiler": True}, ["flops_profiler: is True; give an object"]),
    ({"flops_profiler": {"enabled": "true"}}, ["flops_profiler.enabled: 'true' is not true or false"]),
    ({"flops_profiler": {"enabled": True, "profile_step": 0}}, ["flops_profiler.profile_step: 0 is not a whole number from 1"]),
    ({"flops_profiler": {"enabled": True, "module_depth": 1.5}}, ["flops_profiler.module_depth: 1.5 is not"]),
    ({"bf16": True}, ["bf16: True", "model.dtype"]),
    ({"optimizer": {"params": {"lr": [1e-4] * 500}}}, ["optimizer.params.lr: [0.0001", "contradicts"]),
    ({"zero_optimization": {"stage": 2.0}}, ["zero_optimization.stage: is 2.0, not 0, 1, 2 or 3"]),
    ({"zero_optimization": {"stage": [2]}}, ["zero_optimization.stage: is [2], not"]),
    ({"zero_optimization": ["stage", 2] * 100}, ["zero_optimization: is ['stage', 2", "give an object"]),
    ({"reduce_bucket_size": 0}, ["zero_optimization.reduce_bucket_size: 0 is no whole number from 1 up"]),
    ({"reduce_bucket_size": 1.5}, ["zero_optimization.reduce_bucket_size: 1.5 is no whole number"]),
    ({"reduce_bucket_size": True}, ["zero_optimization.reduce_bucket_size: True is no whole number"]),
    ({"reduce_bucket_size": 10**30}, ["zero_optimization.reduce_bucket_size: 1000000000000", "is no whole number"]),
    ({"allgather_bucket_size": 4999}, ["zero_optimization.allgather_bucket_size: 4999 is odd"]),
    ({"allgather_bucket_size": 0}, ["zero_optimization.allgather_bucket_size: 0 is no whole number from 2 up"]),
    ({"overlap_comm": 1}, ["zero_optimization.overlap_comm: 1 is neither true nor false"]),
    ({"contiguous_gradients": "false"}, ["zero_optimization.contiguous_gradients: 'false' is neither true nor false"]),
    ({"stage3_prefetch_bucket_size": -5}, ["zero_optimization.stage3_prefetch_bucket_size: -5 is no whole number from 0 up"]),
    ({"zero_hpz_partition_size": 3}, ["zero_optimization.zero_hpz_partition_size: 3 does not divide the 2 ranks"]),
    ({"zero_hpz_partition_size": 0}, ["zero_optimization.zero_hpz_partition_size: 0 is no whole number from 1 up"]),
    ({"offload_optimizer": True}, ["zero_optimization.offload_optimizer: is True; give an object"]),
    ({"offload_optimizer": {"device": ["cpu"]}}, ["zero_optimization.offload_optimizer.device: ['cpu'] is neither cpu nor none"]),
]
TEXTS_OF_DEEPSPEED = {
    "a number beyond all": ('{"zero_optimization": {"stage": 2, "sub_group_size": 1e999}}', ["sub_group_size: inf is no whole number"]),
    "a number of 5,000 digits": ('{"zero_optimization": {"stage": ' + "1" * 5000 + "}}", ["is no JSON"]),
    "a comment": ('{"zero_optimization": {"stage": 2}} // of ours', ["is no JSON", "Extra data"]),
    "a comma too many": ('{"zero_optimization": {"stage": 2,}}', ["is no JSON"]),
    "a byte order mark": ('\ufeff{"zero_optimization": {"stage": 2}}', ["is no JSON", "BOM"]),
    "YAML": ("zero_optimization:\n  stage: 2\n", ["is no JSON"]),
    "null": ("null", ["holds None, not an object"]),
    "Latin-1": ('{"zero_optimization": {"stäge": 2}}'.encode("latin-1"), ["is no JSON"]),
}


@pytest.mark.parametrize("sections, says", DEEPSPEED, ids=lambda value: str(value)[:50])
def test_a_deepspeed_json(refuse, sections, says):
    top = any(name in ("bf16", "optimizer", "data_types", "flops_profiler", "communication_data_type", "prescale_gradients",
                       "gradient_predivide_factor", "wall_clock_breakdown", "zero_optimization") for name in sections)
    given = STAGE | sections if top else {"zero_optimization": {"stage": 2} | sections}
    message = refuse(["train", "run.yaml", "--ranks", "2", "deepspeed.config=ds.json"], {"ds.json": json.dumps(given)})
    assert "ds.json: " in message and all(part in message for part in says), message


@pytest.mark.parametrize("case", TEXTS_OF_DEEPSPEED)
def test_a_file_that_is_no_deepspeed_json(refuse, case):
    content, says = TEXTS_OF_DEEPSPEED[case]
    message = refuse(["train", "run.yaml", "--ranks", "2", "deepspeed.config=ds.json"], {"ds.json": content})
    assert "ds.json: " in message and all(part in message for part in says), message


def truncated(whole, size_bytes):
    """Writes all but the last so many bytes of what another writes."""
    def write(path):
        whole(path)
        path.write_bytes(path.read_bytes()[:-size_bytes])

    return write


def as_suffix(suffix, whole):
    """What another writes for that suffix, under this name."""
    def write(path):
        whole(path.with_suffix(suffix))
        path.with_suffix(suffix).rename(path)

    return write


QA = table(query=(["ab"] * 9,), response=(["cd"] * 9,))
FIELD = '{"query": %s, "response": "cd"}\n'
# The file, its content, further overrides, what the message says besides the file.
DATA = {
    "no number as a text": ("a.jsonl", FIELD % "NaN", [], [":1", "'query' is NaN, a number"]),
    "a number of 5,000 digits": ("a.jsonl", GOOD + FIELD % ("7" * 5000), [], [":2", "digits"]),
    "a comment": ("a.jsonl", GOOD + "// two\n", [], [":2", "not JSON", "// two"]),
    "a comma behind the object": ("a.jsonl", GOOD.strip() + ",\n" + GOOD, [], [":1", "Extra data"]),
    "UTF-16 without a mark": ("a.jsonl", GOOD.encode("utf-16-le"), [], [":1", "not JSON"]),
    "bytes of zero": ("a.jsonl", b"\0" * 100, [], [":1", "not JSON"]),
    "a packed file": ("a.jsonl", b"\x1f\x8b\x08\x00" + bytes(range(200)), [], [":1", "0x8b is not UTF-8"]),
    "half a pair in the answer": ("a.jsonl", '{"query": "a", "response": "b\\udc00"}\n', [], [":1", "'response' holds", "surrogate"]),
    "a line end in a text": ("a.jsonl", '{"query": "a\nb", "response": "c"}\n', [], [":1", "not JSON", "control character"]),
    "nothing but a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", [], ["holds no row"]),
    "another suffix in capitals": ("a.JSONL", GOOD, [], ["the suffix '.JSONL' is not supported"]),
    "a packed file by its name": ("a.jsonl.gz", GOOD, [], ["the suffix '.gz' is not supported", ".jsonl"]),
    "a dangling link": ("a.jsonl", link_to("gone.jsonl"), [], ["there is no such file"]),
    "a link to itself": ("a.jsonl", link_to("a.jsonl"), [], ["there is no such file"]),
    "a pipe": ("a.jsonl", os.mkfifo, [], ["is no regular file; copy it to one"]),
    "a directory in place of a file": ("a.jsonl/inside", GOOD, [], ["is a directory in which `datasets` finds no data set"]),
    "answers that are empty": ("a.jsonl", '{"query": "a", "response": " "}\n' * 5, [], ["no sample is left", "5 without a token"]),
    "every row too long": ("a.jsonl", GOOD * 5, ["data.max_length=8", "data.overlong=drop"], ["5 longer than data.max_length 8", "raise"]),
    "prompts that leave no room": ("a.jsonl", GOOD * 5, ["data.max_length=8"], ["no sample is left of 5 rows", "data.max_length 8"]),
    "the first rows too long": ("a.jsonl", FIELD % f'"{"a" * 199}"' * 2 + GOOD, ["data.overlong=drop", "data.train_samples=2"],
                                ["no sample is left of 2 rows", "2 longer"]),
    "a list in a list": ("a.json", f"[[{GOOD}]]", [], ["item 1", "is no object"]),
    "a list that is never closed": ("a.json", f"[{GOOD},", [], ["is not JSON", "one list of objects"]),
    "two lists": ("a.json", f"[{GOOD}][{GOOD}]", [], ["is not JSON: Extra data"]),
    "two names of nothing": ("a.csv", "query,response,,\na,b,c,d\n", [], [":1", "names '' twice"]),
    "a quote within a text": ("a.csv", 'query,response\n"a"b,c\n', [], [":2", "not CSV", "quote texts"]),
    "UTF-16 in CSV": ("a.csv", "query,response\na,b\n".encode("utf-16"), [], [":1", "0xff is not UTF-8"]),
    "tabs in CSV": ("a.csv", "query\tresponse\na\tb\n", [], [":2", "no field 'query'", "query\\tresponse"]),
    "a header of spaces": ("a.csv", "query, response\na,b\n", [], [":2", "no field 'response'", "did you mean ' response'?"]),
    "answers of nothing in CSV": ("a.csv", "query,response\na,\nb,\n", [], ["no sample is left of 2 rows", "2 without a token"]),
    "a table without rows": ("a.parquet", table(query=([], "string"), response=([], "string")), [], ["holds no row"]),
    "a table of no columns": ("a.arrow", table(a=([None] * 3,)), [], ["row 1", "no field 'query'", '"a"']),
    "objects in a table": ("a.parquet", table(query=([{"text": "a"}],), response=(["b"],)), [], ["row 1", "'query' is", "a object"]),
    "a choice of numbers in a table": ("a.arrow", table(query=([1, 2],), response=(["a", "b"],)), [], ["row 1", "'query' is 1, a number"]),
    "a null in a table": ("a.parquet", table(query=(["a", "b"],), response=(["c", None],)), [], ["row 2", "'response' is null"]),
    "a column that is there twice": ("a.parquet", table(query=(["a"],), query_=(["b"],), response=(["c"],)), [],
                                     ["the header names 'query' twice"]),
    "a day beyond Python's": ("a.parquet", table(other=([2**62], "int64"), response=(["b"],)), [], ["row 1", "no field 'query'"]),
    "a parquet file that is cut off": ("a.parquet", truncated(QA, 30), [], ["no whole .parquet file"]),
    "an arrow file that is cut off": ("a.arrow", truncated(QA, 200), [], ["no whole .arrow file"]),
    "an arrow file called parquet": ("a.parquet", as_suffix(".arrow", QA), [], ["no whole .parquet file"]),
    "a parquet file called arrow": ("a.arrow", as_suffix(".parquet", QA), [], ["no whole .arrow file"]),
    "a parquet file called jsonl": ("a.jsonl", as_suffix(".parquet", QA), [], [":1"]),
    "a text without a text": ("a.txt", " \n\t\n", ["data.prompt=text"], ["no sample is left of 1 rows"]),
    "a text that is a program": ("a.txt", b"\x7fELF\x02\x01\x01\0\xff\xfe", ["data.prompt=text"], [":1", "0xff is not UTF-8"]),
    "rows without a text": ("a.jsonl", GOOD, ["data.prompt=text"], [":1", "no field 'text'", '"query", "response"', "data.fields"]),
    "no conversation": ("a.jsonl", GOOD, ["data.prompt=chat"], [":1", "no field 'messages'"]),
    "a turn that is a text": ("a.jsonl", '{"messages": ["hi"]}\n', ["data.prompt=chat"], ["turn 1 of 'messages' is \"hi\"", "role and"]),
    "no chat template": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
                         ["data.prompt=chat"], ["data.prompt: chat: the tokenizer has no chat template", "data.chat_template"]),
    "a name for another column": ("a.jsonl", GOOD, ["data.fields={response: anwser}"], ["no field 'anwser'", "'response'"]),
}


@pytest.mark.parametrize("case", DATA)
def test_data(refuse, case):
    name, content, overrides, says = DATA[case]
    train = f"data.train={name.partition('/')[0]}"
    message = refuse(["data", "run.yaml", train, *overrides], {name: content})
    assert ("chat template" in message or name.partition("/")[0] in message) and all(part in message for part in says), message


STATE = '{"_data_files": [{"filename": %s}]}'
DIRECTORIES = {
    "a README that is no YAML": ({"set/README.md": "---\nconfigs: [\n---\n", "set/a.jsonl": GOOD}, [], ["set: ", "finds no data set"]),
    "a file of another kind alone": ({"set/notes.docx": b"PK"}, [], ["set: is a directory in which `datasets` finds no data set"]),
    "no such split": ({"set/train.jsonl": GOOD}, ["data.train_split=dev"], ["set: has no split 'dev'", "train"]),
    "no such subset": ({"set/train.jsonl": GOOD}, ["data.subset=sums"], ["set: ", "sums"]),
    "a held-out split that is not there": ({"set/train.jsonl": GOOD}, ["data.eval=set"], ["set: has no split 'test'", "data.eval_split"]),
    "a broken row in it": ({"set/train.jsonl": GOOD + "{"}, [], ["train.jsonl:2", "not JSON"]),
    "a list of splits that is none": ({"set/dataset_dict.json": "[]"}, [], ["dataset_dict.json: is not what save_to_disk"]),
    "a split that is not there": ({"set/dataset_dict.json": '{"splits": ["train"]}'}, [], ["train"]),
    "a file elsewhere": ({"set/state.json": STATE % '"../rows.arrow"', "rows.arrow": QA}, [], ['"../rows.arrow"', "not beside it"]),
    "a file by its whole path": ({"set/state.json": STATE % '"/etc/passwd"'}, [], ['"/etc/passwd"', "not beside it"]),
    "a file without a name": ({"set/state.json": '{"_data_files": [{}]}'}, [], ["None: there is no such file"]),
    "a state that is cut off": ({"set/state.json": '{"_data_files": [{"file'}, [], ["state.json: is not what save_to_disk"]),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_of_data(refuse, case):
    files, overrides, says = DIRECTORIES[case]
    message = refuse(["data", "run.yaml", "data.train=set", *overrides], files)
    assert all(part in message for part in says), message


def mixture(*entries):
    return ["data.train=[]", f"data.mixture=[{', '.join(entries)}]"]


SEVERAL = {
    "a weight for less than a sample": (mixture("{path: rows.jsonl, weight: 1000}", "{path: b.jsonl}"),
                                        ["data.mixture: b.jsonl: weight 1.0 is less than one of the 8 samples", "raise it"]),
    "a source of other columns": (mixture("rows.jsonl", "{path: b.jsonl, prompt: code}"), ["b.jsonl:1", "no field 'answer'"]),
    "a source that is gone": (mixture("rows.jsonl", "gone.jsonl"), ["data.mixture: gone.jsonl: there is no such file"]),
    "a source that is empty": (mixture("rows.jsonl", "none.jsonl"), ["none.jsonl: is empty"]),
    "a split of a file": (mixture("{path: rows.jsonl, split: dev}"), ["data.mixture.0.split: 'dev'", "rows.jsonl is a file"]),
    "held-out rows that are empty": (["data.eval=none.jsonl"], ["none.jsonl: is empty"]),
    "held-out rows that are gone": (["data.eval=[rows.jsonl, gone.jsonl]"], ["data.eval: gone.jsonl: there is no such file"]),
    "held-out rows of other columns": (["data.eval=other.jsonl"], ["other.jsonl:1", "no field 'query'"]),
    "held-out rows that are too long": (["data.eval=b.jsonl", "data.overlong=drop", "data.max_length=8"], ["no sample is left"]),
    "a user without a home": (["data.train=~no-such-user/a.jsonl"], ["data.train: ~no-such-user/a.jsonl: there is no such file"]),
    "a template file that is a directory": (["data.prompt=chat", "data.chat_template=deep.jinja"],
                                            ["data.chat_template: deep.jinja: can't be read: Is a directory"]),
    "a template file in Latin-1": (["data.prompt=chat", "data.chat_template=latin.jinja"], ["latin.jinja: is no UTF-8 text (byte 0)"]),
    "a corpus without its index": (["data.train=lone.bin", "data.prompt=text"], ["lone.idx: there is no such file beside lone.bin"]),
    "a corpus whose index is a text": (["data.train=text.bin", "data.prompt=text"], ["text.idx: is no binidx index"]),
    "a corpus of another prompt": (["data.train=text.bin"], ["text.bin", "need data.prompt: text"]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_sources(refuse, case):
    overrides, says = SEVERAL[case]
    message = refuse(["data", "run.yaml", *overrides], {
        "b.jsonl": GOOD * 4, "none.jsonl": b"", "other.jsonl": '{"text": "a"}\n', "latin.jinja": b"\xff", "deep.jinja/a": b"",
        "lone.bin": b"ab", "text.bin": b"ab", "text.idx": b"index of the corpus"})
    assert all(part in message for part in says), message


def new(layers=2, width=64, vocab=256, out="m.pth"):
    return ["rwkv", "--layers", str(layers), "--width", str(width), "--vocab", str(vocab), "--out", out]


# Arguments of a command, and what the message says.
COMMANDS = [
    (["train", "run.yaml", "--ranks", "-1"], ["--ranks: -1", "1 or more"]),
    (["train", "run.yaml", "--max-restarts", "-1"], ["--max-restarts: -1", "0 or more"]),
    (["train", "run.yaml", "--resume", "gone/step-1"], ["--resume: gone/step-1 is no checkpoint", "manifest.json"]),
    (["train", "run.yaml", "--resume", "~no-such-user/step-1"], ["--resume: ~no-such-user/step-1 is no checkpoint"]),
    (["train", "run.yaml", "--resume", "rows.jsonl"], ["--resume: rows.jsonl is no checkpoint"]),
    (["train", "run.yaml", "--resume", "output.directory=new"], ["--resume: new holds no run"]),
    (["train", "run.yaml", "output.directory=rows.jsonl"], ["output.directory: rows.jsonl is a file"]),
    (["train", "run.yaml", "output.directory=rows.jsonl/run"], ["output.directory: rows.jsonl/run", "no directory"]),
    (["train", "run.yaml", "output.directory=dangling"], ["output.directory: dangling is a link to what is not there, gone"]),
    (["train", "run.yaml", "output.directory=."], ["output.directory: . is not empty"]),
    (["train", "run.yaml", "output.directory=MADE/llama"], ["llama is not empty"]),
    (["train", "run.yaml", "model.path=~no-such-user/llama"], ["model.path: ~no-such-user/llama: there is no such file or directory"]),
    (["train", "run.yaml", "model.path=dangling.pth"], ["model.path: dangling.pth: there is no such file"]),
    (["train", "run.yaml", "deepspeed.config=~no-such-user/ds.json"], ["deepspeed.config: ~no-such-user/ds.json", "No such file"]),
    (["plan", "run.yaml", "--device-memory", ""], ["--device-memory: '' is no amount of memory"]),
    (["plan", "run.yaml", "--device-memory", "inf"], ["--device-memory: 'inf' is no amount"]),
    (["plan", "run.yaml", "--device-memory", "9" * 400 + "G"], ["--device-memory: '999", "is no amount"]),
    (["plan", "run.yaml", "--device-memory", "0.1"], ["--device-memory: '0.1' is no amount"]),
    (["plan", "run.yaml", "--device-memory", "1e3GiB"], ["--device-memory: '1e3GiB' is no amount"]),
    (["plan", "run.yaml", "--ranks", "0"], ["--ranks: 0"]),
    (["plan", "run.yaml", "--ranks", "3"], ["train.global_batch_size: 2", "3 ranks", "multiple of 3"]),
    (["plan", "run.yaml", "adapter.rank=12"], ["adapter.rank: 12 does not divide", "16, 8"]),
    (["plan", "run.yaml", "adapter.targets=[q_porj]"], ["adapter.targets", "'q_porj'", "did you mean 'q_proj'?"]),
    (["plan", "run.yaml", "adapter.layers=[0, 3]"], ["adapter.layers: [0, 3] goes past the model's 2 layers"]),
    (["plan", "run.yaml", "adapter.grouping=free", "adapter.groups=7"], ["adapter.groups: 7 does not divide"]),
    (["plan", "run.yaml", "adapter.grouping=miss", "adapter.rank=33"], ["adapter.rank: 33 is more than the inputs", "32"]),
    (["plan", "run.yaml", "adapter.rank=null", "adapter.parameters=3"], ["adapter.rank: None"]),
    (["plan", "run.yaml", "adapter.parameters=3"], ["adapter.parameters: 3 are too few", "rank 1 trains"]),
    (["plan", "run.yaml", "train.chunk_length=16"], ["train.chunk_length: 16 needs an architecture that carries a state"]),
    (["plan", "run.yaml", "train.recompute_modules=[attn]"], ["train.recompute_modules", "attn"]),
    (["plan", "run.yaml", "model.path=gone.gguf"], ["gone.gguf"]),
    (["data", "run.yaml", "--samples", "-5"], ["--samples: -5", "0 or more"]),
    (["data", "run.yaml", "model.path=rows.jsonl"], ["rows.jsonl"]),
    (["data", "run.yaml", "model.path=dangling.pth"], ["dangling.pth: there is no such file"]),
    (["data", "run.yaml", "model.path=MADE/rwkv.pth", "model.tokenizer=world"], ["model.tokenizer: 'world'", "256 tokens"]),
    (["data", "run.yaml", "model.path=MADE/rwkv.pth", "model.tokenizer=~no-such-user/v.txt"], ["v.txt: can't be read"]),
    (["profile", "run.yaml", "--out", "rows.jsonl"], ["--out: rows.jsonl exists already"]),
    (["profile", "run.yaml", "--turns", "-1"], ["--turns: -1 is too small"]),
    (["profile", "run.yaml", "--compare", ""], ["--compare ''", "has no name"]),
    (["profile", "run.yaml", "--compare", "a: train.seed=2024-02-30"], ["--compare 'a'", "is no YAML value"]),
    (["profile", "run.yaml", "--compare", "a: adapter.rank=8.5"], ["--compare 'a': adapter.rank: 8.5"]),
    (["merge", "MADE/llama", "--out", "m"], ["llama: is a directory; name its adapter.safetensors"]),
    (["merge", "MADE/llama/model.safetensors", "--out", "m"], ["model.safetensors: has no 'bone_ds' header"]),
    (["merge", "MADE/rwkv.pth", "--out", "m"], ["rwkv.pth: is no safetensors file"]),
    (["merge", "~no-such-user/a.safetensors", "--out", "m"], ["~no-such-user/a.safetensors: no such adapter file"]),
    (["merge", "dangling", "--out", "m"], ["dangling: no such adapter file"]),
    (["merge", "MADE/row.safetensors", "--out", ""], ["--out: . exists already"]),
    (["merge", "MADE/row.safetensors", "--out", "m", "--base", ""], ["model.path: '': is empty"]),
    (["merge", "MADE/row.safetensors", "--out", "m", "--base", "MADE/rwkv.pth"], ["rwkv.pth"]),
    (["merge", "MADE/row.safetensors", "--out", "m", "--base", "~no-such-user/llama"], ["~no-such-user/llama: there is no such file"]),
    (["merge", "MADE/row.safetensors", "--out", "m", "--cache-dir", ""], ["model.cache_dir: '': is empty"]),
    (["export", "MADE/llama", "--to", "peft", "--out", "m"], ["llama: is a directory; name its adapter.safetensors"]),
    (["export", "MADE/other.safetensors", "--to", "peft", "--out", "m"], ["other.safetensors: has no 'bone_ds' header"]),
    (["export", "MADE/lora.safetensors", "--to", "bone-model", "--out", "m"], ["lora.safetensors: is lora"]),
    (["export", "MADE/row.safetensors", "--to", "rwkv-peft", "--out", "m.pth"], ["is a llama adapter", "RWKV6"]),
    (["export", "MADE/row.safetensors", "--to", "rwkv-peft", "--out", "m"], ["--out: m", ".pth"]),
    (["export", "MADE/row.safetensors", "--to", "bone-model", "--out", "rows.jsonl"], ["--out: rows.jsonl exists already"]),
    (["import", "MADE/llama", "--from", "rwkv-peft", "--base", "MADE/rwkv.pth", "--out", "m"], ["llama: is a directory, give a .pth file"]),
    (["import", "MADE/rwkv.pth", "--from", "rwkv-peft", "--base", "MADE/rwkv.pth", "--out", "m"], ["rwkv.pth: ", "a model"]),
    (["import", "MADE/rwkv.pth", "--from", "peft", "--base", "MADE/llama", "--out", "m"], ["rwkv.pth: holds no adapter_config.json"]),
    (["import", "MADE/llama", "--from", "peft", "--base", "MADE/llama", "--out", "m"], ["llama: holds no adapter_config.json"]),
    (["import", "theirs", "--from", "peft", "--base", "", "--out", "m"], ["model.path: '': is empty"]),
    (["import", "theirs", "--from", "peft", "--base", "gone/model/here", "--out", "m"], ["gone/model/here"]),
    (["inspect", "gone.pth"], ["gone.pth: there is no such file or directory"]),
    (["inspect", "~no-such-user/run"], ["~no-such-user/run: there is no such file or directory"]),
    (["inspect", "dangling"], ["dangling: there is no such file or directory"]),
    (["inspect", "rows.jsonl"], ["rows.jsonl: is none of the files that are looked for"]),
    (["inspect", "empty"], ["empty: is none of the directories that are looked for"]),
    (["inspect", "text.gguf"], ["text.gguf"]),
    (["inspect", "text.pth"], ["text.pth: is no PyTorch file"]),
    (["inspect", "text.safetensors"], ["text.safetensors: is no safetensors file"]),
    (["inspect", "MADE/other.safetensors"], ["other.safetensors"]),
    (["inspect", "checkpoint"], ["manifest.json: is damaged"]),
    (["generate", "", "--prompt", "a"], ["model.path: '': is empty"]),
    (["generate", "gone.pth", "--prompt", "a"], ["gone.pth: there is no such file"]),
    (["generate", "~no-such-user/llama/x", "--prompt", "a"], ["~no-such-user/llama/x"]),
    (["generate", "empty", "--prompt", "a"], ["empty"]),
    (["generate", "rows.jsonl", "--prompt", "a"], ["rows.jsonl: is neither a model directory nor a .gguf file"]),
    (["generate", "text.gguf", "--prompt", "a", "--cache-dir", "cache"], ["text.gguf"]),
    (["generate", "MADE/llama", "--prompt", "a", "--tokenizer", "world"], ["model.tokenizer: 'world' is for RWKV6"]),
    (["generate", "MADE/llama", "--prompt", "a", "--tokenizer", ""], ["model.tokenizer: '': is empty"]),
    (["generate", "MADE/llama", "--prompt", "a", "--wkv", "c"], ["model.wkv: 'c' is for RWKV6"]),
    (["generate", "MADE/llama", "--prompt", "a", "--cache-dir", ""], ["model.cache_dir: '': is empty"]),
    (["generate", "MADE/llama", "--prompt", "a", "--adapter", "MADE/llama"], ["llama: is a directory; name its adapter.safetensors"]),
    (["generate", "MADE/llama", "--prompt", "a", "--adapter", "MADE/other.safetensors"], ["other.safetensors: has no 'bone_ds' header"]),
    (["generate", "MADE/rwkv.pth", "--prompt", "a", "--adapter", "MADE/row.safetensors"], ["is an adapter for llama", "is a rwkv model"]),
    (["generate", "MADE/llama", "--prompt", "a", "--temperature", "nan"], ["--temperature: nan"]),
    (["generate", "MADE/llama", "--prompt", "a", "--temperature", "-1"], ["--temperature: -1.0"]),
    (["generate", "MADE/llama", "--prompt", "a", "--do-sample", "--top-p", "nan"], ["--top-p: nan is no share"]),
    (["generate", "MADE/llama", "--prompt", "a", "--repetition-penalty", "inf"], ["--repetition-penalty: inf is no factor"]),
    (["generate", "MADE/llama", "--prompt", "a", "--repetition-penalty", "1e-300"], ["--repetition-penalty: 1e-300 is no factor"]),
    (["generate", "MADE/llama", "--prompt", "a", "--max-new-tokens", "-1"], ["--max-new-tokens: -1 is too small"]),
    (["generate", "MADE/llama", "--prompt", "a", "--do-sample", "--seed", str(2**63)], ["--seed: 9223372036854775808 is out of range"]),
    (["generate", "MADE/llama", "--prompts", "empty"], ["--prompts: empty: can't be read: Is a directory"]),
    (["generate", "MADE/llama", "--prompts", "deep.jsonl"], ["deep.jsonl:1: is no JSON"]),
    (["generate", "MADE/llama", "--prompts", "list.jsonl"], ["list.jsonl:1: holds", "[1]"]),
    (["generate", "MADE/llama", "--prompt", "a", "--out", "empty"], ["--out: empty exists already"]),
    (["generate", "MADE/llama", "--prompt", "a", "--ranks", "-2"], ["--ranks: -2 is too small"]),
    (["init", *new(layers=10**9)], ["the layers of a new model is 1000000000, it may be 1024 at most"]),
    (["init", *new(width=0)], ["the width of a new model is 0, it must be at least 1"]),
    (["init", *new(vocab=2**40)], ["the vocabulary of a new model is 1099511627776, it may be 1048576 at most"]),
    (["init", *new(), "--head-size", "-8"], ["the head size of a new model is -8"]),
    (["init", *new(out="empty")], ["empty: a new model is written as .pth"]),
    (["init", *new(out="rows.jsonl/m.pth")], ["rows.jsonl"]),
    (["config", "empty"], ["empty: can't be read: Is a directory"]),
    (["config", "run.yaml", "train.steps"], ["override 'train.steps': write section.key=value"]),
]


@pytest.mark.parametrize("arguments, says", COMMANDS, ids=lambda value: " ".join(value)[:80])
def test_a_command(refuse, arguments, says):
    message = refuse(arguments, {
        "dangling": link_to("gone"), "dangling.pth": link_to("gone.pth"), "empty": lambda path: path.mkdir(), "text.gguf": "a text",
        "text.pth": "a text", "text.safetensors": "a text", "deep.jsonl": "[" * 100_000, "list.jsonl": "[1]\n",
        "theirs/adapter_config.json": '{"peft_type": "MISS", "r": 8}',
        "theirs/adapter_model.safetensors": lambda path: save_file({"base_model.model.a.miss_block": torch.ones(8, 32)}, path),
        "checkpoint/manifest.json": "{}", "checkpoint/state.safetensors": "a text"})
    assert all(part in message for part in says), message


USAGE = [
    ["train", "run.yaml", "--ranks", "2.5"], ["train", "run.yaml", "--max-restarts", "many"], ["plan", "run.yaml", "--device", "tpu"],
    ["plan", "run.yaml", "--ranks", ""], ["data", "run.yaml", "--samples", "1e3"], ["data", "run.yaml", "--colour", "red"],
    ["profile", "run.yaml", "--steps", "nan"], ["merge", "a.safetensors"], ["export", "a.safetensors", "--to", "gguf", "--out", "m"],
    ["export", "a.safetensors", "--to", "peft", "--dtype", "fp16", "--out", "m"],
    ["import", "a", "--from", "trl", "--base", "b", "--out", "m"],
    ["inspect"], ["generate", "m", "--top-k", "few"], ["generate", "m", "--max-new-tokens", "1.5"], ["generate", "m", "--seed", "0x"],
    ["init", "rwkv", "--layers", "two", "--width", "1", "--vocab", "1", "--out", "m.pth"], ["config", "run.yaml", "--json"],
    ["train", "run.yaml", "--ressume"], ["data", "--samples"], ["merge", "a", "b", "--out", "c"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage(tmp_path, monkeypatch, capsys, arguments):
    """What argparse refuses: its usage, and a last line that names the argument."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    output = capsys.readouterr()
    last = output.err.splitlines()[-1]
    assert (end.value.code, output.out, list(tmp_path.iterdir())) == (2, "", [])
    assert last.startswith("bone-ds") and ": error: " in last
    assert any(word in last for word in arguments) or "required" in last, last


# What takes a rank to see: overrides of a tiny run, and what the message says.
IN_A_RANK = [
    (["adapter.rank=12"], ["adapter.rank: 12 does not divide", "16, 8, 4, 2"]),
    (["adapter.rank=4", "adapter.parameters=100000"], ["adapter.rank: 4 is given beside adapter.parameters: 100000", "remove one"]),
    (["adapter.layers=[1, 5]"], ["adapter.layers: [1, 5] goes past the model's 2 layers"]),
    (["adapter.targets=[attn]"], ["adapter.targets", "'attn'", "choose among q_proj"]),
    (["adapter.grouping=free", "adapter.groups=3"], ["adapter.groups: 3 does not divide"]),
    (["train.chunk_length=16"], ["train.chunk_length: 16", "llama has none", "remove it"]),
    (["train.steps=null", "train.epochs=1", "train.warmup_steps=90"], ["train.warmup_steps: 90 is more than the run's"]),
    (["train.steps=null", "train.epochs=1", "train.schedule=cosine_restarts"], ["train.cycles: 2 in the", "give fewer, or more steps"]),
    (["train.recompute_modules=[attention]"], ["train.recompute_modules", "attention"]),
    (["data.max_length=8", "data.overlong=drop"], ["rows.jsonl: no sample is left of 4 rows"]),
    (mixture("{path: rows.jsonl, weight: 1e9}", "{path: b.jsonl}"), ["data.mixture: b.jsonl: weight 1.0"]),
    (["data.train=broken.jsonl"], ["broken.jsonl:3", "not JSON"]),
    (["data.eval=broken.jsonl"], ["broken.jsonl:3", "not JSON"]),
    (["model.path=MADE/other.safetensors"], ["other.safetensors"]),
    (["deepspeed.config=zero3", "--ranks", "5"], ["--ranks: 5, but the launcher started 1"]),
    (["--max-restarts", "2"], ["--max-restarts: 2", "without another launcher"]),
    (["--resume"], ["--resume: run holds no run"]),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch and deepspeed
@pytest.mark.parametrize("overrides, says", IN_A_RANK, ids=lambda value: " ".join(value))
def test_in_a_rank(refuse, alone, overrides, says):
    message = refuse(["train", "run.yaml", *overrides], {"b.jsonl": GOOD * 4, "broken.jsonl": GOOD * 2 + "{"})
    assert all(part in message for part in says), message


def test_there_are_hundreds_and_few_are_unknown_keys(capsys):
    counts = Counter({
        "fields": len(FIELDS), "combinations": len(COMBINATIONS), "YAML": len(YAML) + len(FILES_OF_YAML) + len(VALUES),
        "unknown keys": len(UNKNOWN),
        "DeepSpeed JSON": len(DEEPSPEED) + len(TEXTS_OF_DEEPSPEED), "data": len(DATA) + len(DIRECTORIES) + len(SEVERAL),
        "arguments": len(COMMANDS) + len(USAGE), "in a rank": len(IN_A_RANK)})
    with capsys.disabled():
        print(f" {counts.total()} bad inputs: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}")
    assert counts.total() >= 300 and counts["unknown keys"] <= counts.total() / 5
