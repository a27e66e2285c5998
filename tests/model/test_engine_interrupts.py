"""Ctrl-C anywhere leaves a model that works: no page is lost, the next text is right, nothing is left behind.

Each scenario (``interrupt_child.py``) is a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that interrupt")


def run(scenario: str, count: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.interrupt_child", scenario, str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fifty_interrupts_at_random_times():
    result = run("at_random_times", 50)
    assert result["faults"] == []
    assert result["interrupts"] >= 30  # the rest came too late
    assert result["pauses"] > 0


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_interrupts_everywhere_in_a_request(count):
    result = run("everywhere", count)
    assert result["faults"] == []
    assert result["interrupts"] >= 0.6 * count  # some come too late, or are swallowed by a finalizer, as Python does
    assert result["pauses"] > 0
