"""Small maths word problems with worked solutions, drawn from a seed: data for a demonstration that needs no download.

Training and held-out problems share the kind of arithmetic and the form of the answer; stories, names and things are apart.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bone_ds.errors import DataError

ANSWER = "The answer is: "
_MOST = 40
_MOST_REPEATS = 1000
_INTEGER = re.compile(r"\s*\$?(-?(?:\d{1,3}(?:,\d{3})+|\d+))(?!\d|[.,]\d)")
_OPERATIONS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: None if x % y else x // y,
}


@dataclass(frozen=True)
class Template:
    """A story about {name} and {thing} with numbers {a}, {b}, ...

    Step i of `steps` names its result {si} and the equation {ei}; operands are numbers, earlier results or digits. The last
    result is the answer. Draws in which a result is below 2, above 40 or no integer are drawn again.
    """

    story: str
    solution: str
    steps: tuple[str, ...]
    ranges: dict[str, tuple[int, int]]
    things: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    query: str
    response: str
    expression: str
    """The whole calculation, with parentheses."""
    answer: int
    template: int
    """Its place in the tuple of templates."""


TRAIN_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Isla", "Jack", "Karen", "Leo", "Mia", "Noah",
               "Olivia", "Peter", "Ruth", "Sam", "Tina", "Victor")
HELD_OUT_NAMES = ("Amir", "Bianca", "Diego", "Fatima", "Hana", "Ivan", "Keiko", "Lars", "Nadia", "Omar", "Priya", "Yusuf")

TRAIN_TEMPLATES = (
    Template(
        "{name} picks {a} {thing} in the morning and {b} {thing} in the afternoon. How many {thing} does {name} pick in all?",
        "In all, {name} picks {e1} {thing}.",
        ("a + b",), {"a": (5, 20), "b": (5, 20)}, ("apples", "pears", "plums", "cherries")),
    Template(
        "{name} has {a} {thing}. A friend takes {b} of them. How many {thing} are left?",
        "There are {e1} {thing} left.",
        ("a - b",), {"a": (10, 30), "b": (3, 20)}, ("marbles", "stickers", "crayons", "balloons")),
    Template(
        "{name} buys {a} boxes of {thing}. Each box holds {b} {thing}. How many {thing} does {name} buy?",
        "{a} boxes with {b} {thing} each hold {e1} {thing}.",
        ("a * b",), {"a": (2, 9), "b": (3, 10)}, ("pencils", "candles", "light bulbs", "tea bags")),
    Template(
        "{name} shares {a} {thing} equally among {b} children. How many {thing} does each child get?",
        "Each child gets {e1} {thing}.",
        ("a / b",), {"a": (8, 30), "b": (2, 8)}, ("cookies", "grapes", "sweets", "strawberries")),
    Template(
        "{name} has {a} {thing} and gets {b} more for a birthday. Then {name} gives {c} {thing} to a cousin. "
        "How many {thing} does {name} have now?",
        "After the birthday {name} has {e1} {thing}. After the gift {name} has {e2} {thing}.",
        ("a + b", "s1 - c"), {"a": (10, 30), "b": (3, 20), "c": (2, 20)}, ("toy cars", "comic books", "puzzles", "board games")),
    Template(
        "{name} buys {a} packs of {thing} with {b} in each pack. At home there are already {c} {thing}. "
        "How many {thing} are there now?",
        "The packs hold {e1} {thing}. With the ones at home there are {e2} {thing}.",
        ("a * b", "s1 + c"), {"a": (2, 6), "b": (3, 8), "c": (3, 20)}, ("batteries", "napkins", "envelopes", "paper plates")),
    Template(
        "A shelf has {a} rows with {b} {thing} in each row. {name} takes {c} {thing} away. How many {thing} stay on the shelf?",
        "At first the shelf has {e1} {thing}. Then {e2} {thing} stay.",
        ("a * b", "s1 - c"), {"a": (2, 6), "b": (4, 9), "c": (2, 20)}, ("jars", "mugs", "bowls", "teapots")),
    Template(
        "{name} reads {a} pages on Monday and {b} pages on Tuesday. The {thing} has {c} pages. "
        "How many pages does {name} still have to read?",
        "So far {name} has read {e1} pages. There are {e2} pages still to read.",
        ("a + b", "c - s1"), {"a": (5, 20), "b": (5, 20), "c": (18, 40)}, ("novel", "diary", "cookbook", "guidebook")),
    Template(
        "One of the {thing} costs {a} dollars. {name} buys {b} of them and pays with {c} dollars. "
        "How many dollars does {name} get back?",
        "The {thing} cost {e1} dollars. {name} gets {e2} dollars back.",
        ("a * b", "c - s1"), {"a": (2, 9), "b": (2, 6), "c": (12, 40)}, ("caps", "scarves", "belts", "socks")),
    Template(
        "{name} has {a} {thing} and throws {b} broken ones away. The rest go into {c} equal bags. "
        "How many {thing} are in each bag?",
        "After that {e1} {thing} are good. Each bag has {e2} {thing}.",
        ("a - b", "s1 / c"), {"a": (12, 30), "b": (2, 12), "c": (2, 6)}, ("nails", "buttons", "beads", "shells")),
    Template(
        "{name} saves {a} dollars each week for {b} weeks and then finds {c} dollars in a {thing}. "
        "How many dollars does {name} have?",
        "In {b} weeks {name} saves {e1} dollars. With the money found it is {e2} dollars.",
        ("a * b", "s1 + c"), {"a": (2, 9), "b": (2, 6), "c": (2, 15)}, ("drawer", "coat", "suitcase", "piggy bank")),
    Template(
        "{name} counts {a} {thing} at a pond. {b} fly away and {c} new ones arrive. How many {thing} are at the pond now?",
        "After some fly away there are {e1} {thing}. With the new ones there are {e2} {thing}.",
        ("a - b", "s1 + c"), {"a": (12, 30), "b": (3, 20), "c": (2, 20)}, ("ducks", "geese", "swans", "herons")),
    Template(
        "{name} and a sister bake {a} {thing} together. They eat {b} and divide the others equally between the two of them. "
        "How many {thing} does each of them take home?",
        "After eating, {e1} {thing} are there. Each takes home {e2} {thing}.",
        ("a - b", "s1 / 2"), {"a": (12, 30), "b": (2, 14)}, ("muffins", "pancakes", "waffles", "scones")),
    Template(
        "{name} runs {a} laps on Friday. On Saturday {name} runs twice as many laps around the {thing}. "
        "How many laps does {name} run on both days?",
        "On Saturday {name} runs {e1} laps. On both days it is {e2} laps.",
        ("a * 2", "a + s1"), {"a": (3, 20)}, ("park", "track", "lake", "stadium")),
    Template(
        "There are {a} red {thing} and {b} blue {thing} in each of {c} crates. {name} carries all the crates. "
        "How many {thing} does {name} carry?",
        "One crate has {e1} {thing}. All the crates have {e2} {thing}.",
        ("a + b", "s1 * c"), {"a": (2, 9), "b": (2, 9), "c": (2, 5)}, ("tiles", "bricks", "ropes", "hammers")),
    Template(
        "{name} starts the day with {a} {thing}, sells {b} before lunch and {c} after lunch, and then gets {d} more. "
        "How many {thing} does {name} have at the end?",
        "After the morning there are {e1} {thing}. After the afternoon there are {e2} {thing}. "
        "At the end there are {e3} {thing}.",
        ("a - b", "s1 - c", "s2 + d"), {"a": (15, 30), "b": (3, 12), "c": (3, 12), "d": (2, 20)},
        ("newspapers", "sandwiches", "lemons", "melons")),
    Template(
        "{name} fills {a} trays with {b} {thing} each and {c} trays with {d} {thing} each. How many {thing} is that?",
        "The first trays hold {e1} {thing}. The other trays hold {e2} {thing}. Together that is {e3} {thing}.",
        ("a * b", "c * d", "s1 + s2"), {"a": (2, 5), "b": (3, 8), "c": (2, 5), "d": (3, 8)},
        ("seedlings", "eggs", "dumplings", "meatballs")),
)

HELD_OUT_TEMPLATES = (
    Template(
        "In a museum {name} sees {a} {thing} in one room and {b} {thing} in the next. How many {thing} is that together?",
        "Together that is {e1} {thing}.",
        ("a + b",), {"a": (5, 20), "b": (5, 20)}, ("statues", "paintings", "vases")),
    Template(
        "A bus has {a} {thing} on board. At the stop of {name}, {b} {thing} get off and {c} {thing} get on. "
        "How many {thing} are on the bus now?",
        "After the stop {e1} {thing} stay. With the new ones there are {e2} {thing}.",
        ("a - b", "s1 + c"), {"a": (12, 30), "b": (2, 12), "c": (2, 12)}, ("passengers", "tourists", "students")),
    Template(
        "{name} plants {a} beds with {b} {thing} in every bed, and {c} more {thing} along the fence. "
        "How many {thing} does {name} plant?",
        "The beds have {e1} {thing}. With the fence there are {e2} {thing}.",
        ("a * b", "s1 + c"), {"a": (2, 5), "b": (3, 7), "c": (2, 14)}, ("tulips", "roses", "sunflowers")),
    Template(
        "For a school play {name} sews {a} {thing} in May and {b} {thing} in June. {c} of them do not fit anyone. "
        "How many {thing} can be used?",
        "In both months {name} sews {e1} {thing}. Of these {e2} {thing} can be used.",
        ("a + b", "s1 - c"), {"a": (6, 20), "b": (6, 20), "c": (2, 12)}, ("costumes", "masks", "capes")),
    Template(
        "{name} needs {a} {thing} for every table at a wedding with {b} tables. {c} {thing} are already there. "
        "How many {thing} are missing?",
        "The tables need {e1} {thing}. {e2} {thing} are missing.",
        ("a * b", "s1 - c"), {"a": (3, 8), "b": (2, 6), "c": (2, 20)}, ("chairs", "glasses", "forks")),
    Template(
        "On a farm {name} gathers {a} {thing} and loads them in equal parts on {b} carts. How many {thing} are on each cart?",
        "Each cart has {e1} {thing}.",
        ("a / b",), {"a": (8, 30), "b": (2, 6)}, ("pumpkins", "cabbages", "hay bales")),
    Template(
        "A ferry makes {a} trips before noon and {b} trips after noon. {name} counts {c} {thing} on every trip. "
        "How many {thing} does the ferry carry that day?",
        "The ferry makes {e1} trips. It carries {e2} {thing}.",
        ("a + b", "s1 * c"), {"a": (2, 5), "b": (2, 5), "c": (2, 6)}, ("trucks", "bicycles", "vans")),
)


def generate(templates: Sequence[Template], names: Sequence[str], count: int, seed: int) -> list[Problem]:
    """`count` different problems, the templates in equal shares. Equal arguments give equal problems.

    Raises DataError where the templates don't hold so many.
    """
    generator = random.Random(seed)
    problems: dict[str, Problem] = {}
    repeats = 0
    while len(problems) < count:
        problem = _draw(templates, len(problems) % len(templates), names, generator)
        repeats = repeats + 1 if problem.query in problems else 0
        if repeats > _MOST_REPEATS:
            raise DataError(f"{count} different problems are more than the templates hold, got {len(problems)}; ask for fewer")
        problems[problem.query] = problem
    drawn = list(problems.values())
    generator.shuffle(drawn)
    return drawn


def write(directory: str | Path, train: int = 2000, held_out: int = 200, seed: int = 0) -> tuple[Path, Path]:
    """Writes train.jsonl and held_out.jsonl (fields query, response), each whole or not at all; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    _write_jsonl(paths[0], generate(TRAIN_TEMPLATES, TRAIN_NAMES, train, seed))
    _write_jsonl(paths[1], generate(HELD_OUT_TEMPLATES, HELD_OUT_NAMES, held_out, seed + 1))
    return paths


