"""Runs that are asked to stop, lose a rank, hang, meet NaN or run out of memory: what is saved, what is said, with which exit code."""

import json
import os
import resource
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from started import Started, events
from tiny_llama import save_tiny, tiny_tokens

from bone_ds import engine as engines
from bone_ds import restarts, train
from bone_ds.cli import main
from bone_ds.config import validate
from bone_ds.engine import compiler_lock, lost_ranks
from bone_ds.errors import ConfigError, DataError, LostRankError, MemoryLimitError
from bone_ds.launch import Ranks
from bone_ds.run_directory import RunDirectory
from bone_ds.stopping import STOPPED, StopRequest

STEPS = 20_000
"""Of a run that is to be ended from outside."""


# Whole runs on two ranks.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with a config of a long run in it."""
    directory = tmp_path_factory.mktemp("faults")
    model, rows = tiny.write_model(directory / "model"), tiny.write_rows(directory / "rows.jsonl")
    train = {"steps": STEPS, "save_every": 0, "eval_every": 0, "schedule": "constant"}
    tree = tiny.config_tree(model, rows, directory / "run", train=train, deepspeed={"config": "zero2"})
    del tree["data"]["eval"]
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    return directory


TRAIN = ["bone_ds", "train", "run.yaml"]


def test_a_run_goes_on_whatever_happens_to_a_rank_until_one_is_asked_to_stop(prepared):
    """Rank 1 is killed; in the restart it hangs; in the next it alone is asked to stop."""
    started = Started(prepared, [*TRAIN, "--ranks", "2", "--max-restarts", "5", "train.save_every=2", "train.collective_timeout_s=3"])
    for what in (signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1):
        started.wait_for_steps(3)
        os.kill(started.ranks()[1], what)
        done, at = len(events(started.run, "start")), time.monotonic()
        while what != signal.SIGUSR1 and len(events(started.run, "start")) == done:
            assert started.process.poll() is None and time.monotonic() < at + 100, started.errors.read_text()
            time.sleep(0.05)
        started.steps_before = len(events(started.run, "step"))
    code, errors = started.ends()
    assert (code, errors.splitlines()) == (STOPPED, [
        "bone-ds: rank 1 was killed by signal 9 (SIGKILL), the others were ended",
        "bone-ds: exit code 137; restart 1 of 5 from the last checkpoint",
        "bone-ds: rank 1 does not answer: it hangs, or its host is gone",
        "bone-ds: exit code 1; restart 2 of 5 from the last checkpoint"])
    assert [start["step"] > 0 for start in events(started.run, "start")] == [False, True, True]
    (stop,) = events(started.run, "stop")
    last_step, saved = (events(started.run, kind)[-1]["step"] for kind in ("step", "checkpoint"))
    assert stop["signal"] is None and stop["step"] == last_step == saved
    assert "stopped by a signal to another rank after step" in (started.run / "log.txt").read_text().splitlines()[-1]


def test_the_launcher_is_killed_or_signalled_while_the_run_loads(prepared, tmp_path):
    (tmp_path / "run.yaml").write_text((prepared / "run.yaml").read_text().replace(str(prepared / "run"), str(tmp_path / "run")))
    started = Started(tmp_path, [*TRAIN, "--ranks", "2"])
    while len(started.ranks()) < 2:
        time.sleep(0.02)
    time.sleep(1)  # its imports take longer
    started.process.send_signal(signal.SIGTERM)
    assert started.ends() == (STOPPED, "")
    assert not started.run.exists()
    again = Started(tmp_path, [*TRAIN, "--ranks", "2"])
    while len(again.ranks()) < 2:
        time.sleep(0.02)
    again.process.kill()
    again.process.wait()
    time.sleep(0.5)
    assert again.ranks() == {}


