"""A memory plan as HTML, for notebooks and the demo: the verdict, a bar per memory, and a list of its parts.

Styles are inline, and text and background colours come from the page: it works in light and dark without a style sheet.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from exl.units import format_bytes

if TYPE_CHECKING:
    from exl.planning.plan import MemoryPlan, PlanLine

# A purpose has the same colour in all plans, so that two bars can be compared: weights are blue, the cache is amber,
# the buffers of a step are green, the memory of libraries is grey and red.
COLORS = {
    "embedding": "#7fb2f0",
    "embedding rows": "#7fb2f0",
    "resident layers": "#3f78e0",
    "pinned layers": "#3f78e0",
    "stream buffers": "#8a6fe8",
    "pinned read buffers": "#8a6fe8",
    "pinned tables": "#c3c14e",
    "head and final norm": "#35a7c9",
    "KV cache": "#f2a33a",
    "KV cache, windows": "#e8c15a",
    "residual stream": "#1f9d6b",
    "activations": "#4cbf8b",
    "logits": "#93d06f",
    "logits and samples": "#93d06f",
    "scratch of operations": "#c3c14e",
    "rounding to segments": "#8d99a6",
    "recorded steps": "#93b53c",
    "kernels": "#c98a62",
    "temporaries": "#e0708a",
    "tokenizer": "#b583d6",
    "loading": "#8d99a6",
    "cuBLAS workspace": "#e0708a",
    "CUDA context, modules": "#c98a62",
}
_OTHER_COLOR = "#8d99a6"
_STRIPES = "repeating-linear-gradient(135deg, rgba(255, 255, 255, 0.45) 0 3px, transparent 3px 7px)"
_RED, _AMBER = "#e5484d", "#f2a33a"
_NUMBER = "text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums"
_CELL = "color: inherit; border: 0; padding: 2px 0; background: none; vertical-align: baseline; text-align: left"


def plan_html(plan: MemoryPlan) -> str:
    """The verdict first. Each memory's bar is scaled to its budget, or to its sum if it has none; hatched parts are
    bounds. Then what a token reads, and notes."""
    memories = "".join(_memory(plan, device) for device in plan.devices)
    return (
        '<div class="exl-plan" style="max-width: 44em; line-height: 1.35; margin: 0 0 1em">'
        f"{_verdict(plan)}{memories}"
        f'<div style="opacity: 0.65; font-size: 85%">{_swatch(_OTHER_COLOR, True)} exact &ensp;'
        f"{_swatch(_OTHER_COLOR, False)} at most &ensp; context {plan.context} tokens</div>{_lines(plan)}</div>"
    )


def _verdict(plan: MemoryPlan) -> str:
    color = "" if plan.fits else f"; color: {_RED}"
    warnings = "".join(
        f'<div style="margin: 2px 0 0; padding: 0 0 0 0.6em; border-left: 3px solid {_AMBER}">warning: '
        f"{html.escape(text)}</div>"
        for text in plan.warnings
    )
    return (
        f'<div class="exl-verdict" style="margin: 0 0 0.7em"><b style="font-size: 108%{color}">'
        f"{html.escape(plan.verdict)}</b>{warnings}</div>"
    )


def _lines(plan: MemoryPlan) -> str:
    """What a token reads, the bound of the speed, and other notes."""
    speed = "".join(f'<div class="exl-speed">{html.escape(line)}</div>' for line in plan.speed_lines)
    notes = "".join(
        f'<div style="opacity: 0.75">{html.escape(note.text)}</div>' for note in plan.notes if note.kind != "warning"
    )
    return f'<div style="margin: 0.7em 0 0; font-size: 92%">{speed}{notes}</div>' if speed or notes else ""


def _memory(plan: MemoryPlan, device: str) -> str:
    lines = [line for line in plan.lines if line.device == device and (line.num_bytes or line.note)]
    total, budget = plan.device_bytes(device), plan.budgets.get(device)
    exact = all(line.exact for line in lines)
    sums, room = f"<b>{_size(total, exact)}</b>", max(total, 1)
    if budget is not None:
        sums, room = f"{sums} of {_size(budget, True)}", max(total, budget)
        if total > budget:
            sums = f'<span style="color: {_RED}">{sums}, does not fit</span>'
    edge = f"box-shadow: inset 0 0 0 2px {_RED}; " if budget is not None and total > budget else ""
    parts = "".join(_part(line, room) for line in lines)
    rows = "".join(_row(line) for line in lines)
    name = html.escape(device)
    return (
        '<div style="margin: 0 0 0.9em">'
        '<div style="display: flex; justify-content: space-between; gap: 1em; margin-bottom: 4px">'
        f"<b>{name}</b><span>{sums}</span></div>"
        f'<div role="img" aria-label="{name}: parts of {_size(total, exact)}" style="display: flex; height: 20px; '
        f'{edge}border-radius: 6px; overflow: hidden; background: rgba(128, 128, 128, 0.22)">{parts}</div>'
        '<table style="width: 100%; border-collapse: collapse; border: 0; margin: 6px 0 0; font-size: 92%; '
        'color: inherit">'
        f"{rows}</table></div>"
    )


def _part(line: PlanLine, room: int) -> str:
    title = html.escape(f"{line.purpose}: {_size(line.num_bytes, line.exact)}")
    return (
        f'<span class="exl-part" title="{title}" style="width: {100 * line.num_bytes / room:.3f}%; '
        f'{_fill(_color(line), line.exact)}"></span>'
    )


def _row(line: PlanLine) -> str:
    note = f' <span style="opacity: 0.65">{html.escape(line.note)}</span>' if line.note else ""
    return (
        f'<tr style="background: none; border: 0"><td style="{_CELL}">{_swatch(_color(line), line.exact)} '
        f'{html.escape(line.purpose)}{note}</td><td style="{_CELL}; {_NUMBER}">{_size(line.num_bytes, line.exact)}'
        "</td></tr>"
    )


def _swatch(color: str, exact: bool) -> str:
    size = "display: inline-block; width: 0.75em; height: 0.75em; border-radius: 3px; margin-right: 0.25em"
    return f'<span style="{size}; {_fill(color, exact)}"></span>'


def _fill(color: str, exact: bool) -> str:
    return f"background: {color}" if exact else f"background: {_STRIPES}, {color}"


def _color(line: PlanLine) -> str:
    return COLORS.get(line.purpose, _OTHER_COLOR)


def _size(num_bytes: int, exact: bool) -> str:
    return ("" if exact else "≤ ") + format_bytes(num_bytes)
