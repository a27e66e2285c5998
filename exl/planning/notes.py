"""What a plan should say besides its bytes: what will not go well, and an option that would help."""

from __future__ import annotations

from collections.abc import Mapping

from exl.memory.host import system_ram
from exl.planning.plan import MemoryPlan, PlanInput
from exl.planning.traffic import model_bytes_a_token
from exl.planning.verdict import Note
from exl.units import format_bytes

_WORTH_SAYING = 0.01  # of a token's bytes
_OWN_SCALING = "dynamic"  # a kind of RoPE that is made for lengths beyond max_position_embeddings


def plan_notes(
    model: PlanInput, plan: MemoryPlan, rounded: Mapping[str, tuple[MemoryPlan, PlanInput]]
) -> tuple[Note, ...]:
    """``rounded``: by "head" and "dense", the plan of the same model with that option at 8 bits."""
    found = [_beyond_ram(plan), _beyond_context(model, plan), _several_gpus(plan)]
    found += [_rounded(model, plan, f"{option}=8", other) for option, other in rounded.items()]
    if model.config.is_text_part:
        found.append(Note("fact", "images are not read: this is the text part of a model that takes them"))
    if model.config.rope.kind != "default":
        found.append(Note("fact", f"RoPE: {model.config.rope}; {model.config.max_position} positions"))
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


def _rounded(model: PlanInput, plan: MemoryPlan, option: str, rounded: tuple[MemoryPlan, PlanInput]) -> Note | None:
    """What ``option`` would gain: the difference of the two plans. exl's own kernels multiply codes as they read them.
    torch's, on a CPU, write panels of f32 first, and no gain in speed has been measured there: memory is all that is
    told."""
    other, of_other = rounded
    if not other.fits:
        return None
    read = model_bytes_a_token(model, 0) - model_bytes_a_token(of_other, 0)
    share = read / model_bytes_a_token(model, 0)
    more_layers = len(other.placement.resident) - len(plan.placement.resident)
    if share < _WORTH_SAYING or more_layers < 0:
        return None
    on_gpu = model.target.kind == "cuda"
    place = "VRAM" if on_gpu else "RAM"
    layers = f"keep {more_layers} more layer{'s' if more_layers > 1 else ''} in {place}"
    grows = _exact_bytes(other, on_gpu) - _exact_bytes(plan, on_gpu)
    if not on_gpu and not model.target.compiled:
        text = layers if more_layers else f"save {format_bytes(-grows)} of RAM" if grows < 0 else ""
        return Note("advice", f"{option} would {text}") if text else None
    # More memory without more layers: the embedding is the head; it stays beside the new one, or moves to RAM.
    more_ram = _exact_bytes(other, False) - _exact_bytes(plan, False) if on_gpu else 0
    more = ((0 if more_layers else grows, place), (more_ram, "RAM"))
    costs = [f"{format_bytes(num_bytes)} more of {memory}" for num_bytes, memory in more if num_bytes > 0]
    rest = (f" and {layers}" if more_layers else "") + (f", for {' and '.join(costs)}" if costs else "")
    return Note("advice", f"{option} would save {format_bytes(read)}, {100 * share:.0f} % of a token's bytes{rest}")


def _exact_bytes(plan: MemoryPlan, on_gpu: bool) -> int:
    """Of all GPUs, or of the RAM."""
    return sum(line.num_bytes for line in plan.lines if line.exact and line.device.startswith("cuda") == on_gpu)
