"""The demonstration's problems: right, repeatable, and held-out ones truly apart."""

import ast
import json
import re

import pytest

from bone_ds.demo import rows
from bone_ds.demo import word_problems as wp
from bone_ds.errors import DataError

SETS = {"train": (wp.TRAIN_TEMPLATES, wp.TRAIN_NAMES), "held_out": (wp.HELD_OUT_TEMPLATES, wp.HELD_OUT_NAMES)}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def value(node):
    """An independent reading of an arithmetic expression; / must be exact."""
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.Constant):
        return node.value
    left, right = value(node.left), value(node.right)
    if isinstance(node.op, ast.Div):
        assert left % right == 0
        return left // right
    return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]


def evaluated(expression):
    return value(ast.parse(expression, mode="eval"))


@pytest.mark.parametrize("name", SETS)
def test_every_answer_and_every_equation_is_right(name):
    for problem in wp.generate(*SETS[name], 600, seed=4):
        assert evaluated(problem.expression) == problem.answer
        assert problem.response.endswith(f"\nThe answer is: {problem.answer}")
        assert wp.answer_of(problem.response) == problem.answer
        equations = EQUATION.findall(problem.response)
        assert 1 <= len(equations) <= 3
        for left, sign, right, result in equations:
            assert evaluated(f"{left} {sign} {right}") == int(result)
        assert int(equations[-1][3]) == problem.answer
        assert not re.search(r"[{}]", problem.query + problem.response)
        assert all(2 <= int(number) <= 99 for number in re.findall(r"\d+", problem.query + problem.response))


@pytest.mark.parametrize("name", SETS)
def test_problems_are_different_and_the_templates_evenly_used(name):
    templates = SETS[name][0]
    problems = wp.generate(*SETS[name], 20 * len(templates), seed=4)
    assert len({problem.query for problem in problems}) == len(problems)
    assert [sum(problem.template == place for problem in problems) for place in range(len(templates))] == [20] * len(templates)


def test_the_same_seed_gives_the_same_files(tmp_path):
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        wp.write(tmp_path / directory, train=50, held_out=20, seed=seed)
    read = {name: [path.read_text() for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0] and read["a"][1] != read["c"][1]


def test_held_out_stories_names_and_things_are_apart():
    assert len(wp.TRAIN_TEMPLATES) >= 14 and len(wp.HELD_OUT_TEMPLATES) >= 6
    assert not set(wp.TRAIN_NAMES) & set(wp.HELD_OUT_NAMES)
    stories = {name: {template.story for template in templates} for name, (templates, _) in SETS.items()}
    assert not stories["train"] & stories["held_out"]
    things = {name: {thing for template in templates for thing in template.things} for name, (templates, _) in SETS.items()}
    assert not things["train"] & things["held_out"]
    held_out_text = " ".join(problem.query for problem in wp.generate(*SETS["held_out"], 300, seed=0))
    foreign = [word for word in (*things["train"], *wp.TRAIN_NAMES) if re.search(rf"\b{word}\b", held_out_text)]
    assert foreign == []


def test_the_kinds_of_calculation_are_the_same():
    """Held out are new stories, not new arithmetic: each sequence of operations was trained."""
    signs = {name: {tuple(step.split()[1] for step in template.steps) for template in templates}
             for name, (templates, _) in SETS.items()}
    assert signs["held_out"] <= signs["train"]


def test_written_files_are_rows_of_query_and_response(tmp_path):
    train, held_out = wp.write(tmp_path / "new" / "directory", train=30, held_out=10, seed=0)
    assert sorted(path.name for path in train.parent.iterdir()) == ["held_out.jsonl", "train.jsonl"]
    for path, count in ((train, 30), (held_out, 10)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == count and all(set(row) == {"query", "response"} for row in rows)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    wp.write(tmp_path, train=10, held_out=5, seed=0)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(rows.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        wp.write(tmp_path, train=10, held_out=5, seed=1)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_more_problems_than_there_are():
    with pytest.raises(DataError, match="ask for fewer"):
        wp.generate(wp.HELD_OUT_TEMPLATES[3:4], ("Hana",), 2000, seed=0)


@pytest.mark.parametrize(("text", "answer"), [
    ("6 * 7 = 42\nThe answer is: 42", 42),
    ("The answer is: 3\nNo. The answer is: 4.", 4),
    ("The answer is: 1,234 dollars", 1234),
    ("The answer is: $12", 12),
    ("The answer is: -5", -5),
    ("The answer is:7<|im_end|>", 7),
    ("The answer is: 3.5", None),
    ("The answer is: about 3", None),
    ("The answer is: 3\nThe answer is: none", None),
    ("The answer is:", None),
    ("The answer is 3", None),
    ("", None),
])
def test_the_answer_of_a_text(text, answer):
    assert wp.answer_of(text) == answer


@pytest.mark.parametrize(("text", "number"), [
    ("6 * 7 is 42.", 42), ("So 1,200 in all", 1200), ("10-3", 3), ("about -5", -5), ("none", None)])
def test_the_last_number_of_a_text(text, number):
    assert wp.last_number(text) == number
