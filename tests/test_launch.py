"""Who a process is among the ranks, which GPUs they get, and that no rank outlives the command that started it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bone_ds import launch
from bone_ds.errors import ConfigError
from bone_ds.launch import Ranks


def test_no_launcher_started_this_process():
    assert launch.current({}) is None
    assert launch.current({"RANK": "0"}) is None


@pytest.mark.parametrize("environ, ranks", [
    ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, Ranks(3, 1, 4, 2)),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, Ranks(0, 0, 2, 2)),
    ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 1, 2, 2)),
], ids=["deepspeed", "torchrun", "by hand"])
def test_a_launcher_started_this_process(environ, ranks):
    assert launch.current(environ) == ranks
    assert ranks.is_first == (ranks.rank == 0)


@pytest.mark.parametrize("visible, ranks, devices", [
    (None, 2, ["0", "1"]), ("2,3", 2, ["2", "3"]), (" 5, 7 ,", 1, ["5"]), ("GPU-ab,GPU-cd", 2, ["GPU-ab", "GPU-cd"]),
    ("", 2, ["-1", "-1"]), ("-1", 2, ["-1", "-1"])])
def test_ranks_take_the_gpus_that_are_visible(visible, ranks, devices):
    assert launch._devices(ranks, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == devices


def test_more_ranks_than_visible_gpus():
    with pytest.raises(ConfigError, match="--ranks: 3 is more than the 2 of CUDA_VISIBLE_DEVICES: 2,3"):
        launch._devices(3, {"CUDA_VISIBLE_DEVICES": "2,3"})


@pytest.mark.parametrize("program, code", [
    ("", 0), ("raise SystemExit(2)", 2), ("raise SystemExit(1)", 1), ("import os; os.kill(os.getpid(), 9)", 128 + 9),
    ("raise SystemExit(-9)", 128 + 9)])
def test_exit_code(program, code):
    assert launch._run_to_its_end([sys.executable, "-c", program]) == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# A launcher with one rank that ignores polite requests, as one in the middle of a collective does.
LAUNCHER = """
import subprocess, sys
rank = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(100)"
subprocess.run([sys.executable, "-c", rank])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_end_with_the_command(number):
    program = f"import sys; from bone_ds import launch; sys.exit(launch._run_to_its_end([sys.executable, '-c', {LAUNCHER!r}]))"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rank = int(parent.stdout.readline())
    parent.send_signal(number)
    assert parent.wait(timeout=20) == 128 + number
    assert parent.stderr.read() == ""
    assert ended(rank)
    parent.stdout.close()
    parent.stderr.close()


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True  # nobody has collected its exit code yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False
