"""The HTML of the page: pure functions. Text that a model or a user wrote is escaped here."""

from __future__ import annotations

import codecs
import html
import json
from collections.abc import Sequence

import exl
from exl.planning.devices import HOST
from exl.units import format_bytes

from .settings import LoadSettings

# Lowest probabilities of the classes p4 to p1; below them it is p0. page.css has their colours.
EDGES = (0.8, 0.5, 0.2, 0.05)


def brand() -> str:
    return '<span class="exl-brand">exl</span>'


def theme_toggle() -> str:
    return (
        '<button type="button" id="theme-toggle" title="Light or dark" aria-label="Light or dark">'
        "<span></span></button>"
    )


def notice(text: str, kind: str = "error") -> str:
    """One line; "" if there is no text. ``kind``: error, note or wait."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="exl-notice exl-{kind}" role="{role}">{html.escape(text)}</div>'


def status(llm: exl.LLM | None, settings: LoadSettings | None, num_jobs: int) -> str:
    """The loaded model, and how many requests wait for it."""
    if llm is None or settings is None:
        told = "a model is being loaded" if num_jobs else "no model is loaded"
        return f'<div class="exl-status exl-off"><i></i><span>{told}</span></div>'
    bits = f"{llm.quant.bits}-bit" if llm.quant else "dense"
    found = llm.plan
    devices = ", ".join(device for device in found.devices if device != HOST)
    parts = [bits, devices, f"{settings.options['kv_cache']} cache", f"context {found.context}"]
    parts.append(format_bytes(found.num_bytes))
    queue = f'<b class="exl-queue">{num_jobs - 1} waiting</b>' if num_jobs > 1 else ""
    return (
        f'<div class="exl-status"><i></i><b>{html.escape(settings.name)}</b>'
        f"<span>{html.escape(' · '.join(parts))}</span>{queue}</div>"
    )


def waiting(ahead: int) -> str:
    others = "1 request is" if ahead == 1 else f"{ahead} requests are"
    return notice(f"Waiting for the model: {others} before yours", "wait")


def stats(done: exl.Completion | None, num_tokens: int = 0, context: int = 0) -> str:
    """Speed and seed of an answer; None: says that it was stopped."""
    if done is None:
        return '<div class="exl-stats">stopped</div>'
    speed = f"<span><b>{done.tokens_per_second:.1f} tokens/s</b></span>"
    parts = [
        f"{done.num_tokens} tokens",
        f"first after {done.prompt_seconds * 1e3:.0f} ms",
        f"context {num_tokens} of {context}",
        f"seed {done.seed}",
        *(["cut off by max tokens or context"] if done.finish_reason == "length" else []),
    ]
    spans = "".join(f"<span>{html.escape(part)}</span>" for part in parts)
    return f'<div class="exl-stats">{speed}{spans}</div>'


def progress(name: str, done: int, total: int) -> str:
    share = 100 * done / total if total else 0
    told = f"{format_bytes(done)} of {format_bytes(total)}" if total else "reading headers"
    return (
        f'<div class="exl-progress" role="status"><div>Loading {html.escape(name)}<span>{told}</span></div>'
        f'<div class="exl-track"><div style="width: {share:.1f}%"></div></div></div>'
    )


def plan(title: str, found: exl.MemoryPlan | None, hint: str = "") -> str:
    """A memory plan with a title, as in a notebook; None: the hint instead."""
    body = f'<div class="exl-hint">{html.escape(hint)}</div>' if found is None else found._repr_html_()
    return f'<div class="exl-card"><div class="exl-title">{html.escape(title)}</div>{body}</div>'


def tokens(prompt: str, records: Sequence[exl.TokenLogprob]) -> str:
    """A prompt, and the tokens that continue it, coloured by probability. Each token carries its alternatives as JSON;
    the page's script shows them as text."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    spans = [_token(record, utf8.decode(record.token_bytes)) for record in records]
    return f'<div class="exl-tokens"><span class="exl-prompt">{html.escape(prompt)}</span>{"".join(spans)}</div>'


def legend() -> str:
    names = [f"below {EDGES[-1]:.0%}", *(f"{edge:.0%} and up" for edge in reversed(EDGES))]
    keys = "".join(f'<span><i class="p{i}"></i>{name}</span>' for i, name in enumerate(names))
    return f'<div class="exl-legend">{keys}<em>hover or tap a token for its alternatives</em></div>'


def probability_class(probability: float) -> str:
    """``probability_class(0.9) == "p4"``."""
    return f"p{sum(probability >= edge for edge in EDGES)}"


def _token(record: exl.TokenLogprob, text: str) -> str:
    """``text``: the characters that the token completes. If it completes none, a dot is shown."""
    rows = [[_visible(other.text), other.probability, other.token_id == record.token_id] for other in top(record)]
    shown = html.escape(text or "·").replace("\n", '<span class="exl-newline">⏎</span>\n')
    data = html.escape(json.dumps(rows, ensure_ascii=False), quote=True)
    return (
        f'<span class="exl-token {probability_class(record.probability)}" tabindex="0" data-top="{data}">{shown}</span>'
    )


def top(record: exl.TokenLogprob) -> tuple[exl.TokenLogprob, ...]:
    """The alternatives, and the token itself if it is not among them."""
    if any(other.token_id == record.token_id for other in record.alternatives):
        return record.alternatives
    return (*record.alternatives, record)


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "no text"
