"""The plan of a model and of its draft model: both of one budget, and what starts a GPU counted once."""

from __future__ import annotations

import pytest

import exl
from benchmarks.synthetic import write_headers
from exl.errors import MemoryBudgetError
from exl.planning.devices import HOST, STARTED_LINES
from exl.planning.plan import MemoryPlan
from exl.planning.shapes import ModelShape

OPTIONS = {"context": 2048, "max_sequences": 4}
SMALL = ModelShape("llama", 512, 1024, 4, 8, 8, 64, 2000, 4096)
LARGE = ModelShape("llama", 2048, 5632, 16, 16, 16, 128, 2000, 4096)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    for folder, shape in zip(found, (LARGE, SMALL), strict=True):
        write_headers(folder, shape)
    return found


def bytes_of(plan: MemoryPlan, device: str, *left_out: str) -> int:
    return sum(line.num_bytes for line in plan.lines if line.device == device and line.purpose not in left_out)


def test_a_gpu_holds_both(folders):
    large, small = folders
    plan = exl.plan(large, draft=small, vram="4GB", **OPTIONS)
    alone = exl.plan(small, vram="4GB", prefill_window=512, **OPTIONS)
    drafts = {line.device: line.num_bytes for line in plan.lines if line.purpose == "draft model"}
    assert drafts == {"cuda:0": bytes_of(alone, "cuda:0", *STARTED_LINES), HOST: bytes_of(alone, HOST)}
    assert [line.purpose for line in plan.lines].count("CUDA context, modules") == 1
    assert plan.budgets == {"cuda:0": 4 * 10**9}
    assert "draft model" in plan.table()


def test_the_model_is_placed_in_what_the_draft_model_leaves(folders):
    """The same layers as with a budget that is so much smaller."""
    large, small = folders
    whole = exl.plan(large, vram="4GB", **OPTIONS)
    vram = bytes_of(whole, "cuda:0")
    assert whole.placement.num_streamed == 0
    both = exl.plan(large, draft=small, vram=vram, ram="8GB", **OPTIONS)
    draft = next(line.num_bytes for line in both.lines if line.purpose == "draft model" and line.device == "cuda:0")
    assert both.placement.num_streamed > 0
    assert both.placement == exl.plan(large, vram=vram - draft, ram="4GB", **OPTIONS).placement
    assert both.fits
    assert both.budgets == {"cuda:0": vram, HOST: 8 * 10**9}


def test_a_draft_model_that_does_not_fit_whole_is_refused(folders):
    large, small = folders
    with pytest.raises(MemoryBudgetError, match=r"draft: .* must be in memory whole, and .* of its layers find"):
        exl.plan(small, draft=large, vram="1GB", **OPTIONS)
    with pytest.raises(MemoryBudgetError, match=r"draft: .* needs .* of cuda:0 with every layer streamed"):
        exl.plan(small, draft=large, vram="900MB", **OPTIONS)
    with pytest.raises(MemoryBudgetError, match=r"draft: .* needs .* of ram, the budget is 1.00 MB"):
        exl.plan(large, draft=small, vram="4GB", ram="1MB", **OPTIONS)


@pytest.mark.parametrize("budget", [{"vram": "4GB"}, {"ram": "4GB"}])
def test_a_context_that_fills_the_memory_is_the_models_alone(folders, budget):
    """The draft model sees as much as the model has by default: it is loaded as it was planned."""
    large, small = folders
    plan = exl.plan(large, draft=small, **OPTIONS | budget | {"context": "auto"})
    usual = exl.plan(large, draft=small, **OPTIONS | budget | {"context": None})
    assert [line for line in plan.lines if line.purpose == "draft model"] == [
        line for line in usual.lines if line.purpose == "draft model"
    ]
    assert plan.fits
