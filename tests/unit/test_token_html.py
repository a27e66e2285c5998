"""Tokens coloured by their probability: what a notebook shows of a completion with logprobs."""

from __future__ import annotations

import html
import re

import pytest

import exl
from exl import token_html
from tests.unit.token_records import record

HOSTILE = "</span><script>alert('1')</script>\" onmouseover=\"x"


def test_levels():
    shares = (1, 0.8, 0.79, 0.5, 0.2, 0.05, 0.049, 0)
    assert [token_html.level(share) for share in shares] == [4, 4, 3, 3, 2, 1, 0, 0]
    assert token_html.level_names() == ["below 5%", "5% and up", "20% and up", "50% and up", "80% and up"]
    assert len(token_html.COLORS) == len(token_html.level_names())


def test_each_token_has_its_colour_and_its_alternatives():
    likely, other = record(" a", 0.9, 1), record("b", 0.06, 2)
    records = [record(" a", 0.9, 1, [likely, other]), record("c", 0.01, 3, [likely, other]), record("d", 0.5)]
    found = re.findall(r'<span style="background: ([^;]*);[^"]*" title="([^"]*)">', token_html.tokens_html(records))
    colors = token_html.COLORS
    assert [color for color, _ in found] == [colors[4], colors[0], colors[3]]
    titles = [html.unescape(title).splitlines() for _, title in found]
    assert titles == [["␣a  90.0%", "b  6.0%"], ["␣a  90.0%", "b  6.0%", "c  1.0%"], ["d  50.0%"]]


def test_what_a_model_writes_stays_text():
    found = token_html.tokens_html([record(HOSTILE, 0.5, alternatives=[record(HOSTILE, 0.25, 2)])])
    assert "<script" not in found
    assert 'onmouseover="' not in found
    tokens, _ = found.split("probability:")
    assert html.unescape(re.sub("<[^>]*>", "", tokens)) == HOSTILE


def test_characters_of_several_tokens_come_out_whole():
    smile = "😀".encode()
    records = [exl.TokenLogprob(i, smile[i : i + 1], -1.0) for i in range(4)] + [record("\n", 0.5)]
    assert re.sub("<[^>]*>", "", token_html.token_spans(records, lambda record: "")) == "···😀⏎\n"


def luminance(rgb) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", token_html.COLORS)
@pytest.mark.parametrize(("page", "text"), [(255, 33), (17, 225)], ids=["light", "dark"])
def test_text_is_legible_on_every_colour(color, page, text):
    *rgb, alpha = (float(part) for part in re.findall(r"[\d.]+", color))
    back = luminance([alpha * part + (1 - alpha) * page for part in rgb])
    light, dark = sorted((luminance([text] * 3), back), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # level AA


def test_a_completion_is_shown_by_its_tokens_if_it_has_their_probabilities():
    with exl.load() as llm:
        drawn = llm.generate("Once <b>upon", 5, temperature=1.0, seed=1, top_logprobs=2)
        plain = llm.generate("Once <b>upon", 5, temperature=1.0, seed=1)
    shown = drawn._repr_html_()
    assert token_html.tokens_html(drawn.logprobs) in shown
    assert shown.count("title=") == 5
    assert "title=" not in plain._repr_html_()
    for done in (drawn, plain):
        assert "5 tokens, length (max_tokens)" in done._repr_html_()
