"""What a rank makes of SIGTERM and SIGUSR1, before there is anything to save, while it trains, and at its end."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, signal, sys, time
from bone_ds import stopping

def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.2)

def hang():  # as in a collective: without the interpreter, and not to be interrupted
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

with stopping.listening(speaks=True) as stop:
    exec(sys.argv[1])
print("still here")
"""
STOPPED = 75


def run(program: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, program], capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_before_the_first_step_it_ends_at_once(name):
    assert run(f"send(signal.{name})") == (STOPPED, "", "")
    assert run(f"import threading; threading.Timer(0.3, send, [signal.{name}]).start(); hang()") == (STOPPED, "", "")


def test_while_training_it_is_kept():
    code, out, err = run("stop.keep(); print(stop.asked()); send(signal.SIGUSR1, 2); print(stop.asked(), stop.signal_name)")
    assert (code, out, err) == (0, "False\nTrue SIGUSR1\nstill here\n", "")  # two at once are one


def test_a_second_one_ends_it_even_within_a_collective():
    again = "import threading; threading.Timer(1.5, send, [signal.SIGUSR1]).start(); hang()"
    code, out, err = run(f"stop.keep(); send(signal.SIGTERM); {again}")
    assert (code, out) == (128 + signal.SIGUSR1, "")
    assert err == "bone-ds: ended at once by a second signal, SIGUSR1; checkpoints before it are whole\n"


def test_once_all_is_saved_it_is_let_be():
    code, out, err = run("stop.keep(); send(signal.SIGTERM); time.sleep(1); stop.heed(); send(signal.SIGTERM)")
    assert (code, out, err) == (0, "still here\n", "")


def test_after_an_error_it_ends_as_any_process():
    code, out, err = run("""
try:
    with stopping.listening(speaks=True) as inner:
        inner.keep()
        raise ValueError
except ValueError:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of the outer one
    send(signal.SIGTERM)
""")
    assert (code, out, err) == (-signal.SIGTERM, "", "")
