"""What docs/deepspeed.md shows is what the program takes: every configuration is read, every command run."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from bone_ds import ds_json
from bone_ds.config import validate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deepspeed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^(?:bone-ds|deepspeed|torchrun) .*$", PAGE, re.MULTILINE)
PROGRAMS = {"bone-ds": "bone_ds", "deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_json_is_taken_whole(tmp_path, block):
    (tmp_path / "ds.json").write_text(block)
    tree = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "output": {"directory": "run"},
            "deepspeed": {"config": str(tmp_path / "ds.json")}}
    resolved = ds_json.resolve(validate(tree, "run.yaml"), world_size=2)
    for section, fields in json.loads(block).items():
        assert fields.items() <= resolved[section].items()


def test_every_launcher_trains_the_same(tmp_path):
    tree = tiny.config_tree(tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl"), tmp_path / "run",
                            train={"steps": 2, "eval_every": 0}, deepspeed={"config": "zero2"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    losses = {command: losses_of(command, tmp_path) for command in COMMANDS}
    assert {shlex.split(command)[0] for command in losses} == set(PROGRAMS)
    first, *others = losses.values()
    assert len(first) == 2 and all(theirs == first for theirs in others), losses


def losses_of(command: str, directory: Path) -> list[float]:
    """By step, of a training command that has to succeed."""
    program, *arguments = shlex.split(command)
    port = ["--master_port", free_port()] if program == "deepspeed" else []
    done = subprocess.run(
        [sys.executable, "-m", PROGRAMS[program], *port, *arguments, f"output.directory={program}"], cwd=directory, capture_output=True,
        text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    events = map(json.loads, (directory / program / "events.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_there_are_some():
    assert len(BLOCKS) == 2 and len(COMMANDS) == 3
