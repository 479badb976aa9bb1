"""A run directory belongs to one process, as long as that lives."""

import errno
import fcntl
import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bone_ds import run_lock
from bone_ds.errors import CheckpointError, ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from bone_ds import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of the directory."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_of_the_first_until_that_is_killed(tmp_path, other):
    named = f"output.directory: {tmp_path}: another run goes on there, process {other.pid} on {platform.node()}; wait"
    for attempt in (run_lock.check, lambda directory: run_lock.held(directory).__enter__()):
        with pytest.raises(ConfigError) as error:
            attempt(tmp_path)
        assert str(error.value).startswith(named)
    other.kill()
    other.wait()
    run_lock.check(tmp_path)
    with run_lock.held(tmp_path):
        pass


def test_the_lock_ends_with_the_block_and_checking_creates_nothing(tmp_path):
    run_lock.check(tmp_path)
    assert not any(tmp_path.iterdir())
    for _ in range(2):
        with run_lock.held(tmp_path), pytest.raises(ConfigError, match=f"process .* on {platform.node()}"):
            run_lock.check(tmp_path)
        run_lock.check(tmp_path)


def test_a_check_that_has_the_lock_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    attempts = iter([BlockingIOError, BlockingIOError, None])

    def flock(file, how, flock=fcntl.flock):
        if failure := next(attempts):
            raise failure
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock.held(tmp_path):
        assert next(attempts, "all made") == "all made"


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_lock.os, "write", write)
        with pytest.raises(CheckpointError, match=f"{tmp_path / 'lock'}: can't be written: No space left on device"):
            run_lock.held(tmp_path).__enter__()
    with run_lock.held(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_done_without(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "bone_ds"), run_lock.held(tmp_path):
        pass
    run_lock.check(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'lock'}: can't be locked (No locks available); nothing keeps a second run out"]
