"""What docs/deepspeed.md shows is what the program takes."""

import json
import re
from pathlib import Path

import pytest

from bone_ds import ds_json
from bone_ds.config import validate

PAGE = (Path(__file__).parents[1] / "docs/deepspeed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_json_is_taken_whole(tmp_path, block):
    (tmp_path / "ds.json").write_text(block)
    tree = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "output": {"directory": "run"},
            "deepspeed": {"config": str(tmp_path / "ds.json")}}
    resolved = ds_json.resolve(validate(tree, "run.yaml"), world_size=2)
    for section, fields in json.loads(block).items():
        assert fields.items() <= resolved[section].items()


def test_there_are_some():
    assert len(BLOCKS) == 2
