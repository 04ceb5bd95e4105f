"""Signals that ask a run to end: it finishes the step, saves, and exits with a code that means "start me again".

SIGUSR1 (a scheduler, before the time limit), SIGTERM (preemption) and SIGINT (a person) are one request, and
launchers hand on what the scheduler has sent to everybody already: what comes within a few seconds is the same
request. A later one ends the process at once. A thread reads the signals from a pipe, because the main thread may
stand in a collective, where no handler of Python's runs. The request belongs to the process, as its signals do.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SAME_REQUEST = 5.0  # seconds


class InterruptError(BaseException):
    """The run was asked to end, and everything worth keeping is saved; no error that a reader of rows may catch."""


class _Request:
    """What was asked of this process so far."""

    name: str | None = None  # of the first signal
    since = 0.0  # time.monotonic() of it
    at_once = False  # the main thread may be interrupted where it stands


_request = _Request()


def requested() -> str | None:
    """The name of the signal that asked this process to end, or None."""
    return _request.name


def signal_name(number: int) -> str:
    """ "SIGTERM" of 15."""
    return signal.Signals(number).name


def request(name: str) -> None:
    """Ask this process to end as a signal would; the first one counts."""
    if _request.name is None:
        _request.name, _request.since = name, time.monotonic()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a request raises `InterruptError` in the main thread: for long work that leaves nothing half done."""
    _request.at_once = True
    try:
        if _request.name is not None:
            raise InterruptError(_request.name)
        yield
    finally:
        _request.at_once = False


def install() -> None:
    """Listen from now on; in a process's main thread only, and best in its first lines."""
    if threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=ignore)


def ignore() -> None:
    """Hear no signal any more: a loader's worker goes on until its parent has finished the step, and a rank that has saved ends."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    request(signal.Signals(number).name)
    if _request.at_once:
        _request.at_once = False
        raise InterruptError(_request.name)


def _listen(reading: int) -> None:
    """Note every signal as it comes; the second request ends the process."""
    heard = False  # a first one: it may be read late
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:
            continue
        request(signal.Signals(number).name)
        first, heard = not heard, True
        if not first and time.monotonic() - _request.since > SAME_REQUEST:
            os.write(2, f"a second {signal.Signals(number).name}: ending at once\n".encode())
            os._exit(128 + number)