def test_torchrun_is_asked_to_stop(prepared, tmp_path):
    (tmp_path / "run.yaml").write_text((prepared / "run.yaml").read_text().replace(str(prepared / "run"), str(tmp_path / "run")))
    started = Started(tmp_path, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *TRAIN])
    started.wait_for_steps(2)
    started.process.send_signal(signal.SIGTERM)
    assert started.ends()[0] != 0
    (stop,) = events(started.run, "stop")
    assert stop["signal"] == "SIGTERM" and stop["step"] == len(events(started.run, "step")) == events(started.run, "checkpoint")[-1]["step"]


# Restarts, with a run stood in for.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Starts of a run that end as told: [(exit code, steps made)]; returns what was started, and the run."""
    run, started, ends = RunDirectory(tmp_path / "run"), [], []
    run.path.mkdir()

    def start(arguments, ranks):
        started.append(arguments)
        code, steps = ends.pop(0)
        if steps is None:  # it broke before it had loaded the model
            return code
        run.config.touch()
        with run.events.open("a") as file:
            file.write('{"event": "start"}\n' + '{"event": "step"}\n' * steps + '{"event": "st')
            file.write("\n")
        return code

    monkeypatch.setattr(restarts.launch, "start", start)
    return run, started, ends


@pytest.mark.parametrize("outcomes, code, starts", [
    ([(0, 9)], 0, 1), ([(1, 3), (137, 1), (0, 5)], 0, 3), ([(1, 3), (1, 3), (1, 3), (1, 3)], 1, 4), ([(2, 1)], 2, 1), ([(75, 1)], 75, 1),
    ([(130, 1)], 130, 1), ([(143, 1)], 143, 1), ([(134, 3), (134, 0)], 134, 2), ([(1, 3), (2, 0)], 2, 2), ([(1, 0), (1, 1), (1, 0)], 1, 3),
    ([(1, 0), (1, 1), (0, 3)], 0, 3)])
def test_restarts(stand_in, outcomes, code, starts, capsys):
    run, started, ends = stand_in
    ends += outcomes
    assert restarts.start(["train", "a.yaml"], 2, run, 3) == code
    given = ["train", "a.yaml", "--max-restarts", "0"]
    assert started == [given] + [[*given, "--resume"]] * (starts - 1)
    said = capsys.readouterr().err
    assert said.count("restart") - said.count("made no step") == starts - 1
    assert ("made no step" in said) == (outcomes[-1][1] == 0 and code != 2)


def test_a_run_that_left_nothing_is_started_as_it_was(stand_in, capsys):
    run, started, ends = stand_in
    ends += [(1, None), (1, None)]
    assert restarts.start(["train", "a.yaml"], 2, run, 3) == 1
    assert started == [["train", "a.yaml", "--max-restarts", "0"]] * 2
    assert capsys.readouterr().err.endswith("bone-ds: exit code 1; restart 1 made no step, so there is no other\n")


def test_a_run_that_goes_back_to_an_earlier_checkpoint_is_sent_there_until_it_has_begun(stand_in):
    run, started, ends = stand_in
    run.config.touch()
    ends += [(1, None), (1, 2), (0, 1)]
    given = ["train", "a.yaml", "--resume", "run/checkpoints/step-00000300", "--max-restarts", "0"]
    assert restarts.start(given[:-2], 2, run, 3) == 0
    assert started == [given, given, [*given, "--resume"]]


def test_restarts_belong_to_the_command_alone(prepared, alone, capsys):
    assert main(["train", str(prepared / "run.yaml"), "--max-restarts", "1", f"output.directory={prepared}/other"]) == 2
    assert "--max-restarts: 1 is for `bone-ds train` without another launcher" in capsys.readouterr().err


# One rank, in this process.