def answer_of(text: str) -> int | None:
    """N of the last `The answer is: N` in the text; None where there is none or N is no integer."""
    _, marker, tail = text.rpartition(ANSWER.rstrip())
    match = _INTEGER.match(tail) if marker else None
    return int(match[1].replace(",", "")) if match else None


def last_number(text: str) -> int | None:
    """The last integer anywhere in the text."""
    numbers = re.findall(r"-?\d{1,3}(?:,\d{3})+|-?\d+", text)
    return int(numbers[-1].replace(",", "")) if numbers else None


def _draw(templates: Sequence[Template], place: int, names: Sequence[str], generator: random.Random) -> Problem:
    template = templates[place]
    words = {"name": generator.choice(names), "thing": generator.choice(template.things)}
    while True:
        numbers = {key: generator.randint(*bounds) for key, bounds in template.ranges.items()}
        worked = _work(template.steps, numbers)
        if worked is not None:
            break
    results, equations, expression = worked
    values = {**words, **numbers, **results, **equations}
    answer = results[f"s{len(template.steps)}"]
    response = f"{template.solution.format_map(values)}\n{ANSWER}{answer}"
    return Problem(template.story.format_map(values), response, expression, answer, place)


def _work(steps: Sequence[str], numbers: dict[str, int]) -> tuple[dict[str, int], dict[str, str], str] | None:
    """Results s1.., equations e1.. and the whole expression; None for numbers that don't give a good problem."""
    values, expressions = dict(numbers), {key: str(value) for key, value in numbers.items()}
    results, equations = {}, {}
    for number, (left, sign, right) in enumerate(_parsed(steps), start=1):
        x, y = (int(operand) if operand.isdigit() else values[operand] for operand in (left, right))
        result = _OPERATIONS[sign](x, y)
        if result is None or not 2 <= result <= _MOST:
            return None
        key = f"s{number}"
        values[key] = results[key] = result
        equations[f"e{number}"] = f"{x} {sign} {y} = {result}"
        expressions[key] = f"({expressions.get(left, left)} {sign} {expressions.get(right, right)})"
    return results, equations, expressions[f"s{len(steps)}"]


def _parsed(steps: Sequence[str]) -> Iterator[list[str]]:
    return (step.split() for step in steps)


def _write_jsonl(path: Path, problems: Sequence[Problem]) -> None:
    lines = [json.dumps({"query": problem.query, "response": problem.response}) + "\n" for problem in problems]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
