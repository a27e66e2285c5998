"""How large a plan makes the cache, and the steps that fill it."""

from __future__ import annotations

import json

import pytest

import exl
from exl.batch import PAGE_SIZE
from exl.errors import ConfigError, MemoryBudgetError
from exl.layout.steps import StepLimits
from exl.planning import from_headers
from exl.planning.devices import HOST
from exl.planning.from_headers import step_limits
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan
from tests.command_line import run_exl

GB = 10**9
PAGE = 32 * 32 * 2 * PAGE_SIZE * 128 * 2  # bytes of a 7B's page: layers, heads, K and V, tokens, channels, f16


def bytes_of(plan: MemoryPlan, purpose: str) -> int:
    return sum(line.num_bytes for line in plan.lines if line.purpose == purpose)


def small(**options) -> MemoryPlan:
    """Of a model with a context of 2,048, on a CPU."""
    return exl.plan(shape="tinyllama-1.1b", **options)


# --- how many tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_sequences", [1, 16, 64])
def test_by_default_the_cache_is_one_context_for_however_many(max_sequences):
    options = {"shape": "llama-2-7b", "max_sequences": max_sequences}
    for plan in (exl.plan(**options), exl.plan(**options, vram="12GB")):
        assert plan.num_pages == plan.context // PAGE_SIZE == 64
        assert bytes_of(plan, "KV cache") == 64 * PAGE


def test_a_number_of_tokens_is_rounded_to_whole_pages(seven):
    plan = seven(vram="12GB", context=100, cache_tokens=300)
    assert (plan.context, plan.num_pages) == (100, 5)
    assert bytes_of(plan, "KV cache") == 5 * PAGE
    assert "f16, 300 tokens, 32 layers" in [line.note for line in plan.lines]


def test_less_than_a_context_is_refused():
    with pytest.raises(ConfigError, match=r"^cache_tokens: found 2047, expected the context, 2048, or more"):
        small(cache_tokens=2047)
    assert small(cache_tokens=2048).num_pages == 32


@pytest.mark.parametrize("budget", [{}, {"vram": "24GB"}])
def test_where_all_layers_have_a_window_the_cache_is_what_it_reaches(budget):
    """Mistral 7B v0.1: 4,095 tokens before 4,096 rows of a prefill window, or 512 of a chunk, and two pages."""
    options = {"shape": "mistral-7b-v0.1", **budget}
    plan = exl.plan(**options, context=32768)
    assert (plan.context, plan.num_pages, plan.to_json()["cache_tokens"]) == (32768, 131, 130 * PAGE_SIZE)
    full = exl.plan(shape="mistral-7b-v0.2", context=32768, **budget)  # the same without a window
    assert bytes_of(plan, "KV cache") * 512 == bytes_of(full, "KV cache") * 131
    assert exl.plan(**options, context="auto", cache_tokens=74 * PAGE_SIZE).context == 32768
    with pytest.raises(ConfigError, match=r"^cache_tokens: found 4735, expected for a window, .*, 4736, or more"):
        exl.plan(**options, context=32768, cache_tokens=4735)
    assert exl.plan(**options, context=4096).num_pages == 64  # no text is longer than the window: no null page


@pytest.mark.parametrize("value", [0, "many", 1.5, True])
def test_what_is_no_number_of_tokens_is_named(value):
    with pytest.raises(ConfigError, match=r"^cache_tokens: found .*, expected a whole number from 1 to .* or 'auto'"):
        EngineOptions(cache_tokens=value)


@pytest.mark.parametrize("budget", [{"ram": "1.3GB"}, {"vram": "1.8GB"}, {"vram": "1.7GB", "ram": "4GB"}])
def test_auto_is_what_the_budgets_leave(budget):
    one, auto = small(**budget), small(**budget, cache_tokens="auto")
    assert auto.fits
    assert auto.placement == one.placement
    assert one.num_pages < auto.num_pages < 16 * one.num_pages
    more = small(**budget, cache_tokens=(auto.num_pages + 1) * PAGE_SIZE)
    assert more.placement.num_streamed > 0


def test_auto_moves_no_layer():
    """Where layers are streamed with one context, too: what is left is less than a layer."""
    one, auto = small(ram="800MB"), small(ram="800MB", cache_tokens="auto")
    assert one.placement.num_streamed > 0
    assert auto.placement == one.placement
    assert auto.fits
    assert auto.num_pages > one.num_pages


def test_auto_is_at_most_a_context_for_each_sequence(seven):
    assert seven(vram="100GB", cache_tokens="auto", max_sequences=3).num_pages == 3 * 64
    assert seven(vram="100GB", cache_tokens="auto", max_sequences=1).num_pages == 64


def test_auto_without_a_budget_leaves_half_of_the_ram(monkeypatch):
    for total, expected in ((3 * GB, None), (1 * GB, 32), (100 * GB, 16 * 32)):
        monkeypatch.setattr(from_headers, "system_ram", lambda total=total: (total, total))
        auto = small(cache_tokens="auto")
        assert not auto.budgets
        if expected is None:
            page = bytes_of(auto, "KV cache") // auto.num_pages
            assert total // 2 - page < auto.num_bytes <= total // 2
        else:
            assert auto.num_pages == expected


def test_auto_context_counts_one_context():
    options = {"ram": "1.2GB", "context": "auto"}
    one, auto, given = small(**options), small(**options, cache_tokens="auto"), small(**options, cache_tokens=1000)
    assert auto.context == one.context == 2048
    assert auto.num_pages > one.num_pages == 32
    assert given.context == 960  # whole pages of what the cache holds
    assert given.num_pages == 16


