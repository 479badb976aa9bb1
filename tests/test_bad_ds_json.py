"""The DeepSpeed JSON: what follows from the YAML may be repeated there but not contradicted, and nothing in it is ignored."""

import json

import pytest

import ds_configs
from bone_ds import activation_policy, ds_json
from bone_ds.cli import main
from bone_ds.config import RunConfig

ZERO = {"zero_optimization": {"stage": 2}}


def run_config(**sections) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"train": "train.jsonl"}, "output": {"directory": "run"}} | sections)


@pytest.fixture
def refuse(tmp_path, capsys):
    """Starts a run with this as its DeepSpeed JSON, which must be refused: JSON, overrides -> the message."""
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: m}}\ndata: {{train: {tmp_path}/train.jsonl}}\noutput: {{directory: {tmp_path}/run}}\n")

    def run(given: object, *overrides: str) -> str:
        text = given if isinstance(given, str | bytes) else json.dumps(given)
        path = tmp_path / "ds.json"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        assert main(["train", str(tmp_path / "run.yaml"), "--ranks", "2", f"deepspeed.config={path}", *overrides]) == 2
        output = capsys.readouterr()
        message = output.err.removesuffix("\n")
        assert output.out == "" and message.startswith("bone-ds: ") and message.count("\n") < 2
        assert not (tmp_path / "run").exists()
        return message

    return run


