"""One run of a tiny model on two ranks that is killed and resumed until it is done, beside the same run left alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny
import tiny_rwkv
from started import Started, events

from bone_ds import adapter_file, checkpoint
from bone_ds.errors import CheckpointError
from bone_ds.run_directory import RunDirectory
from faults import moments
from faults.equality import differences
from faults.moments import LONGEST_S, Watch

OTHERS_END_S = 30
"""What all processes of a run have once one of them was killed."""
LAUNCHER, ONE_RANK, BOTH_RANKS = "launcher", "one rank", "both ranks"
STARTING, STEPPING, SAVING = "starting", "stepping", "saving"
COMMAND = ["bone_ds", "train", "run.yaml", "--ranks", "2"]
RWKV_SIZES = {"width": 36, "head_size": 12, "ffn_width": 63, "vocabulary": 256, "mix_rank": 3, "decay_rank": 5}
UNFINISHED = re.compile(r"--resume: .*/step-\d+\.partial: was never finished, removed")


@dataclass(frozen=True)
class Setting:
    """Of a run. Steps have 4 samples or packs, in two forward passes a rank; an epoch is 15 steps of samples, the last ragged, or fewer
    of packs."""

    architecture: str
    stage: int
    dtype: str
    packing: bool
    async_save: bool
    keep_best: bool
    steps: int = 40
    save_every: int = 2

    def config(self, model: Path, rows: Path, zero3: Path, cache: Path) -> dict:
        train = {"steps": self.steps, "global_batch_size": 4, "micro_batch_size": 1, "save_every": self.save_every, "keep_checkpoints": 3,
                 "keep_best": self.keep_best, "eval_every": self.save_every if self.keep_best else 10, "async_save": self.async_save,
                 "schedule": "cosine"}
        if self.architecture == "rwkv":
            train |= {"chunk_length": 32, "learning_rate": 3e-3}
        # An RWKV6 has so many small tensors that to gather each anew takes a busy machine minutes a step.
        gathers = self.stage == 3 and self.architecture == "llama"
        return tiny.config_tree(model, rows, Path("run"), model={"dtype": self.dtype, "cache_dir": str(cache)},
                                data={"packing": self.packing, "eval_samples": 4}, train=train,
                                deepspeed={"config": str(zero3) if gathers else f"zero{self.stage}"})


def run(directory: Path, setting: Setting, plan: Sequence[tuple[str, str]], draw: random.Random) -> dict:
    """The row of a chain. plan: victim and moment of each kill; fewer are done where the run is at its end before.

    The directory is removed where all was well.
    """
    whole, killed = _prepared(directory, setting)
    starting_s = _left_alone(whole)
    kills: list[dict] = []
    for number, (victim, moment) in enumerate(plan):
        start = _Start(killed, setting)
        if not start.comes_to(moment, len(plan) - number, starting_s, draw):
            break
        kills.append({"moment": moment} | start.is_killed(victim, draw))
        print(json.dumps({"kill": number} | kills[-1]), flush=True)
    else:
        start = _Start(killed, setting)
        start.watch.until(lambda: False, pause_s=0.1)
    last = start.has_ended()
    differ = differences(killed / "run", whole / "run") if last["ok"] else []
    ok = last["ok"] and not differ and all(kill["ok"] for kill in kills)
    if ok:
        shutil.rmtree(directory)
    return {"ok": ok, "setting": asdict(setting), "kills": kills, "last_start": last, "differences": differ,
            "steps_compared": setting.steps if last["ok"] else 0}


def _prepared(directory: Path, setting: Setting) -> tuple[Path, Path]:
    """Two directories whose run.yaml differ in the cache of the tokenised data alone."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows, zero3 = tiny.write_rows(directory / "rows.jsonl", count=61), tiny.write_zero3(directory / "zero3.json")
    model = directory / ("tiny.pth" if setting.architecture == "rwkv" else "model")
    if setting.architecture == "rwkv":
        tiny_rwkv.save_tiny(model, **RWKV_SIZES)
    else:
        tiny.write_model(model)
    places = directory / "whole", directory / "killed"
    for place in places:
        place.mkdir()
        (place / "run.yaml").write_text(json.dumps(setting.config(model, rows, zero3, cache=place / "cache")))
    return places


def _left_alone(directory: Path) -> float:
    """Seconds from the start to the first step."""
    begun = time.time()
    started = Started(directory, COMMAND)
    code = started.process.wait(LONGEST_S)
    assert code == 0, f"exit code {code}: {started.errors.read_text()}"
    return events(started.run, "step")[0]["time"] - begun