def test_what_does_not_fit_is_told_that_a_smaller_cache_would():
    with pytest.raises(MemoryBudgetError, match=r"Would fit: .*; or cache_tokens=None"):
        small(ram="700MB", cache_tokens=1 << 20)


# --- pages in RAM ----------------------------------------------------------------------------------------------------


def test_pages_in_ram_are_a_line_of_their_own(seven):
    without, plan = seven(vram="8GB"), seven(vram="8GB", kv_ram="1GB")
    assert plan.num_kept_pages == GB // PAGE
    assert without.num_kept_pages == bytes_of(without, "kept pages") == 0
    assert plan.device_bytes(HOST) - without.device_bytes(HOST) == bytes_of(plan, "kept pages") == GB // PAGE * PAGE
    assert plan.device_bytes("cuda:0") == without.device_bytes("cuda:0")
    assert f"pinned, {GB // PAGE * PAGE_SIZE} tokens that the cache has no room for" in plan.table()


def test_pages_in_ram_come_before_layers(seven):
    """Of ``ram=``, and of what may be locked."""
    options = {"vram": "3GB", "ram": "3.5GB", "context": 512}
    without, plan = seven(**options), seven(**options, kv_ram="2GB")
    assert plan.fits
    assert plan.layer_counts["resident"] == without.layer_counts["resident"]
    assert plan.layer_counts["pinned"] < without.layer_counts["pinned"]


def test_pages_in_ram_are_refused_where_they_make_no_sense(seven):
    with pytest.raises(ConfigError, match=r"^kv_ram: found '1GB', which is for a GPU; a CPU's cache is in RAM already"):
        small(kv_ram="1GB")
    with pytest.raises(ConfigError, match=r"^kv_ram: found '30MB', expected 33\.55 MB or more: a page of 64 tokens"):
        seven(vram="8GB", kv_ram="30MB")
    with pytest.raises(ConfigError, match=r"^kv_ram: found 'some', expected a size"):
        EngineOptions(kv_ram="some")


def test_the_command_line_has_them():
    options = ("--max-sequences", 4, "--cache-tokens", "auto", "--kv-ram", "1GB", "--context", 1024)
    done = run_exl("plan", "--shape", "llama-2-7b", "--vram", "8GB", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["context"], found["cache_tokens"]) == (1024, 4 * 1024)
    assert "kept pages" in [line["purpose"] for line in found["lines"]]
    said = "exl: error: cache_tokens: found '8k', expected a number of tokens or auto\n"
    assert run_exl("plan", "--cache-tokens", "8k").stderr == said
    assert run_exl("generate", "a", "--cache-tokens", "8k").stderr == said


# --- steps -----------------------------------------------------------------------------------------------------------


def limits_of(vocab_size: int, context: int = 512, drafts: bool = False, **options) -> StepLimits:
    config = from_headers.ModelConfig.from_dict(
        {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": vocab_size,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        "config.json",
    )  # fmt: skip
    return step_limits(config, context, EngineOptions(**options), drafts=drafts)


@pytest.mark.parametrize("vocab_size", [100, 32000, 262_144])
@pytest.mark.parametrize("max_sequences", [1, 16, 64, 100])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_a_step_has_a_row_for_each_sequence_and_for_a_prompt(vocab_size, max_sequences, chunk):
    limits = limits_of(vocab_size, max_sequences=max_sequences, prefill_chunk=chunk)
    assert limits.decode_rows >= max_sequences
    assert limits.chunk_rows == chunk
    assert limits.max_rows == max(chunk, limits.decode_rows)
    assert limits.max_logit_rows >= limits.decode_rows + 1
    assert limits.window_rows == 512 + limits.decode_rows
    assert limits.cache_tokens == 512


@pytest.mark.parametrize(("max_sequences", "rows"), [(1, 8), (3, 24), (8, 64), (16, 64), (64, 64), (70, 70)])
def test_with_drafts_a_sequence_has_eight_rows(max_sequences, rows):
    limits = limits_of(32000, max_sequences=max_sequences, drafts=True)
    assert limits.decode_rows == rows
    assert limits.max_logit_rows > rows


@pytest.mark.parametrize(
    ("vocab_size", "max_sequences", "rows"), [(32000, 16, 64), (262_144, 16, 31), (262_144, 2, 16)]
)
def test_prompt_lookup_has_the_rows_that_cost_no_logits(vocab_size, max_sequences, rows):
    limits = limits_of(vocab_size, max_sequences=max_sequences)
    assert limits.decode_rows == rows
    assert limits.max_logit_rows == max(rows + 1, min(512, (32 << 20) // (4 * vocab_size)))


def test_logits_grow_only_where_sequences_need_them():
    """32 MB of a chunk's logits, as before."""
    assert limits_of(32000).max_logit_rows == limits_of(32000, max_sequences=1).max_logit_rows == 262
    assert limits_of(262_144).max_logit_rows == 32
    assert limits_of(262_144, max_sequences=64).max_logit_rows == 65


def test_limits_that_nobody_gave_follow_from_the_others():
    limits = StepLimits(8, 9, 10, 128, 64, 128, 64, 64, 100, 16, max_sequences=3)
    assert (limits.decode_rows, limits.chunk_rows, limits.cache_tokens) == (3, 8, 3 * 128)
