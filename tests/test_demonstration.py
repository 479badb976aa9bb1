"""What the demonstration makes of a model's texts: right answers are counted in their form and in any, and wrong ones are shown."""

import dataclasses
from pathlib import Path

from bone_ds.config import load_config
from bone_ds.demo import demonstration, rows, rwkv6
from bone_ds.demo.demonstration import Answers

TEXTS = ["12 + 7 = 19. The answer is: 19", "The answer is: 18", "That makes 19", "", "The answer is: 19, or 20"]
RIGHT = [True, False, False, False, True]
LAST_NUMBER_RIGHT = [True, False, True, False, False]


def answers(texts):
    part = dataclasses.replace(rwkv6.PART, ask=lambda model, config, prompts, max_new_tokens: texts)
    questions = [{"query": "How many?", "response": "12 + 7 = 19. The answer is: 19"}] * len(texts)
    return demonstration._ask(part, Path("model"), load_config(demonstration.recipe_of(part)), questions)


def test_answers_are_counted_in_their_form_and_in_any():
    assert answers(TEXTS) == Answers(TEXTS, RIGHT, LAST_NUMBER_RIGHT)


def test_the_first_answers_are_shown_and_a_wrong_one_with_them():
    assert demonstration._telling(answers([TEXTS[0]] * 5)) == [0, 1, 2]
    assert demonstration._telling(answers([TEXTS[0]] * 5 + [TEXTS[1]] * 2)) == [0, 1, 5]
    assert demonstration._telling(answers([TEXTS[1]] * 5)) == [0, 1, 2]


def test_figures_before_and_after(tmp_path, capsys):
    config = load_config(demonstration.recipe_of(rwkv6.PART), [f"output.directory={tmp_path}"])
    rows.write(tmp_path / "events.jsonl", [{"event": "eval", "loss": 4.0}, {"event": "step", "loss": 9.0}, {"event": "eval", "loss": 0.25}])
    demonstration._show_figures(rwkv6.PART, config, answers(["", ""]), answers(TEXTS[:2]))
    shown = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line]
    assert shown == [["before", "after"], ["4.000", "0.250"], ["0.0%", "50.0%"], ["0.0%", "50.0%"]]


def test_what_lies_from_an_earlier_time_is_removed(tmp_path):
    for merged in (tmp_path / "merged.pth", tmp_path / "merged"):
        run = tmp_path / "run"
        run.mkdir()
        (run / "log.txt").touch()
        merged.touch() if merged.suffix else merged.mkdir()
        demonstration._remove_earlier(run, merged)
        demonstration._remove_earlier(run, merged)
        assert not run.exists() and not merged.exists()
