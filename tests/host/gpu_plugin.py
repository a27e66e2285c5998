"""A pytest plugin for one of several worker processes that share the collected tests (``benchmarks/gpu_run``).

Each test's outcome is written to disk at once. The process ends if a test hangs or an error destroys the CUDA context;
a fresh process then takes the tests that no worker has begun.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_run.worker import Place, Worker
from benchmarks.guard import device_error


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu run")
    group.addoption("--place", type=Place.parse, required=True, help="of this worker, from the driver")
    group.addoption("--only-items", type=Path, metavar="FILE", help="JSON list of the tests to run")


def pytest_configure(config: pytest.Config) -> None:
    only = config.option.only_items
    chosen = None if only is None else frozenset(json.loads(only.read_text()))
    config.pluginmanager.register(SharedTests(Worker(config.option.place), chosen))


class SharedTests:
    def __init__(self, worker: Worker, only: frozenset[str] | None) -> None:
        self._worker, self._only = worker, only
        self._reports: list[pytest.TestReport] = []
        self._finished = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Reports a module that cannot be imported or lacks a package: once, by the first worker that meets it."""
        if report.outcome == "passed" or not self._worker.claim(f"collecting {report.nodeid}"):
            return
        if report.failed:
            self._worker.begin(f"collecting {report.nodeid}")
            self._worker.end(f"collecting {report.nodeid}", "failed", report.longreprtext)
        else:
            self._worker.note(f"{report.nodeid} was skipped: {report.longrepr[2]}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.config.option.collectonly:
            return None
        items = [item for item in session.items if self._only is None or item.nodeid in self._only]
        if not items and self._worker.claim("no tests"):
            self._worker.note("no tests were selected")
        place = self._worker.place
        first = place.slot * len(items) // place.num_workers
        mine = (item for item in items[first:] + items[:first] if self._worker.claim(item.nodeid))
        item = next(mine, None)
        while item is not None:
            following = next(mine, None)  # pytest keeps fixtures that the next test also uses
            self._run(item, following)
            item = following
        self._finished = True
        return True

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        self._reports.clear()
        self._worker.begin(item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        outcome, text = self._outcome()
        broken = device_error()
        if broken is None:
            self._worker.end(item.nodeid, outcome, text)
            return
        self._worker.end(item.nodeid, "failed", text if outcome == "failed" else broken, sticky=broken)
        self._worker.leave()

    def _outcome(self) -> tuple[str, str]:
        failed = [report for report in self._reports if report.failed]
        if failed:
            return "failed", failed[0].longreprtext
        skipped = [report for report in self._reports if report.skipped]
        if skipped:
            longrepr = skipped[0].longrepr
            return "skipped", longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        return "passed", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._finished:  # failures are already reported; code 0 means that no test is left
            session.exitstatus = 0