CONTRADICTIONS = [
    ({"train_batch_size": 16}, ["train_batch_size: 16", "train.global_batch_size", "8"]),
    ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu: 2", "train.micro_batch_size", "1"]),
    ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps: 1", "train.global_batch_size", "4"]),
    ({"gradient_clipping": 0.5}, ["gradient_clipping: 0.5", "train.max_grad_norm", "1.0"]),
    ({"bf16": {"enabled": False}}, ["bf16.enabled: False", "model.dtype", "True"]),
    ({"bf16": {"enabled": True, "immediate_grad_update": True}}, ["bf16.immediate_grad_update: True", "not be obeyed"]),
    ({"optimizer": {"type": "Lion"}}, ["optimizer.type: 'Lion'", "'AdamW'"]),
    ({"optimizer": {"params": {"lr": 1e-5}}}, ["optimizer.params.lr: 1e-05", "train.learning_rate", "0.0001"]),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["optimizer.params.betas: [0.9, 0.95]", "[0.9, 0.999]"]),
    ({"optimizer": {"params": {"lr": "auto"}}}, ["optimizer.params.lr: 'auto'"]),
    ({"optimizer": {"params": {"amsgrad": True}}}, ["optimizer.params.amsgrad: True", "not be obeyed"]),
    ({"optimizer": "AdamW"}, ["optimizer: 'AdamW'"]),
    ({"train_batch_size": "auto"}, ["train_batch_size: 'auto'", "remove the line"]),
]
REFUSED = [
    ({"fp16": {"enabled": True}}, ["fp16", "model.dtype"]),
    ({"amp": {"enabled": True}}, ["amp", "model.dtype"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.schedule"]),
    ({"zero_optimisation": {"stage": 1}}, ["zero_optimisation", "did you mean 'zero_optimization'?"]),
    ({"sparse_attention": {}}, ["sparse_attention", "remove it"]),
]
BAD_ZERO = [
    (2, ["zero_optimization", "is 2", "an object with a stage"]),
    ({}, ["zero_optimization.stage", "None"]),
    ({"stage": 4}, ["zero_optimization.stage", "is 4"]),
    ({"stage": -1}, ["zero_optimization.stage", "is -1"]),
    ({"stage": "2"}, ["zero_optimization.stage", "'2'"]),
    ({"stage": True}, ["zero_optimization.stage", "True"]),
    ({"stage": 2, "reduce_bucket_size": "auto"}, ["zero_optimization.reduce_bucket_size", "'auto'", "give a number"]),
    ({"stage": 2, "reduce_bucket_size": "5e8"}, ["zero_optimization.reduce_bucket_size", "'5e8'"]),
    ({"stage": 2, "reduce_bucket_size": -1}, ["zero_optimization.reduce_bucket_size", "-1"]),
    ({"stage": 2, "reduce_bucket_sise": 5}, ["zero_optimization.reduce_bucket_sise", "did you mean 'reduce_bucket_size'?"]),
    ({"stage": 2, "speed": 5}, ["zero_optimization.speed", "no field"]),
    ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, ["zero_optimization.offload_optimizer", "no effect at stage 0", "1 or 2 or 3"]),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, ["zero_optimization.offload_param", "no effect at stage 2"]),
    ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, ["zero_optimization.offload_param.device: 'nvme'", "use cpu"]),
    ({"stage": 2, "offload_optimizer": "cpu"}, ["zero_optimization.offload_optimizer: is 'cpu'", "give an object"]),
    ({"stage": 2, "offload_optimizer": {}}, ["zero_optimization.offload_optimizer.device: None"]),
    ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ["zero_optimization.offload_optimizer.ratio", "no field"]),
    ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": "yes"}}, ["offload_optimizer.pin_memory: 'yes'"]),
    ({"stage": 2, "cpu_offload": True}, ["zero_optimization.cpu_offload"]),
]
# section, overrides of the YAML, what the message says
BAD_ACTIVATION = [
    (2, (), ["activation_checkpointing: is 2", "an object"]),
    ({"polcy": "layer"}, (), ["activation_checkpointing.polcy", "did you mean 'policy'?"]),
    ({"cpu_checkpoint": True}, (), ["activation_checkpointing.cpu_checkpoint:", "did you mean 'cpu_checkpointing'?"]),
    ({"speed": 5}, (), ["activation_checkpointing.speed", "remove it"]),
    ({"policy": "layers"}, (), ["activation_checkpointing.policy: 'layers'", "did you mean 'layer'?"]),
    ({"policy": "auto"}, (), ["activation_checkpointing.policy: 'auto' is not one of none, bone, layer, bone+layer"]),
    ({"every": 0}, (), ["activation_checkpointing.every: 0 is not a whole number"]),
    ({"every": True}, (), ["activation_checkpointing.every: True is not a whole number"]),
    ({"number_checkpoints": "4"}, (), ["activation_checkpointing.number_checkpoints: '4'"]),
    ({"modules": []}, (), ["activation_checkpointing.modules: []"]),
    ({"modules": "mlp"}, (), ["activation_checkpointing.modules: 'mlp' is not a list"]),
    ({"modules": ["mlp", "mlp"]}, (), ["activation_checkpointing.modules: ['mlp', 'mlp']", "each once"]),
    ({"cpu_checkpointing": "true"}, (), ["activation_checkpointing.cpu_checkpointing: 'true' is not true or false"]),
    ({"partition_activations": True}, (), ["activation_checkpointing.partition_activations", "tensor-parallel", "remove it"]),
    ({"contiguous_memory_optimization": True}, (), ["activation_checkpointing.contiguous_memory_optimization", "remove it"]),
    ({"synchronize_checkpoint_boundary": True}, (), ["activation_checkpointing.synchronize_checkpoint_boundary", "remove it"]),
    ({"profile": True}, (), ["activation_checkpointing.profile", "remove it"]),
    ({"policy": "layer"}, ("train.activation_checkpointing=bone",),
     ["activation_checkpointing.policy: 'layer' contradicts train.activation_checkpointing: 'bone'"]),
    ({"every": 2}, ("train.recompute_every=3",), ["activation_checkpointing.every: 2 contradicts train.recompute_every: 3"]),
    ({"modules": ["mlp"]}, ("train.recompute_modules=[self_attn]",),
     ["activation_checkpointing.modules: ['mlp'] contradicts train.recompute_modules: ['self_attn']"]),
    ({"cpu_checkpointing": True, "policy": "bone"}, (),
     ["activation_checkpointing.cpu_checkpointing: True has no effect with", "adapter.strategy: 'auto' keeps nothing"]),
    ({"cpu_checkpointing": True}, ("train.activation_checkpointing=none",),
     ["activation_checkpointing.cpu_checkpointing: True has no meaning with train.activation_checkpointing: 'none'"]),
    ({"number_checkpoints": 4}, ("train.activation_checkpointing=bone",),
     ["activation_checkpointing.number_checkpoints: 4 has no meaning with train.activation_checkpointing: 'bone'"]),
    ({"policy": "none"}, ("train.recompute_every=2",),
     ["train.recompute_every: 2 has no meaning with", "activation_checkpointing.policy: 'none'"]),
    ({"policy": "bone", "every": 2}, (), ["activation_checkpointing.every: 2 has no meaning with", "policy: 'bone'"]),
    ({"number_checkpoints": 4}, ("train.recompute_every=2",),
     ["activation_checkpointing.number_checkpoints: 4 and train.recompute_every: 2", "remove one"]),
    ({"policy": "bone+layer"}, ("adapter.method=lora",),
     ["activation_checkpointing.policy: 'bone+layer' needs adapter.method: bone", "'lora'"]),
]
NO_JSON = [
    ("", ["no JSON", "line 1"]),
    ("{'zero_optimization': 1}", ["no JSON", "line 1 column 2"]),
    (b"\xff\xfe{", ["no JSON", "utf-8"]),
    ("[2]", ["holds [2]", "not an object"]),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', ["'stage' stands twice"]),
    ('{"zero_optimization": {"stage": 1, "sub_group_size": NaN}}', ["NaN is no JSON number"]),
    ("[" * 100_000, ["no JSON"]),
    ("{}", ["zero_optimization", "None"]),
]


