"""The plan of a model and of a smaller one that drafts for it: one budget for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exl.errors import MemoryBudgetError
from exl.families.config import ModelConfig
from exl.layout.specs import Target
from exl.planning.devices import HOST, STARTED_LINES
from exl.planning.options import EngineOptions, default_context
from exl.planning.plan import MemoryPlan, PlanLine
from exl.units import format_bytes

_FIRST_GPU = "cuda:0"


def draft_context(options: EngineOptions, config: ModelConfig, draft: ModelConfig) -> int:
    """Tokens that the draft model of ``options`` can see: as many as the model, up to its own maximum. With
    context="auto", which fills the memory that the draft model leaves, as many as the model has by default."""
    asked = options.context if isinstance(options.context, int) else default_context(config)
    return min(asked, draft.max_position)


def draft_options(options: EngineOptions, context: int) -> EngineOptions:
    """How the draft model of ``options`` is loaded: all of it in memory. What it has no choice in is as for the
    model."""
    return dataclasses.replace(
        options,
        draft=None,
        rope=None,
        window_cache=False,  # its sequences' pages are few, and are not given back while they run
        lora={},
        context=context,
        cache_tokens=max(context, options.cache_tokens if isinstance(options.cache_tokens, int) else 0),
        vram=options.vram_bytes[:1] or None,
        ram=None,
        kv_ram=None,
        resident_layers=None,
        head="file",
        dense="file",
        embed="auto",
        prefill_window=options.prefill_chunk,
    )


@dataclass(frozen=True)
class BesideDraft:
    """A model's plan beside a draft model, which was placed first."""

    left: EngineOptions  # the model's, with what the draft model leaves of the budgets
    _lines: tuple[PlanLine, ...]
    _budgets: Mapping[str, int]

    @classmethod
    def of(cls, draft: MemoryPlan, folder: Path, options: EngineOptions, target: Target) -> BesideDraft:
        """Raises ``MemoryBudgetError`` if the draft model does not fit whole."""
        lines = tuple(
            PlanLine("draft model", device, _needed(draft, device), False, f"{folder.name}, {draft.context} tokens")
            for device in draft.devices
        )
        budgets = _budgets(options, target)
        for line in lines:
            if line.device in budgets and line.num_bytes >= budgets[line.device]:
                raise _too_large(folder, line, budgets[line.device])
        if draft.placement.num_streamed:
            raise MemoryBudgetError(
                f"draft: {folder} must be in memory whole, and {draft.placement.num_streamed} of its layers find no "
                f"room in {format_bytes(budgets[_FIRST_GPU])} of VRAM"
            )
        return cls(_without(options, lines), lines, budgets)

    def both(self, plan: MemoryPlan) -> MemoryPlan:
        """``plan``: the model's, by ``left``."""
        return dataclasses.replace(plan, lines=_beside(plan, self._lines), budgets={**plan.budgets, **self._budgets})


def _needed(draft: MemoryPlan, device: str) -> int:
    """Beside another model: what a GPU's start takes is taken once."""
    return sum(line.num_bytes for line in draft.lines if line.device == device and line.purpose not in STARTED_LINES)


def _budgets(options: EngineOptions, target: Target) -> dict[str, int]:
    """Of the memories that the draft model may be in."""
    found = {_FIRST_GPU: options.vram_bytes[0]} if target.kind == "cuda" else {}
    if options.budget is not None:
        found[HOST if target.kind == "cuda" else target.kind] = options.budget
    return found


def _too_large(folder: Path, line: PlanLine, budget: int) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"draft: {folder} needs {format_bytes(line.num_bytes)} of {line.device}, the budget is {format_bytes(budget)}"
    )


def _without(options: EngineOptions, lines: tuple[PlanLine, ...]) -> EngineOptions:
    """What is left of the budgets."""
    taken = {line.device: line.num_bytes for line in lines}
    if options.vram_bytes:
        first, *others = options.vram_bytes
        options = dataclasses.replace(options, vram=(first - taken.get(_FIRST_GPU, 0), *others))
    if options.budget is not None:
        host = sum(num_bytes for device, num_bytes in taken.items() if device != _FIRST_GPU)
        options = dataclasses.replace(options, ram=options.budget - host)
    return options


def _beside(plan: MemoryPlan, more: tuple[PlanLine, ...]) -> tuple[PlanLine, ...]:
    """Each of ``more`` after the lines of its memory."""
    devices = dict.fromkeys((*plan.devices, *(line.device for line in more)))
    return tuple(line for device in devices for line in (*plan.lines, *more) if line.device == device)
