"""The memory table of README.md: which models fit which cards, planned from headers alone, like `exl plan`.

python scripts/memory_table.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import exl
from benchmarks.synthetic import SHAPES, write_headers
from exl.planning.plan import Tier

MODELS = {"7b": "Llama 2 7B", "13b": "Llama 2 13B", "70b": "Llama 2 70B"}
CARDS = ("8GB", "12GB", "24GB")
CONTEXT, KV_CACHE = 4096, "q8"


def table() -> str:
    """One row per model: the memory with all layers in VRAM, and the layers that each card holds."""
    lines = [
        "| 4 bits, groups of 128 | all layers in VRAM | "
        + " | ".join(card.replace("GB", " GB") for card in CARDS)
        + " |",
        "| --- " * (2 + len(CARDS)) + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for shape, name in MODELS.items():
            model = Path(folder) / shape
            write_headers(model, SHAPES[shape])
            cells = [f"{_plan(model, '1000GB').device_bytes('cuda:0') / 1e9:.1f} GB"]
            cells += [_cell(_plan(model, card)) for card in CARDS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plan(model: Path, vram: str) -> exl.MemoryPlan:
    return exl.plan(model, vram=vram, context=CONTEXT, kv_cache=KV_CACHE)


def _cell(plan: exl.MemoryPlan) -> str:
    tiers = [tier for tier, _ in plan.placement.layers]
    resident = tiers.count(Tier.DEVICE)
    if resident == len(tiers):
        return f"all {len(tiers)} layers"
    return f"{resident} of {len(tiers)} layers, {plan.device_bytes('ram') / 1e9:.1f} GB of RAM"


if __name__ == "__main__":
    print(table())
