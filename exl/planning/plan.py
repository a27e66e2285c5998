"""Where every byte goes, decided before anything is allocated: a pure function of shapes, options and budgets.

A line is *exact* (a buffer that is allocated once, by that very number) or a *bound* (temporaries of the libraries,
which come and go). Sizes are given as whole bytes, "6GB" (10^9) or "6GiB" (2^30).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from exl.batch import PAGE_SIZE
from exl.checkpoint.config import ModelConfig
from exl.errors import ConfigError
from exl.layout.layers import (
    BLOB_ALIGN,
    DTYPE_BYTES,
    PACK_COLUMNS,
    DeviceKVLayout,
    KVLayout,
    LayerLayout,
    StepLimits,
    Target,
    align_up,
    scratch_bytes,
    step_bytes,
)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def parse_bytes(size: int | str, name: str = "size") -> int:
    """``parse_bytes("1.5GB") == 1_500_000_000``. ``ConfigError`` names the option for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise ConfigError(f"{name}: found {size!r}, expected a size such as '6GB', '512MiB' or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(num_bytes: int) -> str:
    """``format_bytes(1_234_000_000) == "1.23 GB"``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(num_bytes) >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.2f} {unit}"
    return f"{num_bytes} B"


class Tier(enum.Enum):
    """Where weights live between two uses."""

    DEVICE = "resident"
    PINNED = "pinned"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """``layers[i]``: the tier of layer i, and the device that computes it."""

    layers: tuple[tuple[Tier, str], ...]

    @property
    def resident(self) -> tuple[int, ...]:
        return self.on_tier(Tier.DEVICE)

    def on_tier(self, tier: Tier) -> tuple[int, ...]:
        return tuple(i for i, (found, _) in enumerate(self.layers) if found is tier)

    @property
    def num_streamed(self) -> int:
        return len(self.layers) - len(self.resident)


@dataclass(frozen=True)
class PlanLine:
    purpose: str
    device: str
    num_bytes: int
    exact: bool
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """What a model will take, line by line. ``budgets``: what each memory was given, by the name of its lines; one that
    is not there gives as much as there is."""

    lines: tuple[PlanLine, ...]
    placement: Placement
    context: int  # tokens of one sequence
    num_pages: int
    num_slots: int  # 0: nothing is streamed
    budgets: Mapping[str, int] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the memories, in the order of their lines."""
        return tuple(dict.fromkeys(line.device for line in self.lines))

    @property
    def num_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)

    @property
    def exact_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines if line.exact)

    @property
    def budget(self) -> int | None:
        """Of all memories together; None where one of them has none."""
        return sum(self.budgets.values()) if all(device in self.budgets for device in self.devices) else None

    def device_bytes(self, device: str) -> int:
        return sum(line.num_bytes for line in self.lines if line.device == device)

    @property
    def fits(self) -> bool:
        return all(self.device_bytes(device) <= budget for device, budget in self.budgets.items())

    def to_json(self) -> dict[str, object]:
        return {
            "lines": [vars(line) for line in self.lines],
            "num_bytes": self.num_bytes,
            "exact_bytes": self.exact_bytes,
            "budget": self.budget,
            "budgets": dict(self.budgets),
            "fits": self.fits,
            "context": self.context,
            "layers": {tier.value: sum(t is tier for t, _ in self.placement.layers) for tier in Tier},
        }

    def table(self) -> str:
        """One row a line, bounds marked by <=; below each memory's lines its sum, and its budget."""
        rows: list[tuple[str, str, str, str]] = []
        for device in self.devices:
            lines = [line for line in self.lines if line.device == device]
            rows += [(line.purpose, device, _at_most(line.num_bytes, line.exact), line.note) for line in lines]
            total = self.device_bytes(device)
            name = "" if len(self.devices) == 1 else device
            rows.append(("total", name, _at_most(total, all(line.exact for line in lines)), ""))
            budget = self.budgets.get(device)
            if budget is not None:
                rows.append(("budget", name, format_bytes(budget), "fits" if total <= budget else "does not fit"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        )

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        """Each memory in a few words; ``print`` shows the table."""
        memories = [f"{device} {_at_most(self.device_bytes(device), False)}" for device in self.devices]
        resident, layers = len(self.placement.resident), len(self.placement.layers)
        state = "" if self.fits else ", does not fit"
        return (
            f"MemoryPlan({', '.join(memories)}, {resident} of {layers} layers resident, {self.context} tokens{state})"
        )

    def _repr_html_(self) -> str:
        """A bar for each memory, in proportion, and what its parts are."""
        from exl.planning.html import plan_html  # which imports this module

        return plan_html(self)


def _at_most(num_bytes: int, exact: bool) -> str:
    return ("" if exact else "<= ") + format_bytes(num_bytes)


@dataclass(frozen=True)
class PlanInput:
    """What a plan is made of besides the budget: a model's layouts and the limits of its steps."""

    config: ModelConfig
    embed: LayerLayout
    layers: Sequence[LayerLayout]
    head: LayerLayout
    target: Target
    kv_layout: KVLayout | DeviceKVLayout
    limits: StepLimits
    num_sequences: int = 1
    tokenizer_bytes: int = 0  # size of tokenizer.json
    layer_file_bytes: int = 0  # the largest layer as the checkpoint has it


def plan_memory(
    model: PlanInput, budget: int | None = None, *, num_slots: int = 2, max_resident: int | None = None
) -> MemoryPlan:
    """Layers stay in memory from the first on; those that the budget has no room for are streamed, through
    ``num_slots`` slots. ``max_resident`` keeps no more than so many, whatever the budget. The plan may not fit: ask
    ``fits``."""
    num_layers = len(model.layers)
    most = num_layers if max_resident is None else min(max_resident, num_layers)
    for resident in range(most, 0, -1):
        plan = _plan(model, budget, resident, num_slots)
        if plan.fits:
            return plan
    return _plan(model, budget, 0, num_slots)


def _plan(model: PlanInput, budget: int | None, num_resident: int, num_slots: int) -> MemoryPlan:
    device, limits = model.target.kind, model.limits
    layer_bytes = [layer.num_bytes for layer in model.layers]
    num_streamed = len(layer_bytes) - num_resident
    slots = min(num_slots, num_streamed)
    slot = max(layer_bytes[num_resident:], default=0)
    num_pages = model.num_sequences * -(-limits.max_context // PAGE_SIZE)
    resident_bytes = sum(layer_bytes[:num_resident])
    steps, scratch = step_bytes(limits), scratch_bytes(limits, model.target)
    lines = [
        PlanLine("embedding", device, model.embed.num_bytes, True),
        PlanLine("resident layers", device, resident_bytes, True, f"{num_resident} of {len(layer_bytes)}"),
        PlanLine("stream slots", device, slots * slot, True, f"{slots} for {num_streamed} layers" if slots else ""),
        PlanLine("head and final norm", device, model.head.num_bytes, True),
        PlanLine(
            "KV cache", device, model.kv_layout.slab_bytes(num_pages), True,
            f"{model.kv_layout.kind}, {num_pages * PAGE_SIZE} tokens",
        ),
        PlanLine("residual stream", device, steps["residual"], True, f"window of {limits.window_rows} rows"),
        PlanLine("activations", device, steps["qkv"] + steps["attn"] + steps["mlp"], True, f"{limits.max_rows} rows"),
        PlanLine("logits", device, steps["logits"], True, f"{limits.max_logit_rows} rows"),
        PlanLine("scratch of operations", device, sum(scratch.values()), True),
    ]  # fmt: skip
    temporaries = torch_temporaries(model)
    lines.append(PlanLine("temporaries", device, temporaries, False, "torch's own, while an operation runs"))
    if model.tokenizer_bytes:
        lines.append(PlanLine("tokenizer", device, _TOKENIZER_FACTOR * model.tokenizer_bytes, False))
    # While loading, the file's bytes of two layers and what is unpacked of one are there, and the buffers of a step
    # are not touched yet: only what exceeds them adds to the peak.
    idle = sum(line.num_bytes for line in lines if line.purpose not in _LOADED_FIRST)
    loading = loading_bytes(model)
    if loading > idle:
        lines.append(PlanLine("loading", device, loading - idle, False, "two layers as the file has them"))
    placement = Placement(
        tuple((Tier.DEVICE if i < num_resident else Tier.DISK, device) for i in range(len(layer_bytes)))
    )
    budgets = {} if budget is None else {device: budget}
    return MemoryPlan(tuple(lines), placement, limits.max_context, num_pages, slots, budgets)


_LOADED_FIRST = ("embedding", "resident layers", "stream slots", "head and final norm")
_TOKENIZER_FACTOR = 8
_UNPACKED_BYTES = 8  # of one code while it is unpacked, sorted, fused and packed
_LIBRARY_BYTES = 12 << 20  # what MKL keeps for f32 products of any size: 4 to 13 MB were seen


def loading_bytes(model: PlanInput) -> int:
    """Host memory while layers are packed, besides what stays."""
    return 2 * model.layer_file_bytes + PACK_COLUMNS * _max_k(model.limits) * _UNPACKED_BYTES


def _max_k(limits: StepLimits) -> int:
    return max(limits.hidden_size, limits.attn_width, limits.intermediate_size)


def torch_temporaries(model: PlanInput) -> int:
    """The largest sum of temporaries that are alive at once on the CPU, over the operations of a step."""
    config, limits, kv = model.config, model.limits, model.kv_layout
    T, context, D = limits.max_rows, limits.max_context, config.head_dim
    block = min(128, T)
    group = config.num_heads // config.num_kv_heads
    element = 4 if kv.quantized else DTYPE_BYTES[kv.kind]
    # One norm's output, and what torch.nn.functional computes it from.
    norm = T * limits.hidden_size * 4
    # A chunk's q, k and v turned and converted; cos and sin.
    rotate = T * limits.qkv_width * 4 + T * D * 4
    # A block of rows: scores' mask (distances i64, hidden u8, mask), its copies for the query group, q and the result.
    mask = block * context * (8 + 1 + element) + block * group * context * element
    rows = 4 * block * limits.attn_width * element
    # K and V of the whole context, dequantized; or gathered, where pages are no neighbours.
    run = context * config.kv_width * (2 * element + (element if kv.quantized else 0))
    attend = rotate + mask + rows + run
    gate = T * limits.intermediate_size * 4 + norm
    decode = 32 * 2 * (2 * limits.intermediate_size + limits.hidden_size)
    return align_up(_LIBRARY_BYTES + max(attend, gate, norm + decode), BLOB_ALIGN)
