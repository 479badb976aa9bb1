"""SIGTERM and SIGUSR1 in a rank, as schedulers send them before they take a machine away.

While training the first one is kept for the end of the step, when all ranks agree on it, save and end; a second one ends the process at
once. Before that there is nothing to save, and the first one ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75
"""The exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again later". Neither a success, nor an
error (1, 2), nor what a shell says of a killed process (128 and more)."""
ONE_REQUEST_S = 1.0
"""Signals that come so close together are one request: a scheduler may signal every process of a job, and launchers pass theirs on."""


class StopRequest:
    """Whether this rank has been asked to stop."""

    def __init__(self, speaks: bool = False):
        """speaks: say on stderr that a second signal has ended the process."""
        self._speaks = speaks
        self._kept = self._heeded = False
        self._number: int | None = None
        self._asked_at = 0.0

    def asked(self) -> bool:
        return self._number is not None

    @property
    def signal_name(self) -> str | None:
        return signal.Signals(self._number).name if self.asked() else None

    def keep(self) -> None:
        """From now on there is something to save: a request is kept for the caller to look at."""
        self._kept = True

    def heed(self) -> None:
        """All that could be saved is; from now on the process ends by itself."""
        self._heeded = True

    def receive(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._heeded:
            return
        if not self._kept:
            os._exit(STOPPED)
        if not self.asked():
            self._number, self._asked_at = number, now
        elif now - self._asked_at > ONE_REQUEST_S:
            if self._speaks:
                print(f"bone-ds: ended at once by a second signal, {name}; checkpoints before it are whole", file=sys.stderr, flush=True)
            os._exit(128 + number)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """For a process that has nothing to save: a request ends it with STOPPED, unless it ignores them, or another handler takes over."""
    before = {number: signal.signal(number, lambda *_: os._exit(STOPPED))
              for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(speaks: bool) -> Iterator[StopRequest]:
    """Requests are taken by a thread, which is not held up by a collective or a kernel that the main thread is in.

    Afterwards, above all after an error, a signal ends the process as it does any: launchers send it to ranks that wait for one that
    is gone.
    """
    request = StopRequest(speaks)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # Python's handlers run in the main thread, between two of its instructions; what they do is left to the thread.
    before = {number: signal.signal(number, lambda number, frame: None) for number in STOP_SIGNALS}
    threading.Thread(target=_listen, args=(reader, request), daemon=True).start()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        writer.close()


def _listen(reader: socket.socket, request: StopRequest) -> None:
    with reader:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    request.receive(number)
