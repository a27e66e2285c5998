"""A plan in one sentence, and the lines that follow it: what to know before the table of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl.units import short_bytes

if TYPE_CHECKING:
    from exl.planning.plan import MemoryPlan


@dataclass(frozen=True)
class Note:
    """``kind``: "warning" (something will not go well), "assumption" (a figure that nobody gave), "advice", or
    "fact" (of the model)."""

    kind: str
    text: str


def joined(parts: Sequence[str], word: str = "and") -> str:
    """``joined(["a", "b", "c"]) == "a, b and c"``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def verdict(plan: MemoryPlan) -> str:
    """``"22 of 32 layers in VRAM, 10 streamed from RAM; needs 5.93 of 6 GB of VRAM and 2.1 GB of RAM"``."""
    needs = _needs(plan)
    if plan.fits:
        return f"{_layers(plan)}; needs {needs}"
    missing = [
        f"{short_bytes(plan.device_bytes(device) - budget)} of {_memory_name(plan, device)}"
        for device, budget in plan.budgets.items()
        if plan.device_bytes(device) > budget
    ]
    layers = "with every layer streamed" if not plan.placement.resident else _layers(plan)
    return f"does not fit: lacks {' and '.join(missing)}, {layers}; needs {needs}"


def _layers(plan: MemoryPlan) -> str:
    counts, num_layers = plan.layer_counts, len(plan.placement.layers)
    gpus = list(dict.fromkeys(device for _, device in plan.placement.layers if device.startswith("cuda")))
    resident, place = counts["resident"], "VRAM" if gpus else "RAM"
    held = f"all {num_layers}" if resident == num_layers else f"{resident} of {num_layers}"
    text = f"{held} layers in {place}"
    if len(gpus) > 1:
        on = [sum(tier.value == "resident" and device == gpu for tier, device in plan.placement.layers) for gpu in gpus]
        text += f" ({', '.join(f'{n} on {gpu}' for n, gpu in zip(on, gpus, strict=True))})"
    sources = [f"{n} from {source}" for n, source in ((counts["pinned"], "RAM"), (counts["disk"], "the disk")) if n]
    if not sources:
        return text
    if len(sources) == 1:
        return f"{text}, {sources[0].replace(' ', ' streamed ', 1)}"
    return f"{text}, {num_layers - resident} streamed ({' and '.join(sources)})"


def _needs(plan: MemoryPlan) -> str:
    on_gpu = any(device.startswith("cuda") for device in plan.devices)
    parts = []
    for device in plan.devices:
        budget = plan.budgets.get(device)
        size = short_bytes(plan.device_bytes(device))
        size = size if budget is None else _of(plan.device_bytes(device), budget)
        parts.append(f"{size} of {_memory_name(plan, device)}" if on_gpu else size)
    return joined(parts)


def _memory_name(plan: MemoryPlan, device: str) -> str:
    if not device.startswith("cuda"):
        return "RAM"
    several = sum(other.startswith("cuda") for other in plan.devices) > 1
    return f"VRAM on {device}" if several else "VRAM"


def _of(num_bytes: int, budget: int) -> str:
    """``"5.93 of 6 GB"``, in one unit if both have the same."""
    used, given = short_bytes(num_bytes), short_bytes(budget)
    if used.split()[1] == given.split()[1]:
        used = used.split()[0]
    return f"{used} of {given}"
