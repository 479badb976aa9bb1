"""A small world told in short English texts, drawn from a seed: what the demonstration's own RWKV6 knows, and what it is asked.

The corpus tells of people, their things, and sums and differences of whole numbers up to 20, always as statements. The questions are of
the same stories in a form that the corpus doesn't have. `python -m bone_ds.demo.small_world DIRECTORY` writes the corpus.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bone_ds.demo import rows
from bone_ds.demo.word_problems import ANSWER

MOST = 20
"""No number is larger."""
CORPUS_DOCUMENTS = 80_000
HELD_OUT_DOCUMENTS = 400

SHE = ("Anna", "Carla", "Emma", "Grace", "Isla", "Karen", "Mia", "Olivia", "Ruth", "Tina", "Fatima", "Hana", "Nadia", "Priya")
HE = ("Ben", "David", "Felix", "Henry", "Jack", "Leo", "Noah", "Peter", "Sam", "Victor", "Amir", "Diego", "Omar", "Yusuf")
HELD_OUT_NAMES = ("Fatima", "Hana", "Nadia", "Priya", "Amir", "Diego", "Omar", "Yusuf")
"""Questions to train on don't name them; the corpus does."""
TRAIN_NAMES = tuple(name for name in SHE + HE if name not in HELD_OUT_NAMES)

THINGS = (
    "apples", "pears", "plums", "lemons", "nuts", "cakes", "cookies", "eggs", "carrots", "onions", "shells", "stones", "coins", "stamps",
    "cards", "books", "pens", "pencils", "marbles", "balls", "kites", "toys", "dolls", "boxes", "bags", "cups", "plates", "spoons",
    "candles", "flowers", "roses", "buttons", "beads", "keys", "maps", "letters", "pictures", "hats", "socks", "tickets")
ANIMALS = ("dog", "cat", "hen", "goat", "horse", "duck", "rabbit", "bird", "cow", "sheep", "mouse", "frog")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
QUALITIES = ("small", "big", "old", "new", "quiet", "bright", "warm", "little", "round", "pretty")
PLACES = ("market", "garden", "park", "school", "river", "farm", "lake", "shop", "forest", "beach", "library", "station")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("sunny", "cold", "windy", "rainy", "warm", "cloudy", "foggy", "snowy")
ACTIONS = ("read", "sing", "run", "swim", "draw", "cook", "sleep", "dance", "play", "climb", "dream", "whistle")


@dataclass(frozen=True)
class Fact:
    """left sign right = result, none of them above 20."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Story:
    """{one} and {two} are people, {things} what it is about; {a} and {b} the fact's operands and {c} its result."""

    sign: str
    begins: str
    goes_on: str
    asks: str
    ends: tuple[str, ...]


STORIES = (
    Story("+", "{one} has {a} {things}.", "{two} gives {her} {b} more.", "How many {things} does {one} have now?",
          ("Now {one} has {c} {things}.", "So {one} has {c} {things} now.")),
    Story("+", "{one} picks {a} {things} in the morning.", "In the afternoon {she} picks {b} more.", "How many {things} is that in all?",
          ("That is {c} {things} in all.", "In all {she} picks {c} {things}.")),
    Story("+", "There are {a} {things} on the table.", "{one} puts {b} more on it.", "How many {things} are on the table now?",
          ("Now there are {c} {things} on the table.", "Then {c} {things} are on the table.")),
    Story("+", "{one} has {a} {things} and {two} has {b}.", "They put them together.", "How many {things} do they have together?",
          ("Together they have {c} {things}.", "That makes {c} {things}.")),
    Story("+", "{one} buys {a} {things} at the {place}.", "{two} brings {b} more.", "How many {things} are there in all?",
          ("In all there are {c} {things}.", "Now there are {c} {things} in all.")),
    Story("+", "A box holds {a} {things}.", "{one} adds {b} more.", "How many {things} does the box hold now?",
          ("Now the box holds {c} {things}.", "So the box holds {c} {things}.")),
    Story("-", "{one} has {a} {things}.", "{She} gives {b} of them to {two}.", "How many {things} does {one} have left?",
          ("{one} has {c} {things} left.", "Now {she} has {c} {things} left.")),
    Story("-", "There are {a} {things} on the table.", "{one} takes {b} of them.", "How many {things} are left on the table?",
          ("Then {c} {things} are left on the table.", "So {c} {things} are left.")),
    Story("-", "{one} carries {a} {things} from the {place}.", "On the way {she} loses {b} of them.", "How many {things} are left?",
          ("Then {c} {things} are left.", "{She} has {c} {things} left.")),
    Story("-", "A shop has {a} {things}.", "{one} buys {b} of them.", "How many {things} does the shop have left?",
          ("The shop has {c} {things} left.", "Now the shop has {c} {things} left.")),
    Story("-", "{one} has {a} {things}.", "{two} has {b}.", "How many more {things} does {one} have than {two}?",
          ("{one} has {c} more {things} than {two}.", "So {one} has {c} {things} more.")),
    Story("-", "{one} needs {a} {things}.", "{She} has {b} of them.", "How many more {things} does {one} need?",
          ("{one} needs {c} more {things}.", "So {she} needs {c} more.")),
)


