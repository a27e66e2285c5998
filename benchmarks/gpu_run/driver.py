"""Runs a stage's items in worker processes, and continues if one of them crashes, hangs or exits.

The driver knows no items: workers find them. It reads which items they have begun and ended, and kills a worker that is
past its time. When a worker dies, it records the begun item as crashed or timed out, releases items that were only
claimed, and starts a fresh worker. Imports neither torch nor exl.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu_run.worker import LEFT, Place, append, claim_name, read_records

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # beyond ``item_seconds``, for a worker that fails to end itself
MOST_FAILED_STARTS = 2  # in a row, of workers that end before they begin an item


@dataclass(frozen=True)
class Job:
    stage: str
    results: Path
    command: Callable[[Place], Sequence[str]]  # command line of a worker
    num_workers: int
    item_seconds: float
    start_seconds: float = 90.0  # limit until a worker begins its first item or ends
    environment: Mapping[str, str] | None = None


@dataclass
class _Running:
    process: subprocess.Popen
    place: Place
    since: float  # time of its start or, if later, of the last begin or end of an item
    item: str | None = None  # begun and not ended
    num_begun: int = 0
    timed_out: bool = False


def drive(job: Job, deadline: float) -> None:
    """Runs until no items are left or until ``deadline`` (``time.monotonic()``)."""
    with tempfile.TemporaryDirectory() as claims:
        place = Place(job.stage, job.results, Path(claims), job.item_seconds, 0, job.num_workers)
        _Driver(job, place, deadline).run()


class _Driver:
    def __init__(self, job: Job, place: Place, deadline: float) -> None:
        self._job, self._place, self._deadline = job, place, deadline
        self._offset = job.results.stat().st_size if job.results.exists() else 0
        self._begun: set[str] = set()
        self._failed_starts = 0
        self._workers: list[_Running] = []

    def run(self) -> None:
        try:
            for slot in range(self._job.num_workers):
                self._start(slot)
            while self._workers and time.monotonic() < self._deadline:
                time.sleep(POLL_SECONDS)
                ended = [worker for worker in self._workers if worker.process.poll() is not None]
                self._read()  # after the poll, so that all lines of ended workers are read
                for worker in ended:
                    self._workers.remove(worker)
                    self._follow(worker)
                for worker in self._workers:
                    self._watch(worker)
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
            self._read()
        for worker in self._workers:
            if worker.item is not None:
                self._end(worker, "cut off", "the stage's time was over")
        if self._workers:
            self._note("the stage's time was over before all items had been run")

    def _start(self, slot: int) -> None:
        place = replace(self._place, slot=slot)
        command = list(self._job.command(place))
        process = subprocess.Popen(command, env=self._job.environment, stdin=subprocess.DEVNULL)
        self._workers.append(_Running(process, place, time.monotonic()))

    def _read(self) -> None:
        records, self._offset = read_records(self._job.results, self._offset)
        by_pid = {worker.process.pid: worker for worker in self._workers}
        for record in records:
            worker = by_pid.get(record.get("worker"))
            if worker is None or record.get("event") not in ("begin", "end"):
                continue
            worker.since = time.monotonic()
            if record["event"] == "begin":
                worker.item, worker.num_begun = record["item"], worker.num_begun + 1
                self._begun.add(record["item"])
            else:
                worker.item = None

    def _watch(self, worker: _Running) -> None:
        idle = time.monotonic() - worker.since
        most = self._job.start_seconds if worker.item is None else self._job.item_seconds + GRACE_SECONDS
        if idle > most:
            worker.timed_out = True
            worker.process.kill()

    def _follow(self, worker: _Running) -> None:
        """Handles a worker's end: records the item it had begun, releases its other claims, starts a fresh worker."""
        code = worker.process.returncode
        if code == 0:
            return
        if worker.item is not None:
            elapsed = time.monotonic() - worker.since
            if worker.timed_out or elapsed >= self._job.item_seconds - 0.5:
                self._end(worker, "timed out", f"it did not end within {self._job.item_seconds:.0f} s", elapsed)
            else:
                self._end(worker, "crashed", f"the process ended: {exit_text(code)}", elapsed)
        elif code != LEFT:
            late = f"; it had begun nothing for {self._job.start_seconds:.0f} s" if worker.timed_out else ""
            self._note(f"a worker ended between two items: {exit_text(code)}{late}")
        self._give_back(worker.process.pid)
        self._failed_starts = 0 if worker.num_begun else self._failed_starts + 1
        if self._failed_starts >= MOST_FAILED_STARTS:
            self._note(f"workers do not start ({exit_text(code)}): no more are started; the log says more")
        else:
            self._start(worker.place.slot)

    def _give_back(self, pid: int) -> None:
        begun = {claim_name(item) for item in self._begun}
        for path in self._place.claims.iterdir():
            if path.name not in begun and os.readlink(path) == str(pid):
                path.unlink(missing_ok=True)

    def _end(self, worker: _Running, outcome: str, text: str, seconds: float | None = None) -> None:
        fields = {"outcome": outcome, "text": text, "seconds": None if seconds is None else round(seconds, 1)}
        append(
            self._job.results, stage=self._job.stage, item=worker.item, worker=worker.process.pid, event="end", **fields
        )

    def _note(self, text: str) -> None:
        append(self._job.results, stage=self._job.stage, item=None, event="note", text=text)


def exit_text(code: int) -> str:
    """``SIGSEGV`` for -11, ``exit code 3`` for 3."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