@pytest.mark.parametrize("given, says", [
    *[(ZERO | given, says) for given, says in CONTRADICTIONS + REFUSED],
    *[({"zero_optimization": zero}, says) for zero, says in BAD_ZERO],
    *NO_JSON,
], ids=lambda value: str(value)[:60])
def test_refused(refuse, given, says):
    message = refuse(given)
    assert "ds.json: " in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize("section, overrides, says", BAD_ACTIVATION, ids=lambda value: str(value)[:60])
def test_activation_checkpointing_refused(refuse, section, overrides, says):
    message = refuse(ZERO | {"activation_checkpointing": section}, *overrides)
    assert "ds.json: " in message and all(part in message for part in says), message


OFF = {"partition_activations": False, "contiguous_memory_optimization": False, "cpu_checkpointing": False, "number_checkpoints": None,
       "synchronize_checkpoint_boundary": False, "profile": False}
WHOLE_LAYERS = {"policy": "layer", "every": 1, "modules": None, "number_checkpoints": None, "cpu_checkpointing": False}


@pytest.mark.parametrize("section, train, resolved", [
    (None, {}, {"policy": "none"}),
    (OFF, {}, {"policy": "none"}),
    (OFF, {"activation_checkpointing": "layer"}, WHOLE_LAYERS),
    (None, {"activation_checkpointing": "bone"}, {"policy": "bone", "cpu_checkpointing": False}),
    (None, {"recompute_every": 3}, WHOLE_LAYERS | {"every": 3}),
    ({"policy": "layer"}, {"recompute_modules": ["mlp"]}, WHOLE_LAYERS | {"modules": ["mlp"]}),
    (OFF | {"cpu_checkpointing": True}, {}, WHOLE_LAYERS | {"cpu_checkpointing": True}),
    (OFF | {"cpu_checkpointing": True}, {"activation_checkpointing": "bone"}, {"policy": "bone", "cpu_checkpointing": True}),
    ({"number_checkpoints": 8}, {}, WHOLE_LAYERS | {"every": None, "number_checkpoints": 8}),
    ({"number_checkpoints": 8}, {"activation_checkpointing": "bone+layer"},
     WHOLE_LAYERS | {"policy": "bone+layer", "every": None, "number_checkpoints": 8}),
    ({"policy": "bone+layer", "every": 2}, {"activation_checkpointing": "bone+layer", "recompute_every": 2},
     WHOLE_LAYERS | {"policy": "bone+layer", "every": 2}),
    ({"policy": "none"}, {}, {"policy": "none"}),
], ids=lambda value: str(value)[:60])
def test_activation_checkpointing_follows_from_both_files(tmp_path, section, train, resolved):
    def resolve(given):
        (tmp_path / "ds.json").write_text(json.dumps(given))
        built = {"strategy": "materialized"}
        return ds_json.resolve(run_config(deepspeed={"config": str(tmp_path / "ds.json")}, train=train, adapter=built), world_size=1)

    once = resolve(ZERO | ({} if section is None else {"activation_checkpointing": section}))
    assert once["activation_checkpointing"] == resolved
    assert ds_json.activation_policy(once).section() == resolved
    assert resolve(once) == once