@pytest.fixture
def alone(monkeypatch):
    """This process as the one rank of a run."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    return Ranks(0, 0, 1, 1)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch and deepspeed
BAD = "h"
"""The letter whose embedding is NaN."""


@pytest.fixture(scope="module")
def model_with_nan(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nan") / "model"
    save_tiny(directory, **tiny.ODD_SIZES)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][tiny_tokens()[BAD]] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tree_of(directory: Path, model: Path, questions: list[str], **train) -> dict:
    """A sample a question, two in a step, one in a forward pass; the first row of all has nothing to learn and is left out."""
    rows = [{"q": question, "a": "" if number == 0 else "a"} for number, question in enumerate(["e", *questions])]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny.config_tree(model, directory / "rows.jsonl", directory / "run", train={
        "steps": len(questions) // 2, "global_batch_size": 2, "micro_batch_size": 1, "eval_every": 0, "save_every": 0} | train)
    del tree["data"]["eval"]
    return tree


def test_bad_rows_are_named_and_passed_over(model_with_nan, alone, tmp_path, capsys):
    questions = ["ab", "cd", "ef", f"a{BAD}", "ba", "dc", f"{BAD}b", "fe"]
    tree = tree_of(tmp_path, model_with_nan, questions, on_nan="skip")
    result = train.train(validate(tree, "case"), alone)
    found = events(result.directory, "bad_step")
    assert sorted(row for event in found for _, row in event["samples"]) == [5, 8]  # not those that were beside them in the step
    assert {source for event in found for source, _ in event["samples"]} == {str(tmp_path / "rows.jsonl")}
    losses = {event["step"]: event["loss"] for event in events(result.directory, "step")}
    assert len(losses) == 4 and {event["step"] for event in found} == {step for step, loss in losses.items() if loss != loss}
    assert all(tensor.isfinite().all() for tensor in load_file(result.directory / "adapter.safetensors").values())
    log = (result.directory / "log.txt").read_text()
    assert log in capsys.readouterr().out and f"no weight was changed; its samples: {tmp_path / 'rows.jsonl'}: row " in log


@pytest.mark.parametrize("policy, most", [({}, 0), ({"on_nan": "skip", "max_skipped": 2}, 2)])
def test_a_run_of_bad_steps_ends(model_with_nan, alone, tmp_path, policy, most):
    tree = tree_of(tmp_path, model_with_nan, [f"a{BAD}"] * 8, **policy)
    with pytest.raises(DataError, match=f"step {most + 1}: loss nan, gradient norm nan.*checkpoints before it are whole") as error:
        train.train(validate(tree, "case"), alone)
    assert (f"and so the {most} before it" in str(error.value)) == (most > 0) and str(error.value).count("\n") == 1
    found = events(tmp_path / "run", "bad_step")
    assert [event["in_a_row"] for event in found] == list(range(1, most + 2)) and all(len(event["samples"]) == 2 for event in found)


def test_a_row_of_bad_steps_begins_anew_after_a_good_one(model_with_nan, alone, tmp_path):
    tree = tree_of(tmp_path, model_with_nan, [f"a{BAD}"] * 4 + ["ab"] * 12, on_nan="skip", max_skipped=3)
    result = train.train(validate(tree, "case"), alone)
    in_a_row = [event["in_a_row"] for event in events(result.directory, "bad_step")]
    assert in_a_row.count(1) > 1 and not result.stopped


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_request_is_met_at_the_end_of_the_step(prepared, alone, tmp_path, monkeypatch, goes_on):
    """One that comes in the last step changes nothing: the run is done."""
    tree = yaml.safe_load((prepared / "run.yaml").read_text()) | {"output": {"directory": str(tmp_path / "run")}}
    tree["train"]["steps"] = 4 if goes_on else 2
    stop, step = StopRequest(), train.optimizer_step

    def asked_in_the_second(*arguments):
        *given, asked = arguments
        if len(events(tmp_path / "run", "step")) == 1:
            stop.receive(signal.SIGUSR1)
        return step(*given, asked)

    monkeypatch.setattr(train, "optimizer_step", asked_in_the_second)
    result = train.train(validate(tree, "case"), alone, stop=stop)
    assert (result.steps, result.stopped) == (2, goes_on)
    assert [event["event"] for event in map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())] == [
        "start", "step", "step", "checkpoint", "stop" if goes_on else "end"]


@pytest.mark.parametrize("stays_low", [False, True])
def test_memory_that_runs_out_is_explained(prepared, alone, tmp_path, monkeypatch, stays_low):
    """Under a limit of the system, from torch's own allocator; with memory to plan a change with, and without."""
    tree = yaml.safe_load((prepared / "run.yaml").read_text()) | {"output": {"directory": str(tmp_path / "run")}}
    tree["train"] |= {"activation_checkpointing": "layer", "micro_batch_size": 1}  # few changes are left to try
    unlimited = resource.getrlimit(resource.RLIMIT_AS)

    def too_much(*_):
        resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + 2**24, unlimited[1]))
        try:
            torch.empty(2**31, dtype=torch.uint8)
        finally:
            if not stays_low:
                resource.setrlimit(resource.RLIMIT_AS, unlimited)

    def virtual_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    monkeypatch.setattr(train, "optimizer_step", too_much)
    if stays_low:
        monkeypatch.setattr(train.plan, "of_run", planning_fails_at_the_second_call(train.plan.of_run))
    try:
        with pytest.raises(MemoryLimitError) as error:
            train.train(validate(tree, "case"), alone)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    first, second = str(error.value).splitlines()
    assert first.startswith("rank 0: memory ran out: ") and "allocate memory: you tried to allocate 2147483648 bytes" in first
    assert second.startswith("Planned were 0.") and "GiB a rank (" in second and "context 0." in second
    assert ("lower data.max_length" if stays_low else "no change of the configuration that was tried needs much less") in second


