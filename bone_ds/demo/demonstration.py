"""One part of the demonstration: a model asked, trained with Bone on two ranks, merged, and asked the same again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bone_ds import launch
from bone_ds.arch import resolve
from bone_ds.cli import main as bone_ds
from bone_ds.config import RunConfig, load_config
from bone_ds.data import build_prompt
from bone_ds.demo import rows
from bone_ds.demo.word_problems import answer_of, last_number

SHOWN = 3


@dataclass(frozen=True)
class Part:
    title: str
    about: str
    """What the model knows before and what it is to learn."""
    recipe: str
    """Its name in bone_ds/recipes, without suffix."""
    merged: Path
    """Where the merged model is to lie."""
    questions: int
    """How many of the first rows of data.eval are asked."""
    held_out: str
    """What those have that was not trained on, as the heading of the figures."""
    max_new_tokens: int
    prepare: Callable[[RunConfig], None]
    """Puts the model and the data where the recipe has them."""
    ask: Callable[[Path, RunConfig, list[str], int], list[str]]
    """Model, config, prompts, max_new_tokens -> what the model goes on with."""


@dataclass(frozen=True)
class Answers:
    texts: list[str]
    right: list[bool]
    """Ends with `The answer is: N` and N is right."""
    last_number_right: list[bool]
    """Whatever its form, the last number of the text is right: fairer to a model that was never shown the form,
    though such a one often has not finished within the tokens it is given."""


def run(part: Part) -> int:
    """Prints its course and outcome; returns 0, or the exit code of the command that failed and said why. Raises BoneError."""
    started = time.monotonic()
    print(f"\n== {part.title}\n{part.about}", flush=True)
    recipe = recipe_of(part)
    config = load_config(recipe)
    part.prepare(config)
    _remove_earlier(Path(config.output.directory), part.merged)
    questions = rows.read(Path(config.data.eval[0]))[:part.questions]
    print(f"Asking the base model {len(questions)} held-out questions ...", flush=True)
    before = _ask(part, resolve(config.model).open(config.model).path, config, questions)
    print("Training ...", flush=True)
    adapter = Path(config.output.directory) / "adapter.safetensors"
    code = launch.start(["train", str(recipe)], ranks=min(2, launch.count_gpus()) or 2) or bone_ds(
        ["merge", str(adapter), "--out", str(part.merged), "--cache-dir", config.model.cache_dir])
    if code:
        return code
    print("Asking the merged model the same ...", flush=True)
    after = _ask(part, part.merged, config, questions)
    _show_answers(questions, before, after)
    _show_figures(part, config, before, after)
    seconds = time.monotonic() - started
    print(f"\n{seconds:.0f} s. The run lies in {config.output.directory}, the merged model in {part.merged}.", flush=True)
    return 0


def recipe_of(part: Part) -> Path:
    return Path(str(files("bone_ds").joinpath(f"recipes/{part.recipe}.yaml")))


def _remove_earlier(directory: Path, merged: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if merged.is_dir():
        shutil.rmtree(merged)
    else:
        merged.unlink(missing_ok=True)


def _ask(part: Part, model: Path, config: RunConfig, questions: list[dict[str, str]]) -> Answers:
    prompt = build_prompt(config.data)
    texts = part.ask(model, config, [prompt.prompt_text(question) for question in questions], part.max_new_tokens)
    wanted = [answer_of(question["response"]) for question in questions]
    return Answers(
        texts,
        [answer_of(text) == answer for text, answer in zip(texts, wanted, strict=True)],
        [last_number(text) == answer for text, answer in zip(texts, wanted, strict=True)])


def _show_answers(questions: list[dict[str, str]], before: Answers, after: Answers) -> None:
    for index in _telling(after):
        print(f"\nQ  {questions[index]['query']}\n   the answer is {answer_of(questions[index]['response'])}")
        print(f"before  {_one_line(before.texts[index])}\nafter   {_one_line(after.texts[index])}")


def _show_figures(part: Part, config: RunConfig, before: Answers, after: Answers) -> None:
    losses = [event["loss"] for event in rows.read(Path(config.output.directory) / "events.jsonl") if event["event"] == "eval"]
    share_lines = {
        "exact match (right, and said as `The answer is: N`)": (before.right, after.right),
        f"last number of {part.max_new_tokens} tokens right, in whatever form": (before.last_number_right, after.last_number_right)}
    print(f"\n{part.held_out:<58} before    after")
    print(f"  {'held-out loss (nats a token)':<54} {losses[0]:8.3f} {losses[-1]:8.3f}")
    for what, (first, last) in share_lines.items():
        print(f"  {what:<54} {_share(first):>8} {_share(last):>8}")


def _telling(after: Answers) -> list[int]:
    """The first questions in order of the set, one that is wrong afterwards among them if there is any: no picked cherries."""
    wrong = [index for index, right in enumerate(after.right) if not right][:1]
    rest = [index for index in range(len(after.right)) if index not in wrong][:SHOWN - len(wrong)]
    return sorted(rest + wrong)


def _one_line(text: str) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= 240 else flat[:237] + "..."


def _share(right: list[bool]) -> str:
    return f"{100 * sum(right) / len(right):.1f}%"
