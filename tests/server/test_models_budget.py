"""Who goes for whom under one budget: laws of the choice, for any sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

pytest.importorskip("fastapi")

from hypothesis import given, settings
from hypothesis import strategies as st

import exl
from exl.planning.plan import MemoryPlan, Placement, PlanLine
from exl.server.budget import choose_to_unload, left_beside, needed_bytes, own_bytes, room_for

MEMORIES = ("cuda:0", "ram")


@dataclass(eq=False)
class Model:
    own: dict[str, int]
    last_used: float = 0.0
    is_busy: bool = False
    name: str = field(default="")


SIZES = st.fixed_dictionaries({memory: st.integers(0, 20) for memory in MEMORIES})
MODELS = st.lists(st.builds(Model, SIZES, st.integers(0, 9), st.booleans()), max_size=6)


def fits(needed, budgets, stay):
    left = left_beside(budgets, stay)
    return all(needed[memory] <= left[memory] for memory in budgets)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(MODELS, SIZES, SIZES)
def test_laws_of_the_choice(models, needed, budgets):
    going = choose_to_unload(models, needed, budgets)
    if going is None:
        assert not fits(needed, budgets, [])
        return
    stay = [model for model in models if model not in going]
    assert fits(needed, budgets, stay)
    for model in going:  # each of them had to go
        assert not fits(needed, budgets, [*stay, model])
    if any(model.is_busy for model in going):  # not for want of looking at idle ones
        assert not fits(needed, budgets, [model for model in models if model.is_busy])


def test_the_least_recently_used_goes_first():
    old, newer = Model({"cpu": 5}, 1), Model({"cpu": 5}, 2)
    assert choose_to_unload([newer, old], {"cpu": 5}, {"cpu": 10}) == [old]
    assert choose_to_unload([newer, old], {"cpu": 6}, {"cpu": 10}) == [old, newer]
    assert choose_to_unload([newer, old], {"cpu": 0}, {"cpu": 10}) == []


def test_idle_ones_go_before_older_ones_in_use():
    old, newer = Model({"cpu": 5}, 1, is_busy=True), Model({"cpu": 5}, 2)
    assert choose_to_unload([newer, old], {"cpu": 5}, {"cpu": 10}) == [newer]


def test_a_small_one_stays_if_a_large_one_goes_anyway():
    small, large = Model({"cpu": 1}, 1), Model({"cpu": 8}, 2)
    assert choose_to_unload([small, large], {"cpu": 9}, {"cpu": 10}) == [large]


def test_a_memory_without_a_budget_is_not_limited():
    assert choose_to_unload([Model({"ram": 100}, 1)], {"ram": 100, "cuda:0": 4}, {"cuda:0": 4}) == []


def test_a_cache_that_takes_what_there_is_leaves_half_to_others():
    assert room_for({"cpu": 10}, {"cpu": 100}, {"cpu": 100}) == {"cpu": 50}
    assert room_for({"cpu": 70}, {"cpu": 100}, {"cpu": 100}) == {"cpu": 70}  # what it needs it gets
    assert room_for({"cpu": 10}, {"cpu": 20}, {"cpu": 100}) == {"cpu": 20}


def test_lines_that_a_process_has_once_are_nobodys_own():
    lines = (
        PlanLine("resident layers", "cuda:0", 7, True),
        PlanLine("CUDA context, modules", "cuda:0", 500, False),
        PlanLine("pinned layers", "ram", 3, True),
    )
    plan = MemoryPlan(lines, Placement(()), 64, 1, 0)
    assert own_bytes(plan) == {"cuda:0": 7, "ram": 3}
    assert needed_bytes(plan) == {"cuda:0": 507, "ram": 3}
    real = exl.plan(context=64)
    shared = sum(line.num_bytes for line in real.lines if line.purpose == "kernels")
    assert own_bytes(real) == {"cpu": real.num_bytes - shared}