def planning_fails_at_the_second_call(of_run):
    calls = []

    def planned(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return of_run(*arguments, **options)

    return planned


@pytest.mark.parametrize("hosts, place, here, which, speaks", [
    ("aabb", (0, 0), [0, 1], "ranks 2, 3 on b do", True), ("aabb", (1, 1), [0, 1], "ranks 2, 3 on b do", False),
    ("aabb", (2, 0), None, "rank 0 on a does", True), ("aabb", (3, 1), None, "rank 0 on a does", False),
    ("aabb", (1, 1), None, "rank 0 on a does", True), ("aaaa", (0, 0), [0, 1, 3], "rank 2 does", True),
    ("aabc", (0, 0), [0], "ranks 1, 2, 3 on a, b, c do", True)])
def test_lost_ranks_are_named_with_their_hosts_once_a_host(monkeypatch, hosts, place, here, which, speaks):
    """place: rank and local rank. here: those that answer; None where nobody can be asked."""
    monkeypatch.setattr(lost_ranks, "_here", lambda ranks: here)
    error = lost_ranks.described(RuntimeError("gloo: Timed out waiting 5000ms"), Ranks(*place, 4, 2), list(hosts))
    assert str(error) == f"{which} not answer: it hangs, or its host is gone" and error.speaks == speaks and error.hangs


def test_ranks_that_never_come_are_waited_for_and_counted(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    impatient = partial(engines.deepspeed.init_distributed, timeout=timedelta(seconds=1))
    monkeypatch.setattr(engines.deepspeed, "init_distributed", impatient)
    with pytest.raises(LostRankError, match="rank 0 has not met the others at the start: .*1/2 clients joined") as error:
        with engines.distributed(Ranks(0, 0, 2, 1)):
            raise AssertionError
    assert error.value.speaks


def test_groups_made_by_deepspeed_wait_no_longer_than_told(alone):
    from torch.distributed import distributed_c10d as c10d

    with engines.distributed(alone):
        torch.distributed.new_group([0])
        engines.limit_waiting(12.5)
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in c10d._world.pg_map]
    assert len(timeouts) >= 2 and {timeout.total_seconds() for timeout in timeouts} == {12.5}


def test_a_lock_that_a_killed_build_left_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiles = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    compiler_lock.check(compiles)
    lock = tmp_path / "quantizer" / "lock"
    lock.touch()
    with pytest.raises(ConfigError, match=f"{lock}: is left from a build that was killed.*zero_quantized_weights.*remove it"):
        compiler_lock.check(compiles)
    compiler_lock.check({"zero_optimization": {"stage": 3}})
    with lock.open():  # as a build does
        compiler_lock.check(compiles)
