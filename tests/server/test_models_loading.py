"""What a model needs at least, and what it takes of what there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

import exl
from exl.engine import build
from exl.errors import ConfigError, MemoryBudgetError
from exl.server import loading
from exl.server.loading import Budgets, SharingLoader

STORIES = Path(__file__).parents[1] / "data" / "stories2M"
SMALL = {"max_sequences": 4, "prefill_chunk": 64, "prefill_window": 64}
ENGINE = {"device": "cpu", "cache_tokens": "auto", **SMALL}


def plan(**options):
    return exl.plan(STORIES, **{**SMALL, **options})


def loader(ram, **options):
    return SharingLoader(STORIES, {**ENGINE, **options}, lambda: {"cpu": ram})


def test_budgets_are_what_was_given():
    assert Budgets({"device": "cpu", "ram": "3GB"})() == {"cpu": 3 * 10**9}
    with pytest.raises(ConfigError, match="ram: "):
        Budgets({"device": "cpu", "ram": "much"})


@pytest.mark.parametrize(
    ("known", "budgets"), [((100, 64), {"cpu": 60}), ((160, None), {"cpu": 150}), ((None, None), {})]
)
def test_budgets_are_what_was_free_at_the_first_look(monkeypatch, known, budgets):
    monkeypatch.setattr(loading, "system_ram", lambda: known)
    found = Budgets({"device": "cpu"})
    assert found() == budgets
    monkeypatch.setattr(loading, "system_ram", lambda: (1, 1))  # by now its models hold the rest
    assert found() == budgets


def test_a_model_needs_a_cache_of_one_context_whatever_it_would_take():
    assert loader(10**9).needs() == {"cpu": plan().num_bytes}
    assert plan(cache_tokens="auto", ram=10**9).num_bytes > plan().num_bytes


def test_a_cache_grows_into_its_room_and_no_further():
    needed = plan().num_bytes
    for room in (needed, needed + 2 * 10**6):
        with loader(10**9).load({"cpu": room}, lambda done, total: None) as llm:
            assert llm.plan.budgets == {"cpu": room}
            assert llm.plan.num_bytes <= room
            assert llm.plan.placement.num_streamed == 0
            assert (llm.plan.num_pages > plan().num_pages) == (room > needed)


def test_layers_are_streamed_only_where_the_whole_budget_is_too_small():
    tight = plan(resident_layers=1).num_bytes
    assert loader(tight).needs() == {"cpu": plan(ram=tight).num_bytes}
    assert loader(tight + 10**8).needs() == {"cpu": plan().num_bytes}


def test_a_context_that_fits_is_taken_where_the_default_does_not_fit():
    whole = plan(context=512)
    found = loader(whole.num_bytes - 1, context="auto", cache_tokens=None).needs()
    smaller = plan(context="auto", ram=whole.num_bytes - 1)
    assert found == {"cpu": smaller.num_bytes}
    assert smaller.placement.num_streamed == 0


def test_what_does_not_fit_is_said_as_the_planner_says_it():
    with pytest.raises(MemoryBudgetError, match="Would fit"):
        loader(10**6).needs()


def test_a_gpu_has_two_memories(monkeypatch):
    """A GPU that is not there: plans ask for no more of it than this."""
    backend = SimpleNamespace(arch=86, num_multiprocessors=28)

    def choose(options):
        return (replace(options, vram=10**9) if options.vram is None else options), backend

    monkeypatch.setattr(loading, "choose_device", choose)
    monkeypatch.setattr(build, "choose_device", choose)
    monkeypatch.setattr(loading, "system_ram", lambda: (320, 320))
    assert Budgets({"device": "cuda"})() == {"cuda:0": 10**9, "ram": 300}
    assert Budgets({"device": "cuda", "vram": "2GB", "ram": "1GB"})() == {"cuda:0": 2 * 10**9, "ram": 10**9}
    budgets = {"cuda:0": 2 * 10**9, "ram": 10**9}
    needed = SharingLoader(STORIES, {**ENGINE, "device": "cuda"}, lambda: budgets).needs()
    assert set(needed) == set(budgets)
    assert all(0 < needed[memory] < budgets[memory] for memory in budgets)
    assert loading._budget_arguments(needed) == {"vram": needed["cuda:0"], "ram": needed["ram"]}
    # What it needs is enough, and gives the same plan.
    again = SharingLoader(STORIES, {**ENGINE, "device": "cuda", "cache_tokens": None}, lambda: needed).needs()
    assert again == needed
