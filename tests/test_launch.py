"""Who a process is among the ranks, which GPUs they get, and that no rank outlives the command that started it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from started import ROOT

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


STEP = {"SLURM_JOB_ID": "257", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_STEP_NODELIST": "rack[1-2]-node[007-008]", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    """What a task of a Slurm step is to torch."""
    environ = dict(environ)
    launch.adopt_slurm_step(environ)
    return environ


def test_a_task_of_a_slurm_step_is_a_rank():
    environ = adopted(STEP)
    assert launch.current(environ) == Ranks(5, 1, 7, 2)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("rack1-node007", str(61_440 + 17))
    alone = adopted(STEP | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert launch.current(alone) == Ranks(6, 0, 7, 1) and alone["MASTER_PORT"] == environ["MASTER_PORT"]
    assert adopted(STEP | {"SLURM_STEP_ID": "2"})["MASTER_PORT"] != environ["MASTER_PORT"]


@pytest.mark.parametrize("nodes, first", [
    ("a1,a2", "a1"), ("a[07-09]", "a07"), ("a[3,5-6]x,b", "a3x"), ("login", "login"), ("gpu-b[12]", "gpu-b12")])
def test_the_first_host_of_a_slurm_step(nodes, first):
    assert adopted(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_whoever_says_more_than_slurm_wins():
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert adopted(STEP | torchrun) == STEP | torchrun
    meeting = {"MASTER_ADDR": "there", "MASTER_PORT": "2"}
    assert adopted(STEP | meeting).items() >= meeting.items()


@pytest.mark.parametrize("changed", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}, {"SLURM_PTY_PORT": "40001"}],
                         ids=["srun -n 1", "job script", "srun --pty"])
def test_a_single_slurm_task_is_no_rank(changed):
    environ = {name: value for name, value in (STEP | changed).items() if value is not None}
    assert adopted(environ) == environ and launch.current(environ) is None


@pytest.mark.parametrize("visible, ranks, devices", [
    (None, 2, ["0", "1"]), ("2,3", 2, ["2", "3"]), (" 5, 7 ,", 1, ["5"]), ("GPU-ab,GPU-cd", 2, ["GPU-ab", "GPU-cd"]),
    ("", 2, ["-1", "-1"]), ("-1", 2, ["-1", "-1"])])
def test_ranks_take_the_gpus_that_are_visible(visible, ranks, devices):
    assert launch._devices(ranks, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == devices


def test_more_ranks_than_visible_gpus():
    with pytest.raises(ConfigError, match="--ranks: 3 is more than the 2 of CUDA_VISIBLE_DEVICES: 2,3"):
        launch._devices(3, {"CUDA_VISIBLE_DEVICES": "2,3"})


def ranks_of(program: str, ranks: int = 2) -> int:
    environments = [os.environ | {"RANK": str(rank)} for rank in range(ranks)]
    return launch._run_to_their_end([sys.executable, "-c", f"import os, signal, time; rank = os.environ['RANK']\n{program}"], environments)


@pytest.mark.parametrize("program, code", [
    ("", 0), ("raise SystemExit(2)", 2), ("raise SystemExit(int(rank))", 1), ("raise SystemExit(75)", 75), ("raise SystemExit(-9)", 247)])
def test_exit_code(program, code, capfd):
    assert ranks_of(program) == code
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)} == {signal.SIG_DFL}


def test_a_killed_rank_is_named_and_the_others_end(monkeypatch, capfd):
    """Rank 0 dies of SIGTERM, and rank 2 hangs: it is given a while."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    code = ranks_of("""
if rank == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if rank == "1":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(100)
""", ranks=3)
    assert code == 128 + signal.SIGSEGV
    printed = capfd.readouterr()
    assert printed.err == "bone-ds: rank 1 was killed by signal 11 (SIGSEGV), the others were ended\n"
    assert len(printed.out.split()) == 3 and all(ended(int(pid)) for pid in printed.out.split())


# A rank that ignores polite requests, as one in the middle of a collective does, and one that does as it is asked.
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
POLITE = "[signal.signal(number, lambda number, _: os._exit(75)) for number in (signal.SIGTERM, signal.SIGUSR1)]"


def started(ranks: list[str]) -> tuple[subprocess.Popen, list[int]]:
    """`bone-ds` stood in for by a process with these ranks, and their process ids."""
    rank = f"import os, signal, time; exec({ranks!r}[int(os.environ['RANK'])]); os.write(1, b'%d\\n' % os.getpid()); time.sleep(100)"
    program = f"""
import os, sys
from bone_ds import launch
environments = [os.environ | {{"RANK": str(rank)}} for rank in range({len(ranks)})]
sys.exit(launch._run_to_their_end([sys.executable, "-c", {rank!r}], environments))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return parent, [int(parent.stdout.readline()) for _ in ranks]


def ends(parent: subprocess.Popen, pids: list[int]) -> int:
    _, err = parent.communicate(timeout=20)
    assert err == "" and all(map(ended, pids))
    return parent.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_ranks_end_with_the_command(number):
    parent, pids = started([STUBBORN, STUBBORN])
    parent.send_signal(number)
    assert ends(parent, pids) == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_passed_on_to_every_rank(number):
    parent, pids = started([POLITE, POLITE])
    parent.send_signal(number)
    assert ends(parent, pids) == 75


def test_a_request_that_ranks_do_not_listen_to_yet_finds_nothing_to_save():
    parent, pids = started(["", ""])
    parent.send_signal(signal.SIGTERM)
    assert ends(parent, pids) == 75


def test_a_second_request_ends_all():
    """A scheduler and a script that passes its signals on are one request, more than a second later it is another."""
    parent, pids = started([STUBBORN, STUBBORN])
    parent.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    parent.send_signal(signal.SIGUSR1)
    time.sleep(1.2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert ends(parent, pids) == 128 + signal.SIGTERM


def test_a_request_before_there_are_ranks_has_nothing_to_save():
    program = """
import time
from bone_ds import stopping
with stopping.ending_at_once():
    print("ready", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75


def test_processes_of_a_pool_end_with_a_rank_that_is_killed(tmp_path):
    program = tmp_path / "pool.py"
    program.write_text("""
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from bone_ds import child_process
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), child_process.end_with, (os.getpid(),))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(100)
""")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ) as process:
        worker = int(process.stdout.readline())
        process.kill()
    assert ended(worker)


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
