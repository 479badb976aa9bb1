"""Prompts over ranks: each is continued once, in order, as one process continues them; what is wrong is said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_rwkv
import torch

from bone_ds import launch, prompt_shares
from bone_ds.cli import main
from bone_ds.launch import Ranks

ROOT = Path(__file__).parents[1]
PROMPTS = ["abc", "d" * 40, "Hello there", "z", "one two three four", "z", "ab" * 30]
OPTIONS = ("--dtype", "fp32", "--max-new-tokens", "12", "--ignore-eos")


def ranks_of(world_size):
    return [Ranks(rank, rank, world_size, world_size) for rank in range(world_size)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_rwkv.save_tiny(tmp_path / "model.pth", vocabulary=256)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_turn(here, monkeypatch):
    """The launcher starts the ranks one after another in this process; how many prompts each of them had is returned at the end."""
    threads, shares = torch.get_num_threads(), []

    def start(given, world_size) -> int:
        for ranks in ranks_of(world_size):
            monkeypatch.setattr(launch, "current", lambda ranks=ranks: ranks)
            code = main(given)
            monkeypatch.setattr(launch, "current", lambda: None)
            if code:
                return code
            shares.append(len(json.loads((Path(given[-1]) / f"rank-{ranks.rank}.json").read_text())))
        return 0

    monkeypatch.setattr(launch, "start", start)
    yield shares
    torch.set_num_threads(threads)


def generated(*options) -> int:
    return main(["generate", "model.pth", *OPTIONS, *options])


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_prompt_is_one_rank_s(world_size):
    lengths = [3, 40, 11, 1, 18, 1, 60]
    dealt = [prompt_shares.places(lengths, ranks) for ranks in ranks_of(world_size)]
    assert sorted(place for places in dealt for place in places) == list(range(7))
    sums = [sum(lengths[place] for place in places) for places in dealt]
    assert max(sums) - min(sums) <= max(lengths)
    seeds = {prompt_shares.seed(given, ranks) for given in (0, 1, 2**63 - 1) for ranks in ranks_of(world_size)}
    assert len(seeds) == 3 * world_size


def test_ranks_say_what_one_process_says(here, in_turn):
    assert generated("--prompts", "prompts.jsonl", "--out", "one.jsonl") == 0 and in_turn == []
    assert generated("--prompts", "prompts.jsonl", "--out", "three.jsonl", "--ranks", "3", "--batch-size", "2") == 0
    assert (here / "three.jsonl").read_bytes() == (here / "one.jsonl").read_bytes() and sorted(in_turn) == [2, 2, 3]
    completions = [json.loads(line)["completion"] for line in (here / "one.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(set(completions)) == 6, "but for the two equal prompts, each has a text of its own"


def test_printed(in_turn, capsys):
    """More ranks than prompts: one has nothing to do."""
    assert generated("--prompt", "z") == 0
    alone = capsys.readouterr().out
    assert generated("--prompt", "z", "--ranks", "2") == 0 and in_turn == [1, 0]
    assert capsys.readouterr().out == alone


def test_equal_prompts_are_drawn_apart(here, in_turn):
    assert generated("--prompt", "z", "--prompt", "z", "--ranks", "2", "--do-sample", "--out", "o.jsonl") == 0 and in_turn == [1, 1]
    first, second = (json.loads(line)["completion"] for line in (here / "o.jsonl").read_text(encoding="utf-8").splitlines())
    assert first != second


@pytest.mark.parametrize("options, says", [
    (["--prompt", "abc", "--prompt", "", "--prompt", "d"], "prompt 2 of 3: is empty"),
    (["--prompt", "abc", "--adapter", "gone.safetensors"], "gone.safetensors: no such adapter")])
def test_what_is_wrong_is_said_once(in_turn, capsys, options, says):
    assert generated(*options, "--ranks", "2") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"bone-ds: {says}") and shown.err.count("\n") == 1


def test_another_launcher(here, monkeypatch, capsys):
    monkeypatch.setattr(launch, "current", lambda: ranks_of(2)[0])
    assert generated("--prompt", "a") == 2
    assert "give --ranks" in capsys.readouterr().err


def test_two_processes(here):
    command = [sys.executable, "-m", "bone_ds", "generate", "model.pth", *OPTIONS, "--prompts", "prompts.jsonl", "--out", "two.jsonl"]
    done = subprocess.run([*command, "--ranks", "2"], capture_output=True, text=True, timeout=300, env=os.environ | {
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "two.jsonl: 7 completions\n", "")
    assert generated("--prompts", "prompts.jsonl", "--out", "one.jsonl") == 0
    assert (here / "two.jsonl").read_bytes() == (here / "one.jsonl").read_bytes()
