"""Runs of two ranks that are killed at random moments and resumed, until they are done: equal to the bit to those that never were.

Chains (`chain.py`): one run of a tiny model is started, killed with SIGKILL, started again with --resume, killed, and so on to its end.
"""

from __future__ import annotations

import random
from functools import partial

from rows import Row

from faults import chain
from faults.chain import BOTH_RANKS, LAUNCHER, ONE_RANK, OTHERS_END_S, SAVING, STARTING, STEPPING, Setting
from faults.harness import Harness

COUNT = 100
"""Of 16 chains: each stage, in fp32 and bf16, with a LLaMA and an RWKV6."""
SHORT = Setting("llama", stage=2, dtype="fp32", packing=False, async_save=False, keep_best=False, steps=12)
SHORT_PLAN = ((LAUNCHER, SAVING), (ONE_RANK, STEPPING), (BOTH_RANKS, SAVING))


def run(harness: Harness) -> list[Row]:
    if harness.quick:
        name = "short chain"
        harness.attempt(name, partial(chain.run, harness.work / name, SHORT, SHORT_PLAN, harness.draw(name)))
        return []
    wanted, number = harness.count or COUNT, 0
    while (left := wanted - len(_kills(harness))) > 0:
        name = f"chain {number:02d}"
        draw = harness.draw(name)
        setting, plan = _setting(number, draw), _plan(number, draw)[:left]
        row = harness.attempt(name, partial(chain.run, harness.work / name, setting, plan, draw))
        if row is None or not row.get("kills"):  # the time is up, or not even a run that is left alone comes to its end
            break
        number += 1
    return _figures(_kills(harness))


def _kills(harness: Harness) -> list[dict]:
    return [kill for row in harness.results.measured.values() for kill in row.get("kills", ())]


def _figures(kills: list[dict]) -> list[Row]:
    tried = f"of {len(kills)}"
    return [
        Row("kills after which all was as it must be", sum(kill["ok"] for kill in kills), tried, at_least=len(kills)),
        Row("of them inside checkpoint writing", sum(kill["saving"] is not None for kill in kills), tried, at_least=len(kills) / 3),
        Row("checkpoints verified after the kills", sum(len(kill["published"]) for kill in kills), "checkpoints"),
        Row("published ones that were not whole", sum(kill["not_whole"] for kill in kills), "checkpoints", at_most=0),
        Row("until no process of the run was left, at most", max((kill["others_ended_s"] for kill in kills), default=0.0), "s",
            at_most=OTHERS_END_S)]


def _setting(number: int, draw: random.Random) -> Setting:
    return Setting(
        architecture=("llama", "rwkv")[number // 4 % 2], stage=number % 4, dtype=("fp32", "bf16")[(number + number // 8) % 2],
        packing=(number // 2 + number // 8) % 2 == 0, async_save=draw.random() < 0.5, keep_best=draw.random() < 0.5)


def _plan(number: int, draw: random.Random) -> list[tuple[str, str]]:
    """Six or seven kills, of which two or three inside checkpoint writing."""
    count = 7 if number % 4 == 0 else 6
    kinds = [SAVING] * (2 + number % 2) + [STARTING] * (number % 3 == 0)
    kinds += [STEPPING] * (count - len(kinds))
    draw.shuffle(kinds)
    victims = [(LAUNCHER, ONE_RANK, BOTH_RANKS)[(number + kill) % 3] for kill in range(count)]
    return list(zip(victims, kinds, strict=True))
