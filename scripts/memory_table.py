"""The memory table of README.md: which models fit which cards, planned from their shapes, like `exl plan --shape`.

python -m scripts.memory_table
"""

from __future__ import annotations

import exl

MODELS = {"llama-2-7b": "Llama 2 7B", "llama-2-13b": "Llama 2 13B", "llama-2-70b": "Llama 2 70B"}
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
    for shape, name in MODELS.items():
        cells = [f"{_plan(shape, '1000GB').device_bytes('cuda:0') / 1e9:.1f} GB"]
        cells += [_cell(_plan(shape, card)) for card in CARDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plan(shape: str, vram: str) -> exl.MemoryPlan:
    return exl.plan(shape=shape, vram=vram, context=CONTEXT, kv_cache=KV_CACHE)


def _cell(plan: exl.MemoryPlan) -> str:
    resident, num_layers = plan.layer_counts["resident"], len(plan.placement.layers)
    if resident == num_layers:
        return f"all {num_layers} layers"
    return f"{resident} of {num_layers} layers, {plan.device_bytes('ram') / 1e9:.1f} GB of RAM"


if __name__ == "__main__":
    print(table())
