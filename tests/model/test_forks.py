"""A forked child can use a model that its parent loaded, bit for bit, or gets an error that names the fork. It never
hangs: each scenario (``fork_child.py``) is a process of its own that is killed after two minutes.

Without exl's hooks the child of every scenario that has computed before waits for ever in its first parallel loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exl.layout.specs import Target
from tests.model.cpu_targets import with_both

ROOT = Path(__file__).parents[2]
SECONDS = 120

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def through(cpu: Target) -> list[str]:
    return [] if cpu.compiled else ["torch"]


def run(scenario: str, *backend: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.model.fork_child", scenario, *backend],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@with_both
@pytest.mark.parametrize(
    "scenario",
    [
        "loaded_in_parent",
        "generated_in_parent",
        "dense_model",
        "multiprocessing_fork",
        "child_of_child",
        "loaded_in_child",
        "threads_in_child",
        "idle_threads",
        "idle_engine_thread",
        "streamed",
        "closed_in_child",
        "exits_without_closing",
        "quantized",
        "evaluated",
    ],
)
@pytest.mark.sample(3)
def test_a_child_computes_what_its_parent_computes(scenario, cpu):
    result = run(scenario, *through(cpu))
    assert result["parent"]
    assert all(value == result["parent"] for value in result.values()), result


@with_both
@pytest.mark.parametrize(
    "scenario", ["unfinished_stream", "unfinished_logits", "request_in_thread", "submitted_request"]
)
@pytest.mark.sample(2)
def test_a_child_that_was_forked_during_a_request_gets_an_error_and_its_parent_goes_on(scenario, cpu):
    result = run(scenario, *through(cpu))
    assert result["errors"]
    for error in result["errors"]:
        assert error.startswith("ExlError: this process was forked while a request"), error
        assert "spawn" in error
    assert result["parent"] == result["before"]


@pytest.mark.parametrize("scenario", ["on_gpu", "gpu_in_parent"])
def test_a_child_of_a_process_that_uses_a_gpu_gets_an_error(scenario):
    result = run(scenario)
    for error in result["errors"]:
        assert error.startswith("ExlError: this process was forked from one that uses a GPU"), error
        assert "spawn" in error
    assert result["parent"] == result["before"]


@with_both
def test_forks_while_layers_are_read_disturb_nobody(cpu):
    result = run("streamed_while_reading", *through(cpu))
    assert result["all"]
    assert result["odd"] == []
    assert result["child"] == result["before"] == result["parent"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP on Linux")
def test_where_openmp_keeps_its_threads_the_child_computes_with_one():
    """As with a library from before GCC 9, which has no function that ends them."""
    result = run("threads_that_stay", "torch")
    assert result["threads"] == [1, 2]
    assert result["child"] == result["before"] == result["parent"]
