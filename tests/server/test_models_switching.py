"""Two models that take turns in one budget: after every switch there is what the plan says, and nothing grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTLED = 5  # switches after which nothing may grow
TOLERANCE = 2 * 2**20  # of the resident memory, which allocators keep a little of

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def run(count, num_fit):
    command = [sys.executable, "-m", "tests.server.switching_child", str(count), str(num_fit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("count", [50])
def test_fifty_switches_leave_nothing_behind(count):
    told = run(count, 1)
    samples, ram = told["samples"], told["ram"]
    assert [one["held"] for one in samples] == [["stories260K"], ["stories2M"]] * (count // 2)
    assert all(one["was_loaded"] for one in samples)
    for one in samples:
        assert one["live"] - told["before"] == one["exact"]
        assert one["resident"] <= one["at_most"] <= ram
        assert one["peak"] <= ram  # also while one is loaded and the other has just gone
    assert told["after"] == told["before"]
    for model in (0, 1):  # each model's own samples: they differ in size
        own = samples[model::2]
        settled, last = own[SETTLED // 2], own[-1]
        for what in ("threads", "system_threads", "files"):
            assert last[what] <= settled[what], what
        assert last["resident"] <= settled["resident"] + TOLERANCE


def test_both_stay_where_both_fit():
    told = run(6, 2)
    assert [one["was_loaded"] for one in told["samples"]] == [True, True, False, False, False, False]
    last = told["samples"][-1]
    assert last["held"] == ["stories260K", "stories2M"]
    assert last["live"] - told["before"] == last["exact"]
    assert last["resident"] <= last["at_most"] <= told["ram"]
