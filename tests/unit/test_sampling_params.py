"""The table of sampling parameters: its values are checked by name, and the documentation shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from exl.errors import ConfigError
from exl.sampling_params import FLAG, INTEGER, MAX_LISTED, NUMBER, OPTIONS, SamplingOption, SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"


def table_of(options: Mapping[str, SamplingOption]) -> str:
    rows = []
    for name, option in options.items():
        default = "none" if option.default is None else repr(option.default) if option.default != () else "nothing"
        help_text = option.help.replace("|", "\\|")
        rows.append(f"| `{name}` | {option.allowed} | {default} | {help_text} | {option.source} |\n")
    return "".join(rows)


def test_the_page_has_the_table():
    page = PAGE.read_text(encoding="utf-8")
    shown = "".join(line + "\n" for line in page.splitlines() if re.match(r"\| `\w+` \|", line))
    assert shown == table_of(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_of_the_wrong_type_and_out_of_range_are_refused_by_name(name):
    option = OPTIONS[name]
    bad = [object(), None if option.default is not None else "1", b"1"]
    if option.kind is NUMBER:
        bad += [option.low - 0.001, option.high + 0.001, float("nan"), float("inf"), True, "1"]
        bad += [option.low] if option.above else []
    elif option.kind is INTEGER:
        bad += [option.low - 1, option.high + 1, 1.0, True]
    elif option.kind is FLAG:
        bad += [1, "on", 0.0]
    elif name == "logit_bias":
        bad += [{5: 101}, {5: "1"}, {-1: 1}, {"5": 1}, {5: float("nan")}, {5: True}, [5], dict.fromkeys(range(1025), 1)]
    elif name in ("dry_breakers", "banned_strings"):
        bad += [5, [""], ["a" * 1025], ["a", 5], ["a"] * 65]
    else:
        bad += [5, "5", [-1], [1.0], [True], {5: 1}, range(MAX_LISTED + 1)]
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{name}\b.*: found .*, expected "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.kind in (NUMBER, INTEGER)])
def test_the_ends_of_ranges_are_taken(name):
    option = OPTIONS[name]
    low = option.low if not option.above else 1e-30
    for value in (low, option.high):
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_lists_are_kept_sorted_and_hashable():
    params = SamplingParams(
        logit_bias={7: -1, np.int64(3): np.float32(0.5)}, banned_tokens=np.array([9, 2, 9]), stop_token_ids={4, 1},
        dry_breakers="x",
    )  # fmt: skip
    assert params.logit_bias == ((3, 0.5), (7, -1.0))
    assert params.banned_tokens == (2, 9)
    assert params.stop_token_ids == (1, 4)
    assert params.dry_breakers == ("x",)
    assert SamplingParams(logit_bias=params.logit_bias).logit_bias == params.logit_bias
    assert len({params, SamplingParams()}) == 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", " 0.5", 0.5),
        ("top_k", "5", 5),
        ("ignore_eos", "ON", True),
        ("ignore_eos", "false", False),
        ("banned_tokens", "5, 17", (5, 17)),
        ("banned_tokens", "", ()),
        ("logit_bias", "5=-2,17=0.5", {5: -2.0, 17: 0.5}),
        ("dry_breakers", "a b", ("a b",)),
    ],
)
def test_typed_values(name, text, value):
    assert OPTIONS[name].parsed(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"), [("temperature", "x"), ("top_k", "1.5"), ("ignore_eos", "1"), ("banned_tokens", "5,"),
                       ("logit_bias", "5"), ("logit_bias", "=2")],
)  # fmt: skip
def test_typed_wrong(name, text):
    with pytest.raises(ConfigError, match=f"^--x: found '{text}', expected {OPTIONS[name].kind.typed}"):
        OPTIONS[name].parsed("--x", text)
