"""Each way a config can be wrong ends in exit code 2 and a message of at most two lines that names the field and the value."""

import pytest

from bone_ds.cli import main

GOOD = "model: {path: m}\ndata: {train: train.jsonl}\noutput: {directory: RUN}\n"


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs `train` on a config, which must be refused: text, overrides -> the message."""

    def run(config: str | bytes, *overrides: str) -> str:
        path = tmp_path / "run.yaml"
        directory = tmp_path / "out"
        data = config.encode() if isinstance(config, str) else config
        path.write_bytes(data.replace(b"RUN", str(directory).encode()))
        assert main(["train", str(path), *overrides]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.endswith("\n")
        message = output.err[:-1]
        assert message.startswith("bone-ds: ") and message.count("\n") < 2 and "Traceback" not in message
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]
        return message

    return run


# field, value as YAML, what the message says besides the field
WRONG_TYPES = [
    ("train.steps", "ten", "'ten': give a whole number"),
    ("train.steps", "1.5", "1.5: give a whole number"),
    ("train.steps", "true", "True: give a whole number"),
    ("train.steps", "'5'", "'5': give a whole number"),
    ("train.steps", "[1]", "[1]: give a whole number"),
    ("train.learning_rate", "fast", "'fast': give a number"),
    ("train.learning_rate", "true", "True: give a number"),
    ("train.learning_rate", ".nan", "nan: input should be a finite number"),
    ("train.learning_rate", ".inf", "inf: input should be a finite number"),
    ("train.eps", "1e400", "inf: input should be a finite number"),
    ("data.packing", "1", "1: give true or false"),
    ("data.packing", "'yes'", "'yes': give true or false"),
    ("data.train", "5", "5: give a list"),
    ("data.train", "{a: b}", "{'a': 'b'}: give a list"),
    ("data.train.1", "[a, 5]", "5: give text"),
    ("data.fields", "[a]", "['a']: give pairs"),
    ("data.fields.a", "{a: 1}", "1: give text"),
    ("model.path", "2020-01-01", "datetime.date(2020, 1, 1): give text, in quotes"),
    ("model.path", "null", "None: give text"),
    ("model.dtype", "on", "True is not one of 'bf16' or 'fp32'"),
    ("adapter.targets", "5", "5: give a list"),
    ("adapter.parameters", "33M", "'33M': give a whole number"),
    ("train.recompute_modules", "5", "5: give a list"),
    ("data.mixture", "5", "5: give a list"),
    ("data.mixture.0.weight", "[{path: a, weight: much}]", "'much': give a number"),
    ("data.mixture.1.samples", "[a, {path: b, samples: 0}]", "0: input should be greater than or equal to 1"),
    ("data.mixture.0.path", "[{weight: 2}]", "is missing"),
    ("data.mixture.0.wieght", "[{path: a, wieght: 2}]", "is no such field; did you mean 'weight'?"),
    ("data.mixture.0", "[[a]]", "['a']: is no section"),
    ("adapter.layers", "3", "3: give a list"),
    ("adapter.layers.1", "[0, a]", "'a': give a whole number"),
    ("adapter.layers", "[0]", "[0]: the list has too few items"),
    ("adapter.layers", "[0, 1, 2]", "[0, 1, 2]: the list has too many items"),
]


@pytest.mark.parametrize("field, value, says", WRONG_TYPES, ids=lambda value: value if isinstance(value, str) else None)
def test_wrong_type(refuse, field, value, says):
    section, name = field.split(".")[:2]
    message = refuse(GOOD, f"{section}.{name}={value}")
    assert says in message
    assert f"run.yaml: {field}: " in message


OUT_OF_RANGE = [
    ("adapter.rank", "0"), ("adapter.rank", "-4"), ("adapter.alpha", "0.0"), ("data.train_samples", "0"), ("data.max_length", "7"),
    ("train.steps", "0"), ("train.epochs", "0"), ("train.global_batch_size", "0"), ("train.micro_batch_size", "-1"),
    ("train.learning_rate", "0.0"), ("train.warmup_steps", "-1"), ("train.final_lr_ratio", "1.5"), ("train.weight_decay", "-0.1"),
    ("train.beta1", "1.0"), ("train.beta2", "-0.5"), ("train.eps", "0.0"), ("train.max_grad_norm", "-1.0"), ("train.loss_chunk", "0"),
    ("train.chunk_length", "8"), ("train.l2wrap", "-0.1"), ("model.tokenizer", "''"),
    ("train.seed", "-1"), ("train.eval_every", "-1"), ("train.save_every", "-1"), ("train.keep_checkpoints", "0"),
    ("adapter.groups", "0"),
    ("adapter.parameters", "0"), ("train.recompute_every", "0"), ("data.train", "[]"), ("output.directory", "''"), ("model.path", "''"),
]


@pytest.mark.parametrize("field, value", OUT_OF_RANGE)
def test_out_of_range(refuse, field, value):
    message = refuse(GOOD, f"{field}={value}")
    assert f"run.yaml: {field}: {value}" in message


CHOICES = [
    ("model.dtype", "fp16", "did you mean 'bf16'?"), ("adapter.method", "lorra", "did you mean 'lora'?"),
    ("adapter.grouping", "column", "did you mean 'col'?"), ("adapter.strategy", "magic", "'factored'"),
    ("data.prompt", "templte", "did you mean 'template'?"), ("data.prompt", "shat", "did you mean 'chat'?"),
    ("data.overlong", "cut", "'truncate', 'drop' or 'split'"),
    ("train.schedule", "cosin", "did you mean 'cosine'?"), ("train.activation_checkpointing", "full", "'layer' or 'bone+layer'"),
    ("train.activation_checkpointing", "bone+layers", "did you mean 'bone+layer'?"), ("adapter.grouping", "lfet", "did you mean 'left'?"),
    ("model.architecture", "lama", "did you mean 'llama'?"), ("model.architecture", "rwkv7", "did you mean 'rwkv'?"),
    ("adapter.form", "hadamar", "did you mean 'hadamard'?"), ("adapter.grouping", "mis", "did you mean 'miss'?"),
    ("model.wkv", "cuda", "'chunked'"), ("adapter.method", "stat", "did you mean 'state'?"),
]


@pytest.mark.parametrize("field, value, says", CHOICES)
def test_unknown_choice(refuse, field, value, says):
    message = refuse(GOOD, f"{field}={value}")
    assert f"{field}: {value!r} is not one of" in message and says in message


CONFLICTS = [
    (["adapter.method=lora", "adapter.grouping=col"], ["adapter.grouping", "'col'"]),
    (["adapter.method=lora", "adapter.strategy=fused"], ["adapter.strategy", "'fused'"]),
    (["adapter.method=lora", "train.activation_checkpointing=bone"], ["train.activation_checkpointing", "'bone'", "'lora'"]),
    (["adapter.alpha=16"], ["adapter.alpha", "16"]),
    (["adapter.method=state", "adapter.rank=64"], ["adapter.rank", "64", "state"]),
    (["adapter.method=state", "adapter.targets=[att.key]"], ["adapter.targets", "['att.key']", "state"]),
    (["adapter.method=full", "adapter.layers=[0, 1]"], ["adapter.layers", "[0, 1]", "full"]),
    (["adapter.method=full", "train.activation_checkpointing=bone"], ["train.activation_checkpointing", "'bone'", "'full'"]),
    (["train.chunk_length=512"], ["train.chunk_length: 512", "data.max_length: 512"]),
    (["data.overlong=split"], ["data.overlong", "'split'", "'metamath'"]),
    (["adapter.grouping=col", "adapter.strategy=factored"], ["adapter.strategy", "'factored'", "'col'"]),
    (["adapter.grouping=left", "adapter.strategy=fused"], ["adapter.strategy", "'fused'", "'left'"]),
    (["adapter.grouping=miss", "adapter.strategy=fused"], ["adapter.strategy", "'fused'", "'miss'"]),
    (["adapter.form=hadamard", "adapter.strategy=factored"], ["adapter.strategy", "'factored'", "hadamard"]),
    (["adapter.grouping=left", "adapter.form=hadamard"], ["adapter.form", "'hadamard'", "'left'"]),
    (["adapter.grouping=miss", "adapter.form=unconstrained"], ["adapter.form", "'unconstrained'", "'miss'"]),
    (["adapter.grouping=free"], ["adapter.groups", "missing"]),
    (["adapter.groups=4"], ["adapter.groups: 4", "'row'"]),
    (["adapter.method=lora", "adapter.form=hadamard"], ["adapter.form", "'hadamard'", "lora"]),
    (["adapter.method=full", "adapter.groups=4"], ["adapter.groups", "4", "full"]),
    (["adapter.method=lora", "train.activation_checkpointing=bone+layer"], ["train.activation_checkpointing", "'bone+layer'", "'lora'"]),
    (["train.activation_checkpointing=none", "train.recompute_every=2"], ["train.recompute_every: 2", "checkpointing: 'none'"]),
    (["train.activation_checkpointing=bone", "train.recompute_modules=mlp"], ["train.recompute_modules: ['mlp']", "checkpointing: 'bone'"]),
    (["train.keep_best=true"], ["train.keep_best: True", "data.eval"]),
    (["train.keep_best=true", "data.eval=e.jsonl", "train.eval_every=0"], ["train.keep_best: True", "train.eval_every"]),
    (["train.keep_best=true", "data.eval=e.jsonl", "train.save_every=70"], ["train.save_every: 70", "train.eval_every: 50"]),
    (["train.recompute_modules=[]"], ["train.recompute_modules", "[]"]),
    (["train.recompute_modules=[mlp, mlp]"], ["train.recompute_modules", "['mlp', 'mlp']"]),
    (["adapter.method=full", "adapter.parameters=5"], ["adapter.parameters", "5", "full"]),
    (["adapter.targets=[]"], ["adapter.targets", "[]"]),
    (["adapter.targets=[q_proj, q_proj]"], ["adapter.targets", "['q_proj', 'q_proj']"]),
    (["adapter.layers=[2, 1]"], ["adapter.layers", "[2, 1]"]),
    (["adapter.layers=[-1, 1]"], ["adapter.layers", "[-1, 1]"]),
    (["data.prompt=template"], ["data.template", "missing"]),
    (["data.prompt=template", "data.template='{a}'"], ["data.completion", "missing"]),
    (["data.template='{a}'"], ["data.template", "'{a}'", "'metamath'"]),
    (["data.mixture=[a.jsonl]"], ["data.train: ['train.jsonl']", "data.mixture", "keep one"]),
    (["data.train=[]", "data.mixture=[a.jsonl]", "data.train_samples=5"], ["data.train_samples: 5", "data.mixture"]),
    (["data.train=[]", "data.mixture=[{path: a, template: '{a}'}]"], ["data.mixture.0.template", "'{a}'", "'metamath'"]),
    (["data.train=[]", "data.mixture=[{path: a, prompt: template}]"], ["data.mixture.0.template", "missing"]),
    (["data.chat_template=x"], ["data.chat_template: 'x'", "'metamath'"]),
    (["data.prompt=chat", "data.drop_after_code=true"], ["data.drop_after_code", "'chat'"]),
    (["data.prompt=chat", "data.overlong=split"], ["data.overlong", "'split'", "'chat'"]),
    (["data.eval_samples=5"], ["data.eval_samples", "5", "data.eval"]),
    (["train.steps=5", "train.epochs=2"], ["train.steps: 5", "train.epochs: 2"]),
    (["train.steps=5", "train.warmup_steps=6"], ["train.warmup_steps: 6", "train.steps: 5"]),
    (["train.global_batch_size=6", "train.micro_batch_size=4"], ["train.global_batch_size: 6", "train.micro_batch_size: 4"]),
    (["train.schedule=constant", "train.final_lr_ratio=0.1"], ["train.final_lr_ratio: 0.1", "constant"]),
    (["train.max_skipped=3"], ["train.max_skipped: 3", "on_nan", "'stop'"]),
    (["--ranks", "3"], ["train.global_batch_size: 8", "3 ranks", "multiple of 3"]),
    (["--ranks", "0"], ["--ranks: 0", "1 or more"]),
]


@pytest.mark.parametrize("arguments, says", CONFLICTS, ids=lambda value: " ".join(value))
def test_conflict(refuse, tmp_path, arguments, says):
    if "--ranks" in arguments:  # found last, once the data is there
        arguments = [*arguments, f"data.train={__file__}"]
    message = refuse(GOOD, *arguments)
    assert all(part in message for part in says), message


MALFORMED = {
    "unknown section": (GOOD + "trian: {steps: 1}", ["trian", "did you mean 'train'?"]),
    "unknown field": (GOOD + "train: {stepz: 1}", ["train.stepz", "did you mean 'steps'?"]),
    "field of another section": (GOOD + "train: {rank: 8}", ["train.rank", "known are steps"]),
    "missing field": ("model: {path: m}\noutput: {directory: RUN}\n", ["data", "missing"]),
    "missing fields": ("model: {dtype: fp32}\n", ["model.path", "missing", "Hugging Face directory"]),
    "section without fields": ("model:\n" + GOOD.split("\n", 1)[1], ["model.path", "missing"]),
    "a section that is a number": (GOOD + "train: 5", ["train: 5", "no section"]),
    "a section that is a list": (GOOD + "train: [steps]", ["train: ['steps']", "no section"]),
    "empty": ("", ["is empty"]),
    "only comments": ("# model:\n", ["is empty"]),
    "a text": ("model", ["holds 'model'", "sections like model:"]),
    "a list": ("- model\n- data\n", ["['model', 'data']", "sections like model:"]),
    "tab": ("model:\n\tpath: m\n", ["line 2", "'\\t'"]),
    "bad indent": ("model:\n  path: m\n dtype: bf16\n", ["line 3"]),
    "open bracket": ("model: {path: m\n", ["line 2"]),
    "section twice": (GOOD + "model: {path: n}\n", ["line 4", "'model'", "twice"]),
    "field twice": (GOOD + "train: {seed: 1, seed: 2}\n", ["line 4", "'seed'", "twice"]),
    "field that is no text": (GOOD + "3: {seed: 1}\n", ["line 4", "3", "no text"]),
    "column that is no text": (GOOD.replace("}\noutput", ", fields: {1: a}}\noutput"), ["line 2", "1", "no text"]),
    "two documents": (GOOD + "---\n" + GOOD, ["line 4", "document"]),
    "a value that holds itself": (GOOD + "train: &a {steps: *a}\n", ["line 4", "recursive"]),
    "python object": (GOOD + "train: !!python/object/apply:os.getcwd []\n", ["line 4", "python"]),
    "not UTF-8": (GOOD.encode("utf-16"), ["UTF-8", "byte 0"]),
    "control character": (GOOD.encode() + b"train: {seed: \x00}", ["#x0000"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(refuse, case):
    config, says = MALFORMED[case]
    message = refuse(config)
    assert "run.yaml: " in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize("override", [
    "train=5", "steps=5", "=5", "train.steps", "train.=5", ".steps=5", "train.steps.more=5", "train.steps=[", ""])
def test_malformed_override(refuse, override):
    assert f"override {override!r}" in refuse(GOOD, override)


def test_override_of_a_section_that_is_no_section(refuse):
    assert "override 'train.steps=5': the file's train: is 5" in refuse(GOOD + "train: 5", "train.steps=5")


@pytest.mark.parametrize("name, says", [("absent.yaml", "No such file"), (".", "Is a directory")])
def test_no_config_file(tmp_path, capsys, name, says):
    path = tmp_path / name
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"bone-ds: {path}: can't be read: {says}" + (" or directory" if "No" in says else "")]


def test_several_mistakes_are_counted(refuse):
    assert refuse(GOOD + "train: {steps: x, seed: y, betas: z}").endswith("(and 2 more)")
