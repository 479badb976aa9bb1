"""Every recipe that comes with the package is a config as it would be used, and says truly what it takes."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

import bone_ds
from bone_ds import ds_json
from bone_ds.config import load_config, validate
from bone_ds.demo import rwkv6, smollm2
from bone_ds.demo.demonstration import recipe_of
from bone_ds.plan import plan

GIB = 2**30
RECIPES = sorted(Path(bone_ds.__file__).parent.glob("recipes/*.yaml"))
PAPERS = [path for path in RECIPES if path.stem.startswith(("rwkv6_", "llama2_", "table7_"))]
OWN = [path for path in RECIPES if path not in PAPERS]
HEAD = re.compile(
    r"^# Planned: ([\d.]+) GiB on (one GPU|each of \d+ GPUs), fits cards of (\d+) GiB: bone-ds train RECIPE --ranks (\d+)$", re.M)
TRAINABLE = {"rwkv6_1b6": 33_030_144, "rwkv6_3b": 55_050_240, "rwkv6_7b": 88_080_384, "llama2_7b": 87_031_808,
             "table7_rwkv6_1b6": 33_030_144, "table7_rwkv6_3b": 55_050_240}
"""The paper's 33.0M, 55.1M, 88.1M and 87.0M."""


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recipe_can_be_run(path, ranks):
    assert ds_json.resolve(load_config(path), ranks)["train_micro_batch_size_per_gpu"] >= 1


@pytest.mark.parametrize("part", [rwkv6.PART, smollm2.PART], ids=lambda part: part.recipe)
def test_the_demonstrations_recipes(part):
    config = load_config(recipe_of(part))
    assert recipe_of(part) in RECIPES
    assert Path(config.data.train[0]).parent == Path(config.data.eval[0]).parent, "both are written into one directory"
    assert not part.merged.is_relative_to(config.output.directory)


def test_the_papers_recipes_are_there():
    """Four models on three data sets, and the nine rows of Table 7."""
    models = ("rwkv6_1b6", "rwkv6_3b", "rwkv6_7b", "llama2_7b")
    expected = {f"{model}_{data}" for model in models for data in ("metamath", "codefeedback", "wizardlm")}
    assert {path.stem for path in PAPERS if not path.stem.startswith("table7_")} == expected
    assert sum(path.stem.startswith("table7_") for path in PAPERS) == 9


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_papers_recipe_takes_what_it_says(path):
    gib, where, card_gib, ranks = HEAD.search(path.read_text()).groups()
    ranks = int(ranks)
    assert where == ("one GPU" if ranks == 1 else f"each of {ranks} GPUs")
    outcome = planned(planned_part(path), ranks)
    assert outcome.peak_bytes / GIB == pytest.approx(float(gib), abs=0.1)
    assert outcome.peak_bytes < 0.97 * int(card_gib) * GIB
    assert outcome.trainable_parameters == next(TRAINABLE[name] for name in sorted(TRAINABLE, key=len, reverse=True)
                                                if path.stem.startswith(name))


@pytest.mark.parametrize("path", [path for path in PAPERS if not path.stem.startswith("table7_")], ids=lambda path: path.stem)
def test_the_papers_settings(path):
    """Table 1: b = 64, batches of 64, rate 2e-5, bf16."""
    config = load_config(path)
    assert (config.adapter.rank, config.model.dtype, config.train.learning_rate) == (64, "bf16", 2e-5)
    assert config.train.global_batch_size == 64 and not config.data.packing, "packs would be more than 64 samples"


def planned_part(path: Path) -> str:
    """What a plan of data that isn't there goes by, so that recipes which differ in their data are planned once."""
    tree = load_config(path).model_dump(mode="json", exclude_unset=True)
    tree["data"] = {"train": "absent.jsonl"} | {field: tree["data"][field] for field in ("max_length", "packing") if field in tree["data"]}
    tree["output"] = {"directory": "unused"}
    return json.dumps(tree, sort_keys=True)


@cache
def planned(part: str, ranks: int):
    return plan(validate(json.loads(part), "a recipe"), ranks, "cuda")