class _Start:
    """One start of the run: with --resume as soon as it has written its config."""

    def __init__(self, directory: Path, setting: Setting):
        self.setting, self.run = setting, RunDirectory(directory / "run")
        self.last = max(map(_step, checkpoint.existing(self.run.checkpoints)), default=0)
        """The step of the last checkpoint that was there before."""
        self.started = Started(directory, [*COMMAND, *["--resume"] * self.run.config.exists()])
        self.watch = Watch(self.started)

    def comes_to(self, moment: str, kills_left: int, starting_s: float, draw: random.Random) -> bool:
        """False where the run ends before. The steps that are left are shared among the kills that are."""
        if moment == STARTING:
            return moments.starting(self.watch, draw, starting_s)
        after = self.last + draw.randint(1, max(1, (self.setting.steps - self.last) // (kills_left + 1)))
        return (moments.saving if moment == SAVING else moments.stepping)(self.watch, draw, after)

    def is_killed(self, victim: str, draw: random.Random) -> dict:
        """The row of a kill: what was there, what is left, and what of that is not as it must be."""
        ranks, was_saving = self.watch.ranks(), self.watch.is_saving()
        chosen = {LAUNCHER: [], ONE_RANK: draw.sample(sorted(ranks), min(1, len(ranks))), BOTH_RANKS: sorted(ranks)}[victim]
        for process in [ranks[rank] for rank in chosen] or [self.started.process.pid]:  # where there are no ranks yet, the command
            os.kill(process, signal.SIGKILL)
        ended_s = self._others_end()
        self.watch.look()
        # A first rank that was left has finished what it wrote.
        was_saving = was_saving and (chosen == [1] or self.watch.is_saving())
        errors = self.started.errors.read_text().splitlines()
        published, not_whole = self._published()
        problems = [*not_whole, *self._adapter_is_damaged(), *self._went_on_wrongly(), *lost(self.run, self.setting, published),
                    *says_wrongly(chosen, self.started.process.returncode, errors)]
        if ended_s > OTHERS_END_S:
            problems.append(f"processes were left after {ended_s:.0f} s")
        return {
            "victim": victim if chosen else LAUNCHER, "ranks": chosen, "step": self.watch.step, "others_ended_s": round(ended_s, 2),
            "saving": self.watch.begun if was_saving else None,
            "unfinished": sorted(path.name for path in self.run.path.rglob("*.partial")), "errors": errors, "published": published,
            "not_whole": len(not_whole), **self._said(), "problems": problems, "ok": not problems}

    def has_ended(self) -> dict:
        """The same of the last start, which was not killed."""
        code = self.started.process.wait(LONGEST_S)
        self.watch.look()
        errors = self.started.errors.read_text().splitlines()
        published, problems = self._published()
        problems += [*self._adapter_is_damaged(), *self._went_on_wrongly()]
        if code or errors or self.started.processes():
            problems.append(f"exit code {code}, processes {sorted(self.started.processes())}")
        return {"errors": errors, "published": published, **self._said(), "problems": problems, "ok": not problems}

    def _others_end(self) -> float:
        """Seconds until no process of the run lives; those that live on are killed in the end."""
        killed = time.monotonic()
        while (left := self.started.processes()) and time.monotonic() < killed + 2 * OTHERS_END_S:
            self.started.process.poll()
            time.sleep(0.02)
        ended_s = time.monotonic() - killed
        for process in left:
            os.kill(process, signal.SIGKILL)
        self.started.process.wait()
        return ended_s

    def _published(self) -> tuple[list[int], list[str]]:
        """The steps of the checkpoints that are whole, and what is wrong with others."""
        whole, problems = [], []
        for path in checkpoint.existing(self.run.checkpoints):
            try:
                whole.append(checkpoint.verify(path).step)
            except CheckpointError as error:
                problems.append(str(error))
        return whole, problems

    def _adapter_is_damaged(self) -> list[str]:
        try:
            if self.run.adapter.exists():
                adapter_file.read(self.run.adapter)
        except CheckpointError as error:
            return [str(error)]
        return []

    def _went_on_wrongly(self) -> list[str]:
        """Whether it took another checkpoint than the last one that was there, or passed over any."""
        problems = [line for line in self._said()["said"] if not UNFINISHED.fullmatch(line)]
        if self.watch.start and self.watch.start["step"] != self.last:
            problems.append(f"went on from step {self.watch.start['step']}, not {self.last}")
        return problems

    def _said(self) -> dict:
        said = [line for line in self.started.printed.read_text().splitlines() if line.startswith("--resume: ")]
        return {"resumed_from": self.last if self.watch.start else None, "said": said}

def lost(run: RunDirectory, setting: Setting, published: list[int]) -> list[str]:
    """Whether more is gone than the steps since the last checkpoint; one that is written beside the steps may be on its way."""
    recorded = max((event["step"] for event in events(run.path, "step")[-1:]), default=0)
    due = (recorded - 1) // setting.save_every * setting.save_every - setting.save_every * setting.async_save
    due = max([due, *(event["step"] for event in events(run.path, "checkpoint"))])
    last = max(published, default=0)
    return [] if last >= due else [f"the last checkpoint is of step {last}, but that of {due} had been saved"]


def says_wrongly(ranks: list[int], code: int, errors: list[str]) -> list[str]:
    """After these ranks were killed, or none of them but the launcher."""
    if not ranks:
        return [] if (code, errors) == (-signal.SIGKILL, []) else [f"exit code {code}, said {errors}"]
    lines = [f"bone-ds: rank {rank} was killed by signal 9 (SIGKILL), the others were ended" for rank in ranks]
    said = len(errors) == 2 and errors[0] in lines and errors[1].startswith("SIGKILL is what the system sends when memory runs out: ")
    if code == 128 + signal.SIGKILL and said:
        return []
    return [f"exit code {code}, said {errors}"]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
