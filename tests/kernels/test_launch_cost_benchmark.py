"""The parts of ``benchmarks/launch_cost.py`` that are no clock: what it launches, for a model that is small enough."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import launch_cost
from benchmarks.end_to_end import step_batch
from exl.planning.shapes import ModelShape

SMALL = ModelShape("llama", 128, 256, 3, 4, 2, 32, 1000, 4096)  # three layers


@pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not installed")
@pytest.mark.parametrize("act_order", [False, True])
def test_launches_of_a_step_and_of_a_prompt(act_order):
    with launch_cost.model(SMALL, act_order) as (engine, backend):
        steps = launch_cost.measure(engine, backend, [step_batch(100, 1, 1000)] * 2)
        prompts = launch_cost.measure(engine, backend, [launch_cost.prompt(70), launch_cost.prompt(69)])
    assert steps.num_launches == (7 if act_order else 5) * 3 + 2  # a layer's, the embedding and the head
    assert steps.num_calls == 0
    assert prompts.num_launches > steps.num_launches
    assert str(prompts).split()[:2] == [str(prompts.num_launches), "0"]