def documents(seed: int) -> Iterator[str]:
    """The corpus, without end. Equal seeds give equal texts."""
    draw = random.Random(seed)
    kinds, weights = zip(*KINDS.items(), strict=True)
    while True:
        yield draw.choices(kinds, weights)[0](draw)


def write_corpus(directory: Path, train: int = CORPUS_DOCUMENTS, held_out: int = HELD_OUT_DOCUMENTS, seed: int = 0) -> tuple[Path, Path]:
    """Writes corpus.jsonl and corpus_held_out.jsonl (field text), which share no document; returns their paths."""
    texts = list(islice(documents(seed), train))
    known = set(texts)
    others = islice((text for text in documents(seed + 1) if text not in known), held_out)
    paths = directory / "corpus.jsonl", directory / "corpus_held_out.jsonl"
    for path, part in zip(paths, (texts, others), strict=True):
        rows.write(path, ({"text": text} for text in part))
    return paths


@dataclass(frozen=True)
class Question:
    query: str
    response: str
    fact: Fact


def questions(pairs: Sequence[tuple[int, int]], names: Sequence[str], count: int, seed: int) -> list[Question]:
    """Different questions about the pairs' facts, the stories in equal shares. Equal arguments give equal questions."""
    draw = random.Random(seed)
    found: dict[str, Question] = {}
    while len(found) < count:
        story = STORIES[len(found) % len(STORIES)]
        fact = _fact(draw, story.sign, draw.choice(pairs))
        words = _words(draw, names)
        query = " ".join(part.format_map(words | _numbers(fact)) for part in (story.begins, story.goes_on, story.asks))
        found.setdefault(query, Question(query, f"{fact}. {ANSWER}{fact.result}", fact))
    return draw.sample(list(found.values()), count)


