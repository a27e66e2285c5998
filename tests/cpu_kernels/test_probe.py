"""Systems on which the kernels were never run: a child tries them first."""

from __future__ import annotations

import re
import subprocess

import pytest

from exl.cpu_kernels import probe
from exl.cpu_kernels.processor import usable_isas

pytestmark = pytest.mark.skipif(not usable_isas(), reason="no kernels for this processor")


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a system that is not among those on which the tests have run."""
    monkeypatch.setattr(probe, "_SEEN", ())


def test_a_child_runs_them_once(elsewhere, tmp_path, monkeypatch):
    assert probe.why_not(tmp_path / "cache") is None
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("tried again"))
    assert probe.why_not(tmp_path / "cache") is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("", "", -6), r"failed \(exit status -6\)"),
        (("", "LLVM ERROR: unresolved symbol", 1), r"failed \(LLVM ERROR: unresolved symbol\)"),
        (("something else", "", 0), "failed"),
    ],
)
def test_a_child_that_dies_is_a_reason(elsewhere, tmp_path, monkeypatch, said, reason):
    stdout, stderr, status = said
    done = subprocess.CompletedProcess([], status, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    for _ in range(2):  # and it is tried again the next time
        assert re.search(reason, probe.why_not(tmp_path / "cache"))


def test_a_child_that_cannot_be_started_or_hangs(elsewhere, tmp_path, monkeypatch):
    def hang(*args, timeout, **options):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "could not be tried in a process of their own" in probe.why_not(tmp_path / "cache")


def test_nothing_is_tried_where_the_tests_have_run(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_SEEN", ("linux", "win32", "darwin"))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("tried"))
    assert probe.why_not(tmp_path / "cache") is None
