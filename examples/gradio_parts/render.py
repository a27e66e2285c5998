"""The HTML of the page: pure functions. Text that a model or a user wrote is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

import exl
from exl.planning.devices import HOST
from exl.remote_chat import RemoteCompletion, RemoteModel
from exl.token_html import level, level_names, token_spans, visible, with_itself
from exl.units import format_bytes

from .conversation import Answer, Reading
from .settings import LoadSettings
from .worker import Waiting


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


def status(llm: exl.LLM | None, settings: LoadSettings | None, num_waiting: int, *, loading: bool) -> str:
    """The loaded model, and how many requests wait for another one. ``loading``: if there is none, whether it comes."""
    if llm is None or settings is None:
        told = "a model is being loaded" if loading else "no model is loaded"
        return f'<div class="exl-status exl-off"><i></i><span>{told}</span></div>'
    bits = f"{llm.quant.bits}-bit" if llm.quant else "dense"
    found = llm.plan
    devices = ", ".join(device for device in found.devices if device != HOST)
    parts = [bits, devices, f"{settings.options['kv_cache']} cache", f"context {found.context}"]
    parts.append(format_bytes(found.num_bytes))
    queue = f'<b class="exl-queue">{num_waiting} waiting</b>' if num_waiting else ""
    return (
        f'<div class="exl-status"><i></i><b>{html.escape(settings.name)}</b>'
        f"<span>{html.escape(' · '.join(parts))}</span>{queue}</div>"
    )


def server_status(remote: RemoteModel) -> str:
    """Whom a demo with ``--url`` talks with."""
    context = [] if remote.context is None else [f"context {remote.context}"]
    told = html.escape(" · ".join([remote.url, *context]))
    return f'<div class="exl-status"><i></i><b>{html.escape(remote.name)}</b><span>{told}</span></div>'


def waiting(ahead: int) -> str:
    others = "1 request is" if ahead == 1 else f"{ahead} requests are"
    return notice(f"Waiting for the model: {others} before yours", "wait")


_LIMITS = {"max_tokens": "cut off by max tokens", "context": "cut off: the context is full"}


def stats(
    done: exl.Completion | RemoteCompletion | None, num_tokens: int = 0, context: int = 0, *, with_seed: bool = False
) -> str:
    """Speed and size of an answer; None: says that it was stopped."""
    if done is None:
        return '<div class="exl-stats"><span>stopped</span></div>'
    parts = [
        *([f"<em>{_LIMITS[done.limit]}</em>"] if done.limit is not None else []),
        f"<b>{done.tokens_per_second:.1f} tokens/s</b>",
        f"{done.num_tokens} tokens",
        f"first after {done.prompt_seconds * 1e3:.0f} ms",
        f"context {num_tokens} of {context}" if context else f"context {num_tokens}",
        *([f"seed {done.seed}"] if with_seed else []),
    ]
    return f'<div class="exl-stats">{"".join(f"<span>{part}</span>" for part in parts)}</div>'


def seed(done: exl.Completion | RemoteCompletion | None) -> str:
    return "" if done is None or done.seed is None else f'<div class="exl-stats"><span>seed {done.seed}</span></div>'


def answering(answer: Answer) -> str:
    """How many tokens there are so far, and how fast they come."""
    if answer.num_tokens < 2 or not answer.seconds:
        return notice("Answering", "wait")
    speed = (answer.num_tokens - 1) / answer.seconds
    return notice(f"Answering: {answer.num_tokens} tokens, {speed:.1f} tokens/s", "wait")


def before_answer(state: Waiting | Reading) -> str:
    """What is told until the first token: who is before one, then how far the model has read the prompt."""
    if isinstance(state, Waiting):
        return waiting(state.ahead)
    return _bar("Reading the prompt", f"{state.tokens} of {state.total} tokens", state.tokens, state.total)


def progress(name: str, done: int, total: int) -> str:
    told = f"{format_bytes(done)} of {format_bytes(total)}" if total else "reading headers"
    return _bar(f"Loading {name}", told, done, total)


def _bar(title: str, told: str, done: int, total: int) -> str:
    share = 100 * done / total if total else 0
    return (
        f'<div class="exl-progress" role="status"><div>{html.escape(title)}<span>{html.escape(told)}</span></div>'
        f'<div class="exl-track"><div style="width: {share:.1f}%"></div></div></div>'
    )


def plan(title: str, found: exl.MemoryPlan | None, hint: str = "") -> str:
    """A memory plan with a title, as in a notebook; None: the hint instead."""
    body = f'<div class="exl-hint">{html.escape(hint)}</div>' if found is None else found._repr_html_()
    return f'<div class="exl-card"><div class="exl-title">{html.escape(title)}</div>{body}</div>'


def tokens(prompt: str, records: Sequence[exl.TokenLogprob]) -> str:
    """A prompt, and the tokens that continue it, coloured by probability. Each token carries its alternatives as JSON;
    the page's script shows them as text, and lets the arrow keys move from token to token."""
    spans = token_spans(records, _attributes)
    return (
        f'<div class="exl-tokens" role="group" aria-label="Tokens; the arrow keys move between them">'
        f'<span class="exl-prompt">{html.escape(prompt)}</span>{spans}</div>'
    )


def legend() -> str:
    keys = "".join(f'<span><i class="p{i}"></i>{name}</span>' for i, name in enumerate(level_names()))
    return f'<div class="exl-legend">{keys}<em>hover or tap a token for its alternatives</em></div>'


def _attributes(record: exl.TokenLogprob) -> str:
    rows = [
        [visible(other.text), other.probability, other.token_id == record.token_id] for other in with_itself(record)
    ]
    data = html.escape(json.dumps(rows, ensure_ascii=False), quote=True)
    return f'class="exl-token p{level(record.probability)}" tabindex="-1" data-top="{data}"'
