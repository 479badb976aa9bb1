"""The runs that test_zero and test_resume compare, trained once for both: two starts of ranks in all."""

import json
from functools import cache
from pathlib import Path

import ranks
import tiny

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
WORLD_SIZES = (1, 2)
COL = {"grouping": "col"}
MATERIALIZED = {"grouping": "col", "strategy": "materialized"}
FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 3, "alpha": 30.0}
# Blocks of 9: 16 in q_proj, 8 in k_proj, 28 in the others, down_proj's with 7 of inputs. Shards of 7: 36 inputs leave one over.
FORMS = {
    "free": {"grouping": "free", "groups": 4},
    "miss": {"grouping": "miss", "rank": 7},
    "hadamard": {"form": "hadamard"},
    "unconstrained": {"form": "unconstrained"},
}
# Adapter and train sections, by name: each is run with what it says of checkpointing and without.
RECOMPUTED = {
    "row": ({}, {"recompute_every": 2}),
    "modules": (COL, {"recompute_modules": ["self_attn", "mlp"]}),
    "left": ({"grouping": "left"}, {"activation_checkpointing": "bone+layer"}),
    "built": (MATERIALIZED, {"activation_checkpointing": "bone+layer"}),
    "lora": (LORA, {"activation_checkpointing": "layer"}),
    "full": (FULL, {"activation_checkpointing": "layer"}),
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_PARAM = {"offload_param": {"device": "cpu", "pin_memory": False}, "stage3_param_persistence_threshold": 0}
OFFLOADED = {
    "offload-1": OFFLOAD | {"stage": 1},
    "offload-2": OFFLOAD | {"stage": 2},
    "offload-3": OFFLOAD | OFFLOAD_PARAM | {"stage": 3},
    "offload-param-3": OFFLOAD_PARAM | {"stage": 3},
}
PAUSE = "step-00000003"
# From run to run: a checkpoint of two ranks is read on one and on two, at the same stage and at others, by another optimizer and with
# another place for it.
MOVES = {
    "to-one-rank": ("row-2-fp32", 2, "row-2-fp32", 1),
    "to-stage-3": ("row-2-fp32", 2, "row-3-fp32", 2),
    "to-stage-0-on-one-rank": ("row-3-fp32", 2, "row-0-fp32", 1),
    "to-stage-1": ("row-0-fp32", 2, "row-1-fp32", 2),
    "bf16-to-one-rank": ("row-3-bf16", 2, "row-1-bf16", 1),
    "to-fused": ("row-2-fp32", 2, "fused-2", 2),
    "to-offload": ("row-3-fp32", 2, "offload-3", 2),
    "from-offload": ("offload-3", 2, "row-2-fp32", 2),
}


@cache
def outcomes(directory: Path) -> dict[tuple[str, int], dict]:
    """(run, world size) -> what ranks.train returned."""
    directory.mkdir()
    trained = {}
    for world_size in sorted(WORLD_SIZES, reverse=True):  # one rank reads checkpoints of two
        beside = directory / f"world-{world_size}"
        beside.mkdir()
        cases = {name: {"run": "train"} | case for name, case in _cases(directory, world_size).items()}
        for name, outcome in ranks.run(cases, world_size, beside).items():
            trained[name, world_size] = outcome
    return trained


def checkpoints_of(directory: Path, name: str, world_size: int) -> Path:
    return directory / f"world-{world_size}" / f"{name}-checkpoints"


def _cases(directory: Path, world_size: int) -> dict[str, dict]:
    model, rows, zero3 = directory / "model", directory / "rows.jsonl", directory / "zero3.json"
    if not model.exists():
        tiny.write_model(model)
        tiny.write_rows(rows)
        tiny.write_zero3(zero3)
        tiny.write_model_with(directory / "starved", model, "model.layers.1.self_attn.o_proj.weight", 0.0)
        tiny.write_model_with(directory / "spoilt", model, "model.layers.1.mlp.up_proj.weight", float("nan"))

    def tree(name: str, stage: int, **sections: dict) -> dict:
        releases = stage == 3 and name.endswith(("row-3-fp32", "row-3-fp32-resumed", "col-3", "idle-3", "-kept", "-recomputed", "-form-3"))
        config = str(zero3) if releases else f"zero{stage}"
        return tiny.config_tree(model, rows, directory / f"world-{world_size}" / name, deepspeed={"config": config}, **sections)

    def case(name: str, stage: int, **sections: dict) -> dict[str, dict]:
        return {name: {"config": tree(name, stage, **sections)}}

    def resumed(name: str, config: dict) -> dict[str, dict]:
        """A run, and its second half from its own checkpoint."""
        checkpoints = checkpoints_of(directory, name, world_size)
        again = config | {"output": {"directory": str(directory / f"world-{world_size}" / f"{name}-resumed")}}
        return {name: {"config": config, "checkpoints": str(checkpoints)},
                f"{name}-resumed": {"config": again, "resume": str(checkpoints / PAUSE)}}

    cases = {}
    for stage in STAGES:
        for dtype in DTYPES:
            name = f"row-{stage}-{dtype}"
            config = tree(name, stage, model={"dtype": dtype}, train={"async_save": dtype == "bf16"})
            checkpoints = checkpoints_of(directory, name, world_size)
            cases[name] = {"config": config, "checkpoints": str(checkpoints)}
            cases[f"{name}-resumed"] = {"config": tree(f"{name}-resumed", stage, model={"dtype": dtype}),
                                        "resume": str(checkpoints / PAUSE)}

    few = {"steps": 4}
    for stage in STAGES if world_size == 2 else (0,):
        cases |= case(f"col-{stage}", stage, adapter=COL, train=few | {"activation_checkpointing": "layer" if world_size == 2 else "none"})
        cases |= case(f"full-{stage}", stage, adapter=FULL, train=few | {"learning_rate": 3e-3})
        # The second step has 3 samples left for two ranks, or 1.
        cases |= case(f"ragged-{stage}", stage, data={"train_samples": 11}, train=few)
        cases |= case(f"idle-{stage}", stage, data={"train_samples": 9}, train=few)
    for stage in (2, 3) if world_size == 2 else (0,):
        cases |= case(f"built-{stage}", stage, adapter=MATERIALIZED, train=few | {"activation_checkpointing": "bone"})
        cases |= case(f"lora-{stage}", stage, adapter=LORA, train=few)
    for name, adapter in FORMS.items():
        if world_size == 2:
            cases |= case(f"{name}-form-3", 3, adapter=adapter, train=few | {"activation_checkpointing": "layer"})
        else:
            cases |= case(f"{name}-form-0", 0, adapter=adapter, train=few)
    for name, (adapter, policy) in RECOMPUTED.items() if world_size == 2 else ():
        for how, train in (("kept", {}), ("recomputed", policy)):
            cases |= case(f"{name}-{how}", 3, adapter=adapter, train={"steps": 2} | train)
    for packing in (False, True):
        for micro_batch_size in (1, 8 // world_size):
            for stage in (0, 3):
                name = f"{'packs' if packing else 'samples'}-of-{micro_batch_size}-{stage}"
                cases |= case(name, stage, data={"packing": packing}, train=few | {"micro_batch_size": micro_batch_size})
    for stage in STAGES if world_size == 2 else ():
        cases |= resumed(f"fused-{stage}", tree(f"fused-{stage}", stage, train={"optimizer": "adamw_fused"}))
    for name, zero in OFFLOADED.items() if world_size == 2 else ():
        path = directory / f"{name}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        cases |= resumed(name, tree(name, zero["stage"]) | {"deepspeed": {"config": str(path)}})
    for name, (config, fault) in _faulty(tree, directory).items() if world_size == 2 else ():
        for what, second_step in (("bad", fault), ("without", "left out")):
            cases[f"{what}-{name}"] = {"config": config | {"output": {"directory": str(directory / "world-2" / f"{what}-{name}")}},
                                       "second_step": second_step}
    for move, (origin, origin_world_size, target, target_world_size) in MOVES.items():
        if target_world_size == world_size:
            config = cases[target]["config"] | {"output": {"directory": str(directory / f"world-{world_size}" / move)}}
            cases[move] = {"config": config, "resume": str(checkpoints_of(directory, origin, origin_world_size) / PAUSE)}
    stage = 0 if world_size == 1 else 3
    for name in ("starved", "spoilt"):
        cases |= case(name, stage, model={"path": str(directory / name)})
    return cases


FAULTY = [f"{stage}-{dtype}" for stage in STAGES for dtype in DTYPES] + [f"{stage}-offload" for stage in (2, 3)]


def _faulty(tree, directory: Path) -> dict[str, tuple[dict, str]]:
    """Of each name in FAULTY the config, and what is wrong in the second of its four steps."""
    faulty = {}
    for name in FAULTY:
        stage, kind = name.split("-")
        config = tree(f"bad-{name}", int(stage), model={"dtype": "bf16" if kind == "bf16" else "fp32"}, train={"steps": 4})
        if kind == "offload":
            config["deepspeed"] = {"config": str(directory / f"offload-{stage}.json")}
        faulty[name] = (config, "infinite loss" if kind == "fp32" else "NaN gradient")
    return faulty