def families(seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs {x, y} of numbers from 2 whose sum is at most 20: those to train questions with, and a fifth that is held out.

    A pair's four facts (x + y, y + x, and its sum less either) are all on one side.
    """
    pairs = [(x, y) for x in range(2, MOST) for y in range(x, MOST - x + 1)]
    random.Random(seed).shuffle(pairs)
    held_out = len(pairs) // 5
    return pairs[held_out:], pairs[:held_out]


def write_questions(directory: Path, train: int = 2000, held_out: int = 120, seed: int = 0) -> tuple[Path, Path]:
    """Writes train.jsonl and held_out.jsonl (fields query, response), whose families and names are apart; returns their paths."""
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    parts = zip(paths, families(), (TRAIN_NAMES, HELD_OUT_NAMES), (train, held_out), strict=True)
    for number, (path, pairs, names, count) in enumerate(parts):
        found = questions(pairs, names, count, seed + number)
        rows.write(path, ({"query": question.query, "response": question.response} for question in found))
    return paths


def _words(draw: random.Random, names: Sequence[str] = SHE + HE) -> dict[str, str]:
    one, two = draw.sample(names, 2)
    she, her = ("she", "her") if one in SHE else ("he", "him")
    return {"one": one, "two": two, "she": she, "She": she.capitalize(), "her": her, "things": draw.choice(THINGS),
            "place": draw.choice(PLACES)}


def _numbers(fact: Fact) -> dict[str, int]:
    return {"a": fact.left, "b": fact.right, "c": fact.result}


def _pair(draw: random.Random, least: int) -> tuple[int, int]:
    """Two numbers from `least` whose sum is at most 20, every such pair equally likely."""
    while True:
        x, y = draw.randint(least, MOST), draw.randint(least, MOST)
        if x + y <= MOST:
            return x, y


def _fact(draw: random.Random, sign: str, pair: tuple[int, int]) -> Fact:
    x, y = draw.sample(pair, 2)
    return Fact(x, "+", y, x + y) if sign == "+" else Fact(x + y, "-", y, x)


def _stated(draw: random.Random, fact: Fact) -> str:
    """The fact as a sentence, in signs or in words."""
    plus = ("{a} + {b} = {c}.", "{a} + {b} = {c}.", "{a} + {b} = {c}.", "{a} plus {b} is {c}.", "{a} and {b} make {c}.")
    minus = ("{a} - {b} = {c}.", "{a} - {b} = {c}.", "{a} - {b} = {c}.", "{a} minus {b} is {c}.", "{b} from {a} leaves {c}.")
    return draw.choice(plus if fact.sign == "+" else minus).format_map(_numbers(fact))


def _story(draw: random.Random) -> str:
    """What happens, often the sum it comes to, and how it ends; at times with a sentence around it."""
    story = draw.choice(STORIES)
    fact = _fact(draw, story.sign, _pair(draw, 2))
    words = _words(draw) | _numbers(fact)
    told = [part.format_map(words) for part in (story.begins, story.goes_on, draw.choice(story.ends))]
    if draw.random() < 0.8:
        told.insert(2, f"{fact}.")
    if draw.random() < 0.25:
        told.insert(0, _weather(draw))
    if draw.random() < 0.25:
        after = draw.choice(("{one} is happy.", "Then {one} goes home.", "{two} thanks {her}.", "{She} counts them twice."))
        told.append(after.format_map(words))
    return " ".join(told)


def _two_steps(draw: random.Random) -> str:
    """A story in which something comes and then something goes."""
    first = _fact(draw, "+", _pair(draw, 2))
    second = Fact(first.result, "-", right := draw.randint(2, first.result - 2), first.result - right)
    words = _words(draw)
    begins = "{one} has {a} {things}. {She} buys {b} more. ".format_map(words | _numbers(first))
    ends = "Then {she} gives {b} of them to {two}. ".format_map(words | _numbers(second))
    left = "{one} has {c} {things} left.".format_map(words | _numbers(second))
    return f"{begins}{first}. {ends}{second}. {left}"


def _sums(draw: random.Random) -> str:
    """A few facts one after another, each of its own."""
    heads = ("", "", "Some sums. ", "{one} writes on the board. ", "{one} and {two} do sums. ")
    facts = (_fact(draw, draw.choice("+-"), _pair(draw, draw.choice((0, 2)))) for _ in range(draw.randint(3, 8)))
    return draw.choice(heads).format_map(_words(draw)) + " ".join(_stated(draw, fact) for fact in facts)


def _table(draw: random.Random) -> str:
    """One number added to, or taken from, several that follow each other."""
    x, step = _pair(draw, 1)
    firsts = range(x, min(x + draw.randint(3, 6), MOST - step + 1))
    if draw.random() < 0.5:
        return f"Adding {step}: " + " ".join(f"{first} + {step} = {first + step}." for first in firsts)
    return f"Taking {step} away: " + " ".join(f"{first + step} - {step} = {first}." for first in firsts)


def _counting(draw: random.Random) -> str:
    step, length = draw.choice((1, 1, 1, 2, 5)), draw.randint(4, 9)
    first = draw.randint(0, MOST - 4 * step)
    numbers = list(range(first, MOST + 1, step))[:length]
    if draw.random() < 0.4:
        numbers.reverse()
    way = "down" if numbers[0] > numbers[-1] else "up"
    by = "" if step == 1 else f" by {step}"
    return f"{draw.choice(SHE + HE)} counts {way}{by}: {', '.join(map(str, numbers))}."


def _comparison(draw: random.Random) -> str:
    """Which of two numbers, or of two people's things, is more."""
    x, y = draw.sample(range(MOST + 1), 2)
    words = _words(draw) | {"x": x, "y": y, "more": max(x, y), "less": min(x, y)}
    if draw.random() < 0.5:
        return "{more} is more than {less}. {less} is less than {more}.".format_map(words)
    winner = words["one"] if x > y else words["two"]
    return "{one} saw {x} {things}. {two} saw {y} {things}. ".format_map(words) + f"{winner} saw more {words['things']}."


def _description(draw: random.Random) -> str:
    """People, animals and things without a number."""
    words = _words(draw) | {
        "animal": draw.choice(ANIMALS), "action": draw.choice(ACTIONS), "quality": draw.choice(QUALITIES), "day": draw.choice(DAYS)}
    words["red"], words["blue"], words["green"] = draw.sample(COLOURS, 3)
    told = draw.sample((
        "{one} lives in a {quality} house near the {place}.",
        "{She} has a {red} {animal} that likes to {action}.",
        "{one} likes {things}, but {two} does not.",
        "On {day} {one} and {two} walk to the {place}.",
        "The {red} box is bigger than the {blue} box, and the {green} box is bigger still.",
        "{two} finds {quality} {things} at the {place} and shows them to {one}.",
        "The {animal} is {red}. It sleeps behind the {quality} {blue} door.",
        "{one} wants to {action}, and {two} wants to watch.",
    ), draw.randint(2, 3))
    return " ".join([_weather(draw), *told]).format_map(words)


def _weather(draw: random.Random) -> str:
    day, weather = draw.choice(DAYS), draw.choice(WEATHER)
    return draw.choice((f"It is a {weather} {day}.", f"On {day} it is {weather}.", f"The {draw.choice(PLACES)} is {weather} today."))


KINDS: dict[Callable[[random.Random], str], int] = {
    _story: 36, _two_steps: 8, _sums: 36, _table: 5, _counting: 5, _comparison: 4, _description: 6}
"""What a document may be, and how often it is."""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bone_ds.demo.small_world DIRECTORY")
    for written in write_corpus(Path(sys.argv[1])):
        print(written)
