"""The model, and the jobs of all browser tabs: each is a thread of its own, and the model answers them in one batch.
Only what changes the model has it alone."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import exl
from exl.remote_chat import RemoteModel

from .settings import LoadSettings

Model = exl.LLM | RemoteModel  # loaded here, or by a server


@dataclass(frozen=True)
class Waiting:
    """The state of a job that has not begun."""

    ahead: int  # number of jobs that end before it begins


@dataclass(frozen=True)
class Loading:
    """The state of a job that is loading a model."""

    settings: LoadSettings
    done: int = 0  # bytes
    total: int = 0


def talks(llm: Model | None) -> bool:
    """Whether a model is loaded that was trained to talk. A server does not say: it is taken for one."""
    return isinstance(llm, RemoteModel) or (llm is not None and llm.tokenizer.chat_template is not None)


def name_of(llm: Model) -> str:
    return llm.name if isinstance(llm, RemoteModel) else llm.folder.name


def context_of(llm: Model | None) -> int:
    """Tokens that a conversation may have; a guess if nobody says."""
    known = llm.context if isinstance(llm, RemoteModel) else None if llm is None else llm.plan.context
    return known or 4096


class Stopped(Exception):
    """Raised inside a job's work by a callback, when the job has been stopped. It is no failure."""


class Job:
    """What a tab has asked for. A new state replaces the one before, so that a slow browser never delays the model, and
    any number of pages may watch, each from any time on."""

    def __init__(self, run: Callable[[Job], None], worker: Worker, alone: bool) -> None:
        """``alone``: no other job runs meanwhile."""
        self.alone, self.has_begun, self.stopped = alone, False, False
        self.failure: str | None = None  # one line
        self._run, self._worker = run, worker
        self._changed = threading.Condition()
        self._state: Any = None
        self._version = 0  # number of states so far
        self._done = False
        self._on_stop: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        return self._done

    def tell(self, state: Any) -> None:
        with self._changed:
            self._state = state
            self._version += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Raises ``Stopped`` if the job has been stopped."""
        if self.stopped:
            raise Stopped

    def stop(self) -> None:
        """Asks a running job to end; one that has not begun never does."""
        self.stopped = True
        self._worker.withdraw(self)
        on_stop = self._on_stop
        if on_stop is not None:
            on_stop()

    def when_stopped(self, on_stop: Callable[[], None] | None) -> None:
        """``on_stop`` is called by whoever stops the job, also if that was before; None: nothing is, from now on."""
        self._on_stop = on_stop
        if self.stopped and on_stop is not None:
            on_stop()

    def watch(self, every: float = 0.05, until: threading.Event | None = None) -> Iterator[Any]:
        """Yields ``Waiting`` until the job may begin, then the newest state, at most one per ``every`` seconds.
        Ends with the job, or when ``until`` is set."""
        shown, seen = None, 0
        while True:
            with self._changed:
                if self._version == seen and not self._done:
                    self._changed.wait(timeout=0.25)
                state = self._state if self._version != seen else None
                seen, done = self._version, self._done
            if until is not None and until.is_set():
                return
            ahead = self._worker.ahead(self)
            if state is None and ahead:
                state = Waiting(ahead)
            if state is not None and state != shown:
                shown = state
                yield state
            if done:
                return
            threading.Event().wait(every)

    def execute(self) -> None:
        try:
            if not self.stopped:
                self._run(self)
        except Stopped:
            pass
        except Exception as error:
            self.failure = one_line(error)
        finally:
            self.finish()

    def finish(self) -> None:
        with self._changed:
            self._done = True
            self._changed.notify_all()


class Worker:
    """Has the model, and sees to it that no job runs while another one changes it."""

    def __init__(self, remote: RemoteModel | None = None) -> None:
        """``remote``: a server's model, which stays; None: ``load`` loads models here."""
        self.llm: Model | None = remote
        self.settings: LoadSettings | None = None  # of a model that is loaded here
        self._jobs: list[Job] = []  # that have not ended, by arrival
        self._changed = threading.Condition()

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(not job.has_begun for job in list(self._jobs))

    def submit(self, run: Callable[[Job], None], *, alone: bool = False) -> Job:
        """Runs a job beside the others, in a thread of its own. ``alone``, for what changes the model: once those
        before it have ended, while those after it wait."""
        job = Job(run, self, alone)
        with self._changed:
            self._jobs.append(job)
        threading.Thread(target=self._work, args=(job,), name="job", daemon=True).start()
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs end before this one begins."""
        with self._changed:
            return 0 if job.has_begun or job not in self._jobs else self._before(job)

    def withdraw(self, job: Job) -> None:
        """A job that has not begun ends."""
        with self._changed:
            if job in self._jobs and not job.has_begun:
                self._leave(job)
                job.finish()

    def _before(self, job: Job) -> int:
        earlier = self._jobs[: self._jobs.index(job)]
        if not job.alone:  # those up to the last one that has the model alone
            while earlier and not earlier[-1].alone:
                earlier.pop()
        return len(earlier)

    def _leave(self, job: Job) -> None:
        self._jobs.remove(job)
        self._changed.notify_all()

    def _work(self, job: Job) -> None:
        with self._changed:
            self._changed.wait_for(lambda: job.is_done or not self._before(job))
            if job.is_done:
                return
            job.has_begun = True
        try:
            job.execute()
        finally:
            with self._changed:
                self._leave(job)

    def loaded(self) -> Model:
        if self.llm is None:
            raise exl.ExlError("no model is loaded: choose one under Model, and load it")
        return self.llm

    def load(self, settings: LoadSettings, job: Job | None = None) -> None:
        """Call this only in a job that has the model alone. Closes the old model first, because there may be no room
        for two. If the new one cannot be loaded, loads the old one again and raises an error that says so."""
        before, old = self.settings, self.llm
        if isinstance(old, RemoteModel):
            raise exl.ExlError(f"the demo talks with {old.url}, which loads its models itself")
        if old is not None:
            self.llm = None
            old.close()
        try:
            self._open(settings, job)
        except Exception as error:
            if old is None or before is None:
                raise
            line = one_line(error).rstrip(".")
            try:
                self._open(before, job)
            except Exception as again:
                raise exl.ExlError(f"{line}. No model is loaded now: {before.name}: {one_line(again)}") from error
            raise exl.ExlError(f"{line}. {before.name} is loaded again, as it was.") from error

    def _open(self, settings: LoadSettings, job: Job | None) -> None:
        def progress(done: int, total: int) -> None:
            if job is not None:
                job.tell(Loading(settings, done, total))

        if job is not None:
            job.tell(Loading(settings))
        self.llm = exl.load(settings.model, progress=progress, **settings.options)
        self.settings = settings

    def close(self) -> None:
        """Stops all jobs and frees the model's memory."""
        for job in list(self._jobs):
            job.stop()
        job = self.submit(lambda job: self.llm.close() if isinstance(self.llm, exl.LLM) else None, alone=True)
        for _ in job.watch():
            pass


def one_line(error: BaseException) -> str:
    """The line that the page shows. An error that is not an ``ExlError`` is also printed to stderr, with traceback."""
    if isinstance(error, exl.ExlError):
        return str(error).strip().splitlines()[0]
    traceback.print_exception(error, file=sys.stderr)
    told = " ".join(str(error).split())[:200]
    return f"unexpected {type(error).__name__}: {told} (the terminal has the details)"
