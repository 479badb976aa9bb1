"""The quickstart of README.md, as it stands there: its configuration is read, its commands are run, one after another."""

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bone_ds.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Quickstart\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
YAML, SHELL = re.findall(r"^```\w*\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
LINES = [shlex.split(command, comments=True) for command in re.split(r"^(?=pip |python |bone-ds )", SHELL, flags=re.MULTILINE) if command]
PROSE = [shlex.split(command) for command in re.findall(r"`(bone-ds .*?)`", SECTION.replace(SHELL, ""))]


def runs(monkeypatch, command: list[str], *overrides: str) -> None:
    """Any command but an installation."""
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("bone_ds"), "handlers", [])
        if command[:2] == ["bone-ds", "train"]:  # as a launcher's one rank
            for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
                patch.setenv(name, value)
            command = [*command, *overrides]
        if command[0] == "bone-ds":
            assert main(command[1:]) == 0, command
        elif command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch and deepspeed
@pytest.mark.parametrize("overrides, loss, answer", [
    pytest.param(["train.steps=3", "train.global_batch_size=4", "data.eval_samples=8"], 4.0, "", id="a few steps"),
    pytest.param([], 0.05, " 12 + 7 = 19. The answer is: 19\n", id="all of it", marks=pytest.mark.slow)])
def test_every_command_runs_after_the_other(tmp_path, monkeypatch, capsys, overrides, loss, answer):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text(YAML)
    for command in LINES:
        runs(monkeypatch, command, *overrides)
    assert answer in capsys.readouterr().out
    events = map(json.loads, Path("quickstart/run/events.jsonl").read_text().splitlines())
    before, *_, after = [event["loss"] for event in events if event["event"] == "eval"]
    assert before > 5 and after < loss
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    for command in PROSE:
        runs(monkeypatch, command)
    assert "run directory, whole" in capsys.readouterr().out


def test_nothing_is_left_out():
    assert [command[:2] for command in LINES] == [
        ["pip", "install"], ["pip", "install"], ["python", "-m"], ["bone-ds", "train"], ["bone-ds", "merge"], ["bone-ds", "generate"]]
    assert [command[1] for command in PROSE] == ["generate", "data", "inspect"]
    assert LINES[-1][-1].endswith("?\n\nAssistant:")
