"""The small world of the demonstration's RWKV6: its corpus is right and repeatable, and held-out questions are truly apart."""

import json
import random
import re
from itertools import islice

import pytest

from bone_ds.demo import small_world as world
from bone_ds.demo.word_problems import answer_of

STATED = (
    (r"(\d+) \+ (\d+) = (\d+)\.", lambda x, y, z: x + y == z), (r"(\d+) plus (\d+) is (\d+)\.", lambda x, y, z: x + y == z),
    (r"(\d+) and (\d+) make (\d+)\.", lambda x, y, z: x + y == z), (r"(\d+) - (\d+) = (\d+)\.", lambda x, y, z: x - y == z),
    (r"(\d+) minus (\d+) is (\d+)\.", lambda x, y, z: x - y == z), (r"(\d+) from (\d+) leaves (\d+)\.", lambda x, y, z: y - x == z),
    (r"(\d+) is more than (\d+)\.", lambda x, y: x > y), (r"(\d+) is less than (\d+)\.", lambda x, y: x < y))
"""Every way in which the corpus says something of numbers alone, read independently of the templates."""


def numbers_of(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def drawn(kind, count):
    draw = random.Random(7)
    return [kind(draw) for _ in range(count)]


def test_every_sum_that_is_stated_is_right():
    found = [0] * len(STATED)
    for text in islice(world.documents(3), 3000):
        assert all(0 <= number <= world.MOST for number in numbers_of(text)), text
        assert not re.search(r"[{}]|  ", text), text
        for place, (pattern, holds) in enumerate(STATED):
            for match in re.finditer(pattern, text):
                assert holds(*map(int, match.groups())), text
                found[place] += 1
        signs = len(re.findall(r" [-+] | plus | minus | leaves | make \d", text))
        assert signs == sum(len(re.findall(pattern, text)) for pattern, _ in STATED[:6]), f"a sum in a form unknown to this test: {text}"
    assert min(found) > 50


def test_every_story_ends_with_the_right_number():
    """The first two numbers of a story come to the last, whether the sum is spelt out between them or not."""
    for text in drawn(world._story, 1000):
        first, second, *_, last = numbers_of(text)
        assert last in (first + second, first - second) and min(first, second, last) >= 2, text


def test_a_longer_story_comes_to_its_last_number():
    for text in drawn(world._two_steps, 200):
        has, buys, *_, last = numbers_of(text)
        gives = int(re.search(r"gives (\d+)", text)[1])
        assert has + buys - gives == last and has + buys <= world.MOST, text


def test_who_saw_more_did_see_more():
    told = [text for text in drawn(world._comparison, 300) if "saw" in text]
    for text in told:
        (one, x), (two, y) = re.findall(r"(\w+) saw (\d+)", text)
        winner = re.search(r"(\w+) saw more", text)[1]
        assert winner == (one if int(x) > int(y) else two), text
    assert len(told) > 100


def test_counting_goes_by_equal_steps():
    for text in drawn(world._counting, 300):
        numbers = numbers_of(text.partition(":")[2])
        step = int(re.search(r"by (\d+)", text)[1]) if " by " in text else 1
        assert [b - a for a, b in zip(numbers, numbers[1:])] == [step if " up" in text else -step] * (len(numbers) - 1), text
        assert len(numbers) >= 4


def test_equal_seeds_give_equal_files_and_held_out_documents_are_new(tmp_path):
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.write_corpus(tmp_path / directory, train=400, held_out=50, seed=seed)
        world.write_questions(tmp_path / directory, train=60, held_out=20, seed=seed)
    read = {name: {path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert sorted(read["a"]) == ["corpus.jsonl", "corpus_held_out.jsonl", "held_out.jsonl", "train.jsonl"]
    assert read["a"] == read["b"]
    assert all(read["a"][name] != read["c"][name] for name in read["a"])
    known, new = ({json.loads(line)["text"] for line in read["a"][name].splitlines()} for name in ("corpus.jsonl", "corpus_held_out.jsonl"))
    assert not known & new and len(new) > 40


def test_held_out_numbers_and_names_are_apart():
    train, held_out = world.families()
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == sum(1 for x in range(2, 21) for y in range(x, 21) if x + y <= 20)
    assert 0.15 < len(held_out) / len(train) < 0.3
    assert not set(world.TRAIN_NAMES) & set(world.HELD_OUT_NAMES)
    for pairs, names, foreign, others in (
            (train, world.TRAIN_NAMES, held_out, world.HELD_OUT_NAMES), (held_out, world.HELD_OUT_NAMES, train, world.TRAIN_NAMES)):
        for question in world.questions(pairs, names, 300, seed=5):
            fact = question.fact
            pair = (fact.left, fact.right) if fact.sign == "+" else (fact.right, fact.result)
            assert tuple(sorted(pair)) in pairs and tuple(sorted(pair)) not in foreign
            assert not [name for name in others if re.search(rf"\b{name}\b", question.query)]


def test_every_answer_is_right():
    for question in world.questions(world.families()[0], world.TRAIN_NAMES, 600, seed=4):
        left, sign, right, result, answer = re.fullmatch(
            r"(\d+) ([-+]) (\d+) = (\d+)\. The answer is: (\d+)", question.response).groups()
        assert int(left) + int(right) * (1 if sign == "+" else -1) == int(result) == int(answer) == answer_of(question.response)
        assert numbers_of(question.query) == [int(left), int(right)]


def test_questions_differ_and_every_story_is_asked():
    asked = world.questions(world.families()[1], world.HELD_OUT_NAMES, 120, seed=4)
    assert len({question.query for question in asked}) == 120
    last_words = [story.asks.split("}")[-1] for story in world.STORIES]
    assert all(any(question.query.endswith(words) for question in asked) for words in last_words)


def test_the_corpus_has_nothing_of_the_form_of_the_questions():
    text = "\n".join(islice(world.documents(0), 5000))
    for unseen in ("?", "How many", "answer", "User", "Assistant"):
        assert unseen not in text


@pytest.mark.parametrize("kind", world.KINDS, ids=lambda kind: kind.__name__)
def test_documents_fit_the_recipes_length(kind):
    lengths = [len(text.encode()) for text in drawn(kind, 500)]
    assert max(lengths) < 256 and min(lengths) > 10
