"""Tokens as HTML, coloured by their probability: for notebooks and the demo. Text is escaped here."""

from __future__ import annotations

import codecs
import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl.text.logprobs import TokenLogprob

# Lowest probabilities of the levels 4 to 1; below them it is 0.
EDGES = (0.8, 0.5, 0.2, 0.05)
# Translucent, so that the page's own text stays legible on them in light and dark.
COLORS = (
    "rgba(229, 72, 77, 0.45)",
    "rgba(240, 140, 50, 0.40)",
    "rgba(235, 200, 50, 0.35)",
    "rgba(140, 190, 70, 0.30)",
    "rgba(48, 164, 108, 0.22)",
)


def level(probability: float) -> int:
    """``level(0.9) == 4``: how sure the model was, from 0 to 4."""
    return sum(probability >= edge for edge in EDGES)


def level_names() -> list[str]:
    """What the levels mean, from 0 to 4."""
    return [f"below {EDGES[-1]:.0%}", *(f"{edge:.0%} and up" for edge in reversed(EDGES))]


def with_itself(record: TokenLogprob) -> tuple[TokenLogprob, ...]:
    """The alternatives of a token, and the token itself if it is not among them."""
    if any(other.token_id == record.token_id for other in record.alternatives):
        return record.alternatives
    return (*record.alternatives, record)


def visible(text: str) -> str:
    """White space as signs, so that a token that consists of it can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "no text"


def token_spans(records: Sequence[TokenLogprob], attributes: Callable[[TokenLogprob], str]) -> str:
    """A ``<span>`` for each token, with ``attributes`` of its record (HTML, escaped by whoever made it).

    A character of several tokens is in the span of the last of them; the others show a dot.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    spans = []
    for record in records:
        shown = html.escape(utf8.decode(record.token_bytes) or "·")
        shown = shown.replace("\n", '<span class="exl-newline" style="opacity: 0.5">⏎</span>\n')
        spans.append(f"<span {attributes(record)}>{shown}</span>")
    return "".join(spans)


def tokens_html(records: Sequence[TokenLogprob]) -> str:
    """Tokens for a notebook: styles are inline; each token's title has its probability and its alternatives."""
    keys = "".join(
        f'<span style="{_back(i)}; padding: 0 0.5em; border-radius: 3px; margin-right: 0.6em">{name}</span>'
        for i, name in enumerate(level_names())
    )
    return (
        f'<div style="white-space: pre-wrap; line-height: 1.7">{token_spans(records, _inline)}</div>'
        f'<div style="font-size: 85%; margin: 0.4em 0">probability: {keys}</div>'
    )


def _inline(record: TokenLogprob) -> str:
    rows = [f"{visible(other.text)}  {other.probability:.1%}" for other in with_itself(record)]
    title = html.escape("\n".join(rows), quote=True).replace("\n", "&#10;")
    return f'style="{_back(level(record.probability))}; border-radius: 3px" title="{title}"'


def _back(i: int) -> str:
    return f"background: {COLORS[i]}"
