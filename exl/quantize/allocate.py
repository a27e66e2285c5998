"""Bits where they matter: widths of the linears so that the sum of their errors is least and the average is kept.

The average is that of the codes' bits over all quantized weights, in the source's sizes; scales and zeros come on top,
(16 + bits) / group size a weight.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from exl.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """What gets one width: its number of weights, and its error at each width that it may have."""

    key: Hashable
    num_weights: int
    errors: Mapping[int, float]


def allocate(units: Sequence[Unit], target: float) -> dict[Hashable, int]:
    """The width of each unit, by key; on average at most ``target`` bits per weight.

    All begin at their least width. Then the step that takes most error away per bit is taken, again and again, as long
    as it fits: steps along the lower convex hull of a unit's errors over its sizes, which is the best that
    there is for the averages at which a step ends (Lagrange). What is left at the end goes to any step that still fits.
    Raises ``ConfigError`` if the least widths are above the target.
    """
    budget = target * sum(unit.num_weights for unit in units)
    widths = {unit.key: min(unit.errors) for unit in units}
    left = budget - sum(unit.num_weights * widths[unit.key] for unit in units)
    if left < -1e-6 * budget:
        least = (budget - left) / (budget / target)
        raise ConfigError(
            f"target_bits: found {target:g}, expected at least {least:.3g}: the least that modules may have"
        )
    slack = 1e-9 * budget  # a target such as 3.3 has no exact double
    queue = [step for i, unit in enumerate(units) if (step := _hull_step(i, unit, widths[unit.key])) is not None]
    heapq.heapify(queue)
    while queue:
        _, i, width = heapq.heappop(queue)
        unit = units[i]
        cost = unit.num_weights * (width - widths[unit.key])
        if cost <= left + slack:
            left, widths[unit.key] = left - cost, width
            if (step := _hull_step(i, unit, width)) is not None:
                heapq.heappush(queue, step)
    while (step := _last_step(units, widths, left + slack)) is not None:
        _, i, width = step
        unit = units[i]
        left, widths[unit.key] = left - unit.num_weights * (width - widths[unit.key]), width
    return widths


def average_bits(units: Sequence[Unit], widths: Mapping[Hashable, int]) -> float:
    total = sum(unit.num_weights for unit in units)
    return sum(unit.num_weights * widths[unit.key] for unit in units) / total


_Step = tuple[float, int, int]  # error taken away per bit of all its weights, negative; the unit's index; the new width


def _gain(i: int, unit: Unit, old: int, new: int) -> _Step:
    return (unit.errors[new] - unit.errors[old]) / (unit.num_weights * (new - old)), i, new


def _hull_step(i: int, unit: Unit, width: int) -> _Step | None:
    """The best step from ``width`` up: the next corner of the hull. None: nothing takes error away."""
    steps = [_gain(i, unit, width, new) for new in unit.errors if new > width]
    best = min(steps, default=None)
    return best if best is not None and best[0] < 0 else None


def _last_step(units: Sequence[Unit], widths: Mapping[Hashable, int], left: float) -> _Step | None:
    steps = [
        _gain(i, unit, width, new)
        for i, unit in enumerate(units)
        for width in [widths[unit.key]]
        for new in unit.errors
        if new > width and unit.num_weights * (new - width) <= left
    ]
    best = min(steps, default=None)
    return best if best is not None and best[0] < 0 else None
