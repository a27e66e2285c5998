"""One memory plan for all models of a server: what each holds, who has to go for another, and what that one may take.

Pure functions of sizes. A model's own bytes are the lines of its plan without those that a process has once: those of
a GPU's start, and the kernels of a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from exl.planning.cpu import KERNEL_LINE
from exl.planning.devices import STARTED_LINES
from exl.planning.plan import MemoryPlan

Sizes = Mapping[str, int]  # bytes by memory, as a plan's lines name it: "cpu", or "cuda:0" and "ram"

_OF_ALL_LINES = (*STARTED_LINES, KERNEL_LINE)
_SHARES = 2  # of several models, one whose cache grows with the budget takes one part in so many


class Held(Protocol):
    """A loaded model."""

    @property
    def own(self) -> Sizes: ...

    @property
    def last_used(self) -> float:
        """On any clock that goes on."""

    @property
    def is_busy(self) -> bool:
        """It answers requests."""


H = TypeVar("H", bound=Held)


def needed_bytes(plan: MemoryPlan) -> dict[str, int]:
    """All lines."""
    return {device: plan.device_bytes(device) for device in plan.devices}


def own_bytes(plan: MemoryPlan) -> dict[str, int]:
    """Without those that models of one process share."""
    found = dict.fromkeys(plan.devices, 0)
    for line in plan.lines:
        if line.purpose not in _OF_ALL_LINES:
            found[line.device] += line.num_bytes
    return found


def left_beside(budgets: Sizes, held: Sequence[Held]) -> dict[str, int]:
    """What models that stay leave of the budgets for all lines of another one: what is shared is taken once."""
    return {
        memory: max(0, budget - sum(model.own.get(memory, 0) for model in held)) for memory, budget in budgets.items()
    }


def choose_to_unload(held: Sequence[H], needed: Sizes, budgets: Sizes) -> list[H] | None:
    """The models that go for one that takes ``needed``: idle ones first, and of these and of the others the least
    recently used first; none that need not go. None: it would not fit alone. A memory without a budget is not limited.
    """
    order = sorted(held, key=lambda model: (model.is_busy, model.last_used))
    for count in range(len(order) + 1):
        if _fits(needed, left_beside(budgets, order[count:])):
            break
    else:
        return None
    gone = order[:count]
    for model in reversed(order[:count]):  # one that went early may not be needed beside a large one
        rest = [other for other in gone if other is not model]
        stay = [other for other in held if all(other is not one for one in rest)]
        if _fits(needed, left_beside(budgets, stay)):
            gone = rest
    return gone


def room_for(needed: Sizes, left: Sizes, budgets: Sizes) -> dict[str, int]:
    """The budgets of one of several models, where ``left`` has room for what it needs at least. A cache that takes what
    there is leaves half to others."""
    return {memory: min(free, max(needed.get(memory, 0), budgets[memory] // _SHARES)) for memory, free in left.items()}


def _fits(needed: Sizes, left: Sizes) -> bool:
    return all(needed.get(memory, 0) <= free for memory, free in left.items())
