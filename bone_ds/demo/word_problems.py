"""Small maths word problems with worked solutions, drawn from a seed: data for a demonstration that needs no data set.

Training and held-out problems share the kind of arithmetic and the form of the answer; stories, names and things are apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bone_ds.demo import rows
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

ONE_STEP, TWO_STEPS = "{e1}.", "First {e1}. Then {e2}."

# By kind of calculation: numbers' ranges, then for each story its text and things. The last story of a kind is held out.
_STORIES: dict[tuple[str, ...], tuple[dict[str, tuple[int, int]], tuple[tuple[str, tuple[str, ...]], ...]]] = {
    ("a + b",): ({"a": (3, 20), "b": (3, 20)}, (
        ("{name} picks {a} {thing} in the morning and {b} more {thing} in the afternoon. How many {thing} is that in all?",
         ("apples", "pears", "plums")),
        ("There are {a} {thing} on the table. {name} puts {b} more on it. How many {thing} are on the table now?",
         ("plates", "spoons", "mugs")),
        ("{name} reads {a} {thing} on Monday and {b} {thing} on Tuesday. How many {thing} is that together?",
         ("pages", "letters", "poems")),
        ("{name} finds {a} {thing} and a friend finds {b} {thing}. How many {thing} do they have in all?",
         ("shells", "coins", "stones")),
        ("In a museum {name} sees {a} {thing} in one room and {b} more in the next. How many {thing} is that in all?",
         ("statues", "paintings", "vases")))),
    ("a - b",): ({"a": (10, 40), "b": (3, 20)}, (
        ("{name} has {a} {thing}. A friend takes {b} of them. How many {thing} are left?", ("marbles", "stickers", "crayons")),
        ("{name} bakes {a} {thing} and sells {b} of them. How many {thing} are left?", ("muffins", "scones", "waffles")),
        ("There are {a} {thing} on a pond. {b} of them fly away. How many {thing} stay?", ("ducks", "geese", "swans")),
        ("{name} needs {a} {thing} and already has {b}. How many more {thing} does {name} need?", ("stamps", "tickets", "badges")),
        ("A baker shows {name} {a} {thing}. {b} of them are gone by noon. How many {thing} are left?", ("loaves", "pretzels", "bagels")))),
    ("a * b",): ({"a": (2, 6), "b": (2, 9)}, (
        ("{name} buys {a} boxes of {thing}. Each box holds {b} {thing}. How many {thing} does {name} buy?",
         ("pencils", "candles", "matches")),
        ("A shelf has {a} rows with {b} {thing} in each row. How many {thing} are on the shelf?", ("jars", "bottles", "cans")),
        ("{name} saves {b} {thing} each week for {a} weeks. How many {thing} is that?", ("dollars", "pennies", "tokens")),
        ("Each of {a} children brings {b} {thing}. How many {thing} do the children bring?", ("balloons", "flags", "ribbons")),
        ("{name} plants {a} beds with {b} {thing} in each bed. How many {thing} does {name} plant?", ("tulips", "roses", "lilies")))),
    ("a / b",): ({"a": (6, 36), "b": (2, 6)}, (
        ("{name} shares {a} {thing} equally among {b} children. How many {thing} does each child get?", ("cookies", "grapes", "sweets")),
        ("{name} puts {a} {thing} into {b} equal bags. How many {thing} are in each bag?", ("nails", "buttons", "beads")),
        ("{a} {thing} are divided equally over {b} shelves. How many {thing} are on each shelf?", ("novels", "atlases", "magazines")),
        ("{name} cuts {a} {thing} for {b} guests, the same number for each. How many {thing} does each guest get?",
         ("slices", "sandwiches", "cakes")),
        ("On a farm {name} loads {a} {thing} equally on {b} carts. How many {thing} are on each cart?",
         ("pumpkins", "cabbages", "turnips")))),
    ("a + b", "s1 - c"): ({"a": (4, 20), "b": (3, 15), "c": (2, 15)}, (
        ("{name} has {a} {thing}, gets {b} more, and then gives {c} away. How many {thing} does {name} have now?",
         ("toy cars", "puzzles", "kites")),
        ("{name} catches {a} {thing} and then {b} more. {c} of them swim away. How many {thing} are left?", ("crabs", "trout", "shrimps")),
        ("A hall has {a} {thing}. {name} brings {b} more and breaks {c} of them. How many {thing} are left?",
         ("benches", "stools", "lamps")),
        ("{name} earns {a} {thing} and finds {b} more. Then {name} loses {c} of them. How many {thing} are left?",
         ("points", "stars", "medals")),
        ("For a play {name} sews {a} {thing} in May and {b} more in June. Then {c} of them are given away. How many {thing} are left?",
         ("costumes", "masks", "capes")))),
    ("a - b", "s1 + c"): ({"a": (10, 30), "b": (3, 15), "c": (2, 15)}, (
        ("{name} has {a} {thing}, gives {b} away, and then buys {c} more. How many {thing} does {name} have now?",
         ("pens", "erasers", "rulers")),
        ("A tank holds {a} {thing}. {name} takes {b} of them out and puts {c} new ones in. How many {thing} are in the tank now?",
         ("goldfish", "turtles", "snails")),
        ("There are {a} {thing} in a field. {b} of them leave and {c} more come. How many {thing} are in the field now?",
         ("sheep", "goats", "cows")),
        ("{name} has {a} {thing}. {b} of them break, and {c} new ones arrive. How many {thing} are there now?",
         ("bulbs", "glasses", "tiles")),
        ("A bus carries {a} {thing}. When {name} looks, {b} of them leave and {c} more get on. How many {thing} are on the bus now?",
         ("tourists", "students", "nurses")))),
    ("a * b", "s1 + c"): ({"a": (2, 5), "b": (2, 7), "c": (2, 15)}, (
        ("{name} buys {a} packs with {b} {thing} in each pack and already has {c} {thing}. How many {thing} is that in all?",
         ("batteries", "napkins", "envelopes")),
        ("{name} fills {a} trays with {b} {thing} in each tray. There are {c} more {thing} in a bowl. How many {thing} is that in all?",
         ("eggs", "dumplings", "meatballs")),
        ("{name} walks {b} {thing} on each of {a} days, and then {c} more. How many {thing} is that in all?",
         ("miles", "blocks", "trails")),
        ("There are {a} crates with {b} {thing} in each crate, and {c} more on the floor. How many {thing} is that in all?",
         ("lemons", "melons", "onions")),
        ("{name} parks {a} rows with {b} {thing} in each row, and {c} more by the gate. How many {thing} is that in all?",
         ("bicycles", "scooters", "trucks")))),
    ("a * b", "s1 - c"): ({"a": (2, 6), "b": (3, 8), "c": (2, 15)}, (
        ("{name} buys {a} bags with {b} {thing} in each bag and eats {c} of them. How many {thing} are left?",
         ("cherries", "almonds", "raisins")),
        ("{name} sets {a} rows with {b} {thing} in each row. Then {c} of them are taken away. How many {thing} are left?",
         ("chess pieces", "bowls", "vials")),
        ("{a} hens lay {b} {thing} each. {name} sells {c} of them. How many {thing} are left?", ("brown eggs", "white eggs", "small eggs")),
        ("{name} prints {a} sheets with {b} {thing} on each sheet and uses {c} of them. How many {thing} are left?",
         ("labels", "cards", "photos")),
        ("At a wedding {name} sets {a} tables with {b} {thing} at each table. Then {c} of them are used. How many {thing} are left?",
         ("forks", "chairs", "menus")))),
}


def _templates(chosen: slice) -> tuple[Template, ...]:
    return tuple(
        Template(story, ONE_STEP if len(steps) == 1 else TWO_STEPS, steps, ranges, things)
        for steps, (ranges, stories) in _STORIES.items() for story, things in stories[chosen])


TRAIN_TEMPLATES = _templates(slice(None, -1))
HELD_OUT_TEMPLATES = _templates(slice(-1, None))


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
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    for path, problems in zip(paths, (generate(TRAIN_TEMPLATES, TRAIN_NAMES, train, seed),
                                      generate(HELD_OUT_TEMPLATES, HELD_OUT_NAMES, held_out, seed + 1)), strict=True):
        rows.write(path, ({"query": problem.query, "response": problem.response} for problem in problems))
    return paths


def answer_of(text: str) -> int | None:
    """N of the last `The answer is: N` in the text; None where there is none or N is no integer."""
    _, marker, tail = text.rpartition(ANSWER.rstrip())
    match = _INTEGER.match(tail) if marker else None
    return int(match[1].replace(",", "")) if match else None


def last_number(text: str) -> int | None:
    """The last integer anywhere in the text."""
    numbers = re.findall(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+|\d+)", text)
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
