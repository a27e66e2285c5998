"""Plans of models whose layers have a sliding window here and none there: what each kind keeps, and what it leaves."""

from __future__ import annotations

import pytest

import exl
from exl.batch import PAGE_SIZE
from exl.layout.arena import table_words
from exl.layout.fields import align_up
from exl.layout.steps import StepLimits
from exl.layout.window import mixed_layers, num_group_pages, pages_behind, window_pages
from exl.planning.plan import MemoryPlan

# A page of one layer of Gemma 3 12B in f16: 8 heads, K and V, 64 tokens, 256 channels. It has 48 layers, of which 8 see
# everything; the others see 1,024 tokens.
PAGE = 8 * 2 * PAGE_SIZE * 256 * 2
WHOLE, INSIDE, WINDOW = 8, 40, 1024
EACH = 26  # pages of 1,023 tokens before 512 rows, which begin and end anywhere in a page, and of the token after them


def gemma(**options) -> MemoryPlan:
    return exl.plan(shape="gemma-3-12b", **{"context": 32768} | options)


def bytes_of(plan: MemoryPlan, purpose: str) -> int:
    return sum(line.num_bytes for line in plan.lines if line.purpose == purpose)


@pytest.mark.parametrize("budget", [{}, {"vram": "48GB"}])
def test_both_kinds_are_counted(budget):
    plan = gemma(**budget)
    assert plan.num_pages == 512
    assert (plan.windows.window, len(plan.windows.layers), plan.windows.num_pages) == (WINDOW, INSIDE, 4 * EACH + 1)
    assert bytes_of(plan, "KV cache") == WHOLE * 512 * PAGE
    assert bytes_of(plan, "KV cache, windows") == INSIDE * (4 * EACH + 1) * PAGE
    notes = {line.purpose: line.note for line in plan.lines}
    assert notes["KV cache"] == "f16, 32768 tokens, 8 layers"
    assert notes["KV cache, windows"] == "f16, 6656 tokens, 40 layers that see 1024"
    found = plan.to_json()
    assert (found["cache_tokens"], found["window_tokens"]) == (32768, 6656)


@pytest.mark.parametrize("budget", [{}, {"vram": "48GB"}])
def test_in_one_group_all_layers_keep_all_tokens(budget):
    plan = gemma(**budget, window_cache=False)
    assert plan.windows is None
    assert bytes_of(plan, "KV cache") == (WHOLE + INSIDE) * 512 * PAGE
    assert bytes_of(plan, "KV cache, windows") == plan.to_json()["window_tokens"] == 0


def test_kv_ram_is_for_one_group():
    assert gemma(vram="48GB").windows is not None
    assert gemma(vram="48GB", kv_ram="1GB").windows is None


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"max_sequences": 1}, 1),
        ({"max_sequences": 3}, 3),
        ({"cache_tokens": 3 * 32768}, 4),
        ({"cache_tokens": 7 * 32768}, 7),
        ({"cache_tokens": 7 * 32768 + 1}, 8),
    ],
)
def test_there_is_room_for_as_many_as_contexts_and_for_four_or_all_sequences(options, sequences):
    assert gemma(**options).windows.num_pages == sequences * EACH + 1


def test_with_streamed_layers_one_sequence_has_room_for_a_prefill_window():
    resident, streamed = gemma(max_sequences=1), gemma(max_sequences=1, resident_layers=0)
    assert (resident.windows.num_pages, streamed.windows.num_pages) == (EACH + 1, 80 + 2 + 1)  # 1,023 and 4,096 tokens
    assert gemma(resident_layers=0).windows.num_pages == 4 * EACH + 1


def test_where_it_takes_no_less_there_is_one_group():
    """A context of 106 pages is the first that is longer than the other part with its null page."""
    assert gemma(context=106 * PAGE_SIZE).windows.num_pages == 105
    assert gemma(context=105 * PAGE_SIZE).windows is None
    assert gemma(context=WINDOW, max_sequences=1).windows is None  # no text is longer than the window


@pytest.mark.parametrize("budget", [{"vram": "24GB"}, {"ram": "24GB"}])
def test_a_context_as_long_as_fits_is_longer(budget):
    plan, one = gemma(**budget, context="auto"), gemma(**budget, context="auto", window_cache=False)
    assert plan.fits
    assert one.fits
    assert plan.context > 3 * one.context
    assert plan.placement.num_streamed == one.placement.num_streamed == 0


def test_a_cache_as_large_as_fits_holds_more():
    plan, one = (gemma(vram="40GB", cache_tokens="auto", window_cache=value) for value in (True, False))
    assert plan.fits
    assert plan.num_pages > 2 * one.num_pages
    assert plan.windows.num_pages == max(4, -(-plan.num_pages // 512)) * EACH + 1


def test_several_gpus_have_the_layers_that_they_compute():
    plan = gemma(vram=["10GB", "24GB"], bits=4)
    found = [line.num_bytes for line in plan.lines if line.purpose == "KV cache, windows"]
    assert len(found) == 2
    assert sum(found) == INSIDE * (4 * EACH + 1) * PAGE
    assert bytes_of(plan, "KV cache") == WHOLE * 512 * PAGE


def test_which_layers_have_pages_of_their_own():
    windows = (None, 100, 50, 300, None)
    assert mixed_layers(windows, 1000) == {1, 2, 3}
    assert mixed_layers(windows, 300) == {1, 2}  # no text is longer than the fourth one's window
    assert mixed_layers(windows, 50) == frozenset()
    assert mixed_layers((100, 50), 1000) == frozenset()  # all: one group, whose pages are given back
    assert mixed_layers((None, None), 1000) == frozenset()


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 512])
@pytest.mark.parametrize("num_rows", [1, 8, 32, 64, 100])
def test_no_sequence_has_more_pages_than_are_meant_for_one(window, num_rows):
    """Wherever it is, if what is behind its last whole page is given back before it gets pages for the next rows."""
    for num_cached in range(0, 1500, 7):
        passed = pages_behind(window, num_cached // PAGE_SIZE * PAGE_SIZE)
        assert -(-(num_cached + num_rows + 1) // PAGE_SIZE) - passed <= window_pages(window, num_rows)
    assert num_group_pages(window, 3, num_rows, 1) == 3 * window_pages(window, max(num_rows, 8)) + 1


def test_tables_of_a_window_have_room_for_a_second_one():
    def words(tables: int) -> int:
        return table_words(
            StepLimits(512, 4096, 17, 8192, 4096, 6144, 4096, 14336, 32000, 128, max_sequences=16, page_tables=tables)
        )

    sequences = 16 + 4096 // 512
    assert words(2) - words(1) >= 4096 + sequences * align_up(8192 // PAGE_SIZE, 4)  # slots; pages
