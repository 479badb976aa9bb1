"""Every recipe that comes with the package is a config as it would be used, and `make demo` uses the ones that are there."""

from pathlib import Path

import pytest

import bone_ds
from bone_ds import ds_json
from bone_ds.config import load_config
from bone_ds.demo import rwkv6, smollm2
from bone_ds.demo.demonstration import recipe_of

RECIPES = sorted(Path(bone_ds.__file__).parent.glob("recipes/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recipe_can_be_run(path, ranks):
    assert ds_json.resolve(load_config(path), ranks)["train_micro_batch_size_per_gpu"] >= 1


@pytest.mark.parametrize("part", [rwkv6.PART, smollm2.PART], ids=lambda part: part.recipe)
def test_the_demonstrations_recipes(part):
    config = load_config(recipe_of(part))
    assert recipe_of(part) in RECIPES
    assert Path(config.data.train[0]).parent == Path(config.data.eval[0]).parent, "both are written into one directory"
    assert not part.merged.is_relative_to(config.output.directory)
