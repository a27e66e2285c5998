"""A fork waits for threads that are ending. What forked children compute: tests/model/test_forks.py."""

from __future__ import annotations

import _thread
import hashlib
import threading
import time

import pytest

from exl import forks

pytestmark = pytest.mark.skipif(not forks._TASKS.is_dir(), reason="no /proc/self/task")


def compute(rounds: int) -> None:
    """Without Python's lock, as a thread that has left Python."""
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", rounds)


class UnknownThread:
    """Python's ``threading`` does not know it: for a fork it is like one that was joined and is ending."""

    def __init__(self, work) -> None:
        self.has_begun, self.has_ended = threading.Event(), threading.Event()
        self._work = work
        _thread.start_new_thread(self._run, ())
        assert self.has_begun.wait(30)

    def _run(self) -> None:
        self.has_begun.set()
        self._work()
        self.has_ended.set()


def eventually_something_runs() -> None:
    while not forks._an_unknown_thread_runs():
        pass


def eventually_nothing_runs() -> bool:
    """Threads of the test runner run now and then."""
    for _ in range(3000):
        if not forks._an_unknown_thread_runs():
            return True
        time.sleep(0.01)
    return False


def test_a_thread_that_runs_is_waited_for(monkeypatch):
    monkeypatch.setattr(forks, "_ENDING_SECONDS", 60)
    times: list[float] = []

    def work() -> None:
        times.append(time.monotonic())
        compute(1_000_000)
        times.append(time.monotonic())

    thread = UnknownThread(work)
    eventually_something_runs()
    forks._wait_for_ending_threads()
    returned = time.monotonic()
    assert thread.has_ended.wait(60)
    began, ended = times
    assert returned - began > 0.5 * (ended - began)  # not all: it waits for Python's lock at the end


def test_a_thread_that_goes_on_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(forks, "_ENDING_SECONDS", 0.05)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            compute(20_000)

    thread = UnknownThread(work)
    eventually_something_runs()
    forks._wait_for_ending_threads()
    assert not thread.has_ended.is_set()
    stop.set()
    assert thread.has_ended.wait(30)


def test_threads_that_wait_and_threads_of_python_are_not_waited_for():
    release = threading.Event()
    thread = UnknownThread(release.wait)
    known = threading.Thread(target=lambda: [compute(20_000) for _ in iter(release.is_set, True)])
    known.start()
    assert eventually_nothing_runs()
    assert known.is_alive()
    release.set()
    known.join(30)
    assert thread.has_ended.wait(30)
