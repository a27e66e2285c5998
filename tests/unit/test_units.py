"""Sizes and counts as people type them, and as messages show them."""

from __future__ import annotations

import re

import pytest

import exl
from exl.errors import ConfigError, MemoryBudgetError
from exl.planning.options import EngineOptions
from exl.units import format_apart, format_bytes, parse_budget, parse_bytes
from tests.command_line import run_exl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("24GB", 24 * 10**9), ("24 G", 24 * 10**9), ("24g", 24 * 10**9), ("24gb", 24 * 10**9), (" 8 gb ", 8 * 10**9)),
        *(("24GiB", 24 << 30), ("24gib", 24 << 30), ("24Gi", 24 << 30), ("512 M", 512 * 10**6), ("1.5K", 1500)),
        *(("1.5TiB", 3 << 39), ("9007199254740993", 9007199254740993), ("0.1GB", 10**8), ("2.3GB", 2_300_000_000)),
        *(("4.35GB", 4_350_000_000), ("999999999999.999999KB", 999_999_999_999_999)),
        *(("6GB", 6 * 10**9), ("6GiB", 6 << 30), ("1.5 gb", 1_500_000_000), ("512MiB", 512 << 20)),
    ],
)  # fmt: skip
def test_sizes_are_exact(text, expected):
    assert parse_bytes(text) == parse_budget(text, "ram") == expected


@pytest.mark.parametrize("size", [77, "77"])
def test_a_number_alone_is_bytes(size):
    assert parse_bytes(size) == 77


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("24 gigs", "24GB"),
        ("24 gigabytes", "24GB"),
        ("1,5GB", "1.5GB"),
        ("512 megs", "512MB"),
        ("6GBit", "6GB"),
        ("6 GBit", "6GB"),
    ],
)
def test_what_is_nearly_a_size_gets_the_size_that_was_meant(text, said):
    with pytest.raises(ConfigError, match=rf"^vram: found '{text}', expected a size .*; did you mean '{said}'\?$"):
        parse_bytes(text, "vram")


@pytest.mark.parametrize(
    "size",
    [
        *("", "GB", "0GB", "-1GB", "0.5", "1e9", "IB", "B", "x24GB", "٣GB", "1" * 31, "1000000TB", "6XB", "0"),
        *(0, -5, True, 1.5, None),
    ],
)
def test_what_is_no_size_is_refused_as_it_was_typed(size):
    with pytest.raises(ConfigError, match=rf"^ram: found {re.escape(repr(size))}, expected a size such as"):
        parse_bytes(size, "ram")


@pytest.mark.parametrize("option", ["vram", "ram"])
@pytest.mark.parametrize(
    ("size", "meant"), [("24", "24GB"), (24, "24GB"), ("8", "8GB"), (" 12 ", "12GB"), ("16B", "16GB")]
)
def test_a_budget_without_a_unit_asks_for_one(option, size, meant):
    said = rf"^{option}: found {re.escape(repr(size))}, which is \d+ bytes; did you mean '{meant}'\?$"
    with pytest.raises(ConfigError, match=said):
        EngineOptions(**{option: size})
    with pytest.raises(ConfigError, match=said):
        exl.load(**{option: size})


def test_sizes_in_messages():
    assert [format_bytes(n) for n in (5, 999, 2_500, 999_994, 999_999, 1_234_000_000)] == [
        "5 B",
        "999 B",
        "2.50 KB",
        "999.99 KB",
        "1.00 MB",
        "1.23 GB",
    ]
    assert format_apart(1_234_000_000, 1_234_400_000) == ["1.2340 GB", "1.2344 GB"]
    assert format_apart(2_000_000_000, 1_000_000_000) == ["2.00 GB", "1.00 GB"]
    assert format_apart(5, 5) == ["5 B", "5 B"]
    assert format_apart(10**12 + 1, 10**12) == ["1.000000000001 TB", "1.000000000000 TB"]


def test_a_budget_that_is_hardly_too_small_is_not_shown_as_if_it_were_enough():
    with pytest.raises(MemoryBudgetError) as error:
        exl.plan(ram="1MB")
    needed = int(re.search(r"ram='(\d+)MB' or more", str(error.value))[1]) * 10**6
    for ram in range(needed, needed - 10**6, -1000):
        try:
            exl.plan(ram=ram)
        except MemoryBudgetError as error:
            needs, budget = re.search(r"needs (\S+ MB) .* the budget is (\S+ MB):", str(error)).groups()
            assert needs != budget
            return
    raise AssertionError("every budget was enough")


# Counts


@pytest.mark.parametrize(
    "name", ["context", "cache_tokens", "max_sequences", "prefill_chunk", "prefill_window", "resident_layers"]
)
@pytest.mark.parametrize("value", [100_000_000_000, 1 << 30, -1, 1.5])
def test_a_count_out_of_range_is_told_the_range(name, value):
    low = 0 if name == "resident_layers" else 1
    said = rf"^{name}: found {re.escape(str(value))}, expected a whole number from {low} to 1073741823"
    with pytest.raises(ConfigError, match=said):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("options", [[], ["--vram", "10TB", "--ram", "10TB"]], ids=["cpu", "gpu"])
def test_the_plan_shows_the_context_that_was_typed(options):
    done = run_exl("plan", "--context", "99999999", *options)
    assert done.returncode == 0, done.stderr
    assert "99999999 tokens" in done.stdout
    assert "100000000" not in done.stdout
    plan = exl.plan(context=100, cache_tokens=300)
    assert "f16, 300 tokens" in [line.note for line in plan.lines]


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ("100000000000", "context: found 100000000000, expected a whole number from 1 to 1073741823 or 'auto'"),
        ("1e9", "context: found '1e9', expected a number of tokens or auto"),
        ("8k", "context: found '8k', expected a number of tokens or auto"),
    ],
)
def test_a_context_is_refused_as_it_was_typed(context, said):
    for command in (["plan"], ["generate", "a"]):
        assert run_exl(*command, "--context", context).stderr == f"exl: error: {said}\n"


def test_a_budget_without_a_unit_on_the_command_line():
    for option in ("--vram", "--ram"):
        done = run_exl("generate", "a", option, "24")
        assert done.stderr == f"exl: error: {option[2:]}: found '24', which is 24 bytes; did you mean '24GB'?\n"
