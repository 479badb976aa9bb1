"""What docs/data.md shows is what the program takes: every configuration is read, every command run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_chat import LLAMA3, tokenizer_of

from bone_ds.cli import main
from bone_ds.config import validate
from bone_ds.data import load_samples

PAGES = [Path(__file__).parents[1] / name for name in ("docs/data.md", "README.md")]
BLOCKS = {f"{page.name} {number}": block for page in PAGES
          for number, block in enumerate(re.findall(r"^```yaml\n(data:\n.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL), 1)}
COMMANDS = sorted({line.partition("  #")[0].strip() for page in PAGES
                   for line in re.findall(r"^bone-ds data .*$", page.read_text(), re.MULTILINE)})


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Data of every name that the pages use, and a model."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pair = {"query": "q", "question": "q", "response": "a", "answer": "```\ncode\n```\nexplained"}
    Path("chats.jsonl").write_text(json.dumps(chat) + "\n")
    Path("gsm8k_train.jsonl").write_text(json.dumps(pair) + "\n")
    Path("qa.csv").write_text("question,answer\nq,a\n")
    Path("gsm8k/data").mkdir(parents=True)
    for path in ("gsm8k/data/train-00000-of-00001.parquet", "code.parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([pair] * 3), path)
    assert main(["init", "rwkv", "--layers", "1", "--width", "32", "--vocab", "256", "--head-size", "8", "--out", "new.pth"]) == 0
    Path("run.yaml").write_text("model: {path: new.pth}\noutput: {directory: run}\n"
                                "data: {train: gsm8k_train.jsonl, fields: {query: question, response: answer}}\n")
    return tmp_path


@pytest.mark.parametrize("name", BLOCKS)
def test_every_configuration_is_taken(directory, name):
    tree = {"model": {"path": "new.pth"}, "output": {"directory": "run"}} | yaml.safe_load(BLOCKS[name])
    data = validate(tree, name).data
    if any(path.startswith("openai/") for path in data.train):
        assert data.revision and data.subset  # the hub is not asked here
    else:
        assert len(load_samples(data, tokenizer_of(LLAMA3))) >= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(directory, command, capsys):
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "gsm8k_train.jsonl" in shown.out


def test_there_are_some():
    assert len(BLOCKS) >= 5 and len(COMMANDS) >= 3