def test_every_activation_field_of_deepspeed_is_taken_or_refused_with_its_reason():
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT

    ours = {"policy", "every", "modules"}
    assert set(ACT_CHKPT_DEFAULT) == activation_policy._CHECKS.keys() - ours | activation_policy._REFUSED.keys()


@pytest.mark.parametrize("name, says", [
    ("zero4", ["'zero4'", "did you mean 'zero"]), ("zero_2", ["'zero_2'", "did you mean 'zero2'?"]), ("fast", ["'fast'", "zero0, zero1"]),
    ("", ["''"]), ("absent.json", ["absent.json", "No such file"])])
def test_no_such_configuration(refuse, name, says):
    message = refuse(ZERO, f"deepspeed.config={name or repr(name)}")
    assert "deepspeed.config" in message and all(part in message for part in says), message


def test_a_directory_is_no_configuration(refuse, tmp_path):
    (tmp_path / "dir.json").mkdir()
    assert "Is a directory" in refuse(ZERO, f"deepspeed.config={tmp_path}/dir.json")


def test_indivisible_batch(refuse):
    assert "train.global_batch_size: 9 can't be dealt to 2 ranks" in refuse(ZERO, "train.global_batch_size=9")


@pytest.mark.parametrize("name", ds_configs.NAMES)
def test_shipped_configurations_resolve_and_may_repeat_what_is_derived(tmp_path, name):
    config = run_config(deepspeed={"config": name}, train={"global_batch_size": 12, "micro_batch_size": 3, "max_grad_norm": 0.0})
    resolved = ds_json.resolve(config, world_size=2)
    assert ds_json.stage(resolved) == int(name.removesuffix("_offload")[-1])
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (12, 3, 2)
    assert "auto" not in json.dumps(resolved)

    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(resolved))
    repeated = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": str(whole)})})
    assert ds_json.resolve(repeated, world_size=2) == resolved


@pytest.mark.parametrize("harmless", [
    {"fp16": {"enabled": False}}, {"amp": {"enabled": False}}, {"gradient_clipping": 1}, {"optimizer": {"type": "AdamW"}},
    {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none", "pin_memory": True}, "overlap_comm": None}}])
def test_accepted(tmp_path, harmless):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO | harmless))
    resolved = ds_json.resolve(run_config(deepspeed={"config": str(path)}), world_size=1)
    assert resolved["optimizer"]["params"]["lr"] == 1e-4 and resolved["gradient_clipping"] == 1.0
    assert resolved["steps_per_print"] == 10**9


def test_every_zero_field_accepted_here_is_one_of_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert ds_json._ZERO <= names and ds_json._OFFLOAD.keys() <= names
