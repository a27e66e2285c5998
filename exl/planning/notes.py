"""What a plan should say besides its bytes: what will not go well, and an option that would help."""

from __future__ import annotations

from exl.errors import UnsupportedModelError
from exl.layout.layers import layer_layout
from exl.memory.host import system_ram
from exl.models.manifest import ModelManifest
from exl.planning.plan import MemoryPlan, PlanInput
from exl.planning.traffic import head_bytes, model_bytes_a_token, read_bytes
from exl.planning.verdict import Note
from exl.units import format_bytes

_ROUNDED_BITS = 8
_WORTH_SAYING = 0.01  # of a token's bytes
_OWN_SCALING = "dynamic"  # a kind of RoPE that is made for lengths beyond max_position_embeddings


def plan_notes(model: PlanInput, plan: MemoryPlan, manifest: ModelManifest) -> tuple[Note, ...]:
    found = [_beyond_ram(plan), _beyond_context(model, plan), _several_gpus(plan), _rounded_head(model, manifest)]
    return tuple(note for note in found if note is not None)


def _beyond_ram(plan: MemoryPlan) -> Note | None:
    """Of this machine: the plan may be for another, but whoever plans for a card mostly has it."""
    needed = sum(plan.device_bytes(device) for device in plan.devices if not device.startswith("cuda"))
    total, available = system_ram()
    if total is not None and needed > total:
        return Note("warning", f"needs {format_bytes(needed)} of RAM; this machine has {format_bytes(total)}")
    if available is not None and total is not None and needed > available:
        free = f"{format_bytes(available)} of this machine's {format_bytes(total)}"
        return Note("warning", f"needs {format_bytes(needed)} of RAM; {free} are free now")
    return None


def _beyond_context(model: PlanInput, plan: MemoryPlan) -> Note | None:
    own = model.config.max_position
    if plan.context <= own or model.config.rope.kind == _OWN_SCALING:
        return None
    return Note(
        "warning",
        f"a context of {plan.context} tokens is longer than the model's own, {own} (max_position_embeddings): "
        "beyond it answers get worse",
    )


def _several_gpus(plan: MemoryPlan) -> Note | None:
    used = sum(device.startswith("cuda") for device in plan.devices)
    return Note("warning", f"a plan for {used} GPUs: this version of exl computes on one") if used > 1 else None


def _rounded_head(model: PlanInput, manifest: ModelManifest) -> Note | None:
    """What ``head=8`` would gain, if the head is dense. A GPU's kernels multiply codes as they read them. A CPU writes
    panels of f32 first, which takes longer than the bytes save: there it gains memory only."""
    rounded = manifest.with_head_bits(_ROUNDED_BITS).head
    if rounded == manifest.head:
        return None
    try:
        layout = layer_layout(rounded, model.target)
    except UnsupportedModelError:
        return None
    read = head_bytes(model) - read_bytes(layout)
    share = read / model_bytes_a_token(model, 0)
    kept = model.head.num_bytes - layout.num_bytes  # negative where the embedding is the head, and stays
    if share < _WORTH_SAYING:
        return None
    if model.target.kind == "cpu":
        return Note("advice", f"head=8 would save {format_bytes(kept)} of RAM") if kept > 0 else None
    cost = f", for {format_bytes(-kept)} more of VRAM" if kept < 0 else ""
    return Note("advice", f"head=8 would save {format_bytes(read)}, {100 * share:.0f} % of a token's bytes{cost}")
