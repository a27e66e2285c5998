"""The memory plan, made before anything is allocated: a pure function of shapes, options and budgets.

A line is *exact* (a buffer that is allocated once, with exactly this size) or a *bound* (temporary buffers of
libraries).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from exl.adapters.manifest import AdapterLayout
from exl.batch import PAGE_SIZE
from exl.families.config import ModelConfig
from exl.layout.cpu_steps import CompiledSizes, compiled_sizes
from exl.layout.kv import DeviceKVLayout, KVLayout
from exl.layout.layers import ExpertLayout, LayerLayout
from exl.layout.specs import Target
from exl.layout.steps import StepLimits
from exl.layout.window import WindowGroup, mixed_layers, num_group_pages
from exl.planning.html import plan_html
from exl.planning.speed import Speeds, TokenBytes, speed_lines, tokens_json
from exl.planning.verdict import Note, verdict
from exl.units import format_bytes


class Tier(enum.Enum):
    """Where weights live between two uses."""

    DEVICE = "resident"
    PINNED = "pinned"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """``layers[i]``: the tier of layer i, and the device that computes it. ``embed``: the tier of the embedding; pinned
    means that a GPU reads its rows over the bus, disk that the host reads them before each step."""

    layers: tuple[tuple[Tier, str], ...]
    embed: Tier = Tier.DEVICE

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
    """The memory that a model will take, line by line. ``budgets``: bytes by memory (a line's ``device``); a memory
    without a budget is not limited."""

    lines: tuple[PlanLine, ...]
    placement: Placement
    context: int  # tokens of one sequence
    num_pages: int
    num_buffers: int  # 0: nothing is streamed
    budgets: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    tokens: tuple[TokenBytes, ...] = ()  # what one token reads, at some depths of the cache
    speeds: Speeds = field(default_factory=Speeds)
    num_kept_pages: int = 0  # pages in pinned RAM that a GPU's cache has no room for
    null_page: bool = False  # one page more, which stands for those that no window reaches any more
    windows: WindowGroup | None = None  # pages of layers that have a window, where others have none

    @property
    def verdict(self) -> str:
        """``"22 of 32 layers in VRAM, 10 streamed from RAM; needs 5.93 of 6 GB of VRAM and 2.1 GB of RAM"``."""
        return verdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(note.text for note in self.notes if note.kind == "warning")

    @property
    def speed_lines(self) -> list[str]:
        """What one token reads, and the bound of the speed if the links' speeds are known."""
        return speed_lines(self.tokens, self.speeds)

    @property
    def layer_counts(self) -> dict[str, int]:
        """Layers by tier: resident, pinned, disk."""
        return {tier.value: len(self.placement.on_tier(tier)) for tier in Tier}

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
        """The sum of all budgets; None if any memory has none."""
        return sum(self.budgets.values()) if all(device in self.budgets for device in self.devices) else None

    def device_bytes(self, device: str) -> int:
        return sum(line.num_bytes for line in self.lines if line.device == device)

    @property
    def fits(self) -> bool:
        return all(self.device_bytes(device) <= budget for device, budget in self.budgets.items())

    def to_json(self) -> dict[str, object]:
        return {
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "notes": [vars(note) for note in self.notes],
            "tokens": tokens_json(self.tokens, self.speeds),
            "lines": [vars(line) for line in self.lines],
            "num_bytes": self.num_bytes,
            "exact_bytes": self.exact_bytes,
            "budget": self.budget,
            "budgets": dict(self.budgets),
            "fits": self.fits,
            "context": self.context,
            "cache_tokens": (self.num_pages - self.null_page) * PAGE_SIZE,
            "window_tokens": 0 if self.windows is None else (self.windows.num_pages - 1) * PAGE_SIZE,
            "embedding": self.placement.embed.value,
            "layers": self.layer_counts,
        }

    def summary(self) -> str:
        """The verdict, warnings, what a token reads and the bound of the speed, then other notes: a line each."""
        warnings = [f"warning: {text}" for text in self.warnings]
        others = [note.text for note in self.notes if note.kind != "warning"]
        return "\n".join([self.verdict, *warnings, *self.speed_lines, *others])

    def table(self) -> str:
        """The summary, then one row per line, bounds marked by <=; after each memory's lines, their sum and the
        budget."""
        return f"{self.summary()}\n\n{self._rows()}"

    def _rows(self) -> str:
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
        """The verdict; ``print`` shows the table."""
        return f"MemoryPlan({self.verdict}; {self.context} tokens)"

    def _repr_html_(self) -> str:
        """A bar per memory, divided in proportion, and a list of its parts."""
        return plan_html(self)


def _at_most(num_bytes: int, exact: bool) -> str:
    return ("" if exact else "<= ") + format_bytes(num_bytes)


_SEQUENCES_WITH_WINDOWS = 4  # for which layers that have a window have room at least


@dataclass(frozen=True)
class PlanInput:
    """The input of a plan besides the budget: a model's layouts and the limits of its steps."""

    config: ModelConfig
    embed: LayerLayout
    layers: Sequence[LayerLayout]
    head: LayerLayout
    experts: Sequence[ExpertLayout | None]  # by layer
    target: Target
    kv_layout: KVLayout | DeviceKVLayout
    limits: StepLimits
    num_kept_pages: int = 0  # in pinned RAM, beside a GPU's cache
    tokenizer_bytes: int = 0  # size of tokenizer.json
    layer_file_bytes: int = 0  # bytes in the checkpoint of the largest layer without its experts, or expert
    adapters: Sequence[AdapterLayout] = ()  # by their numbers
    arithmetic: str | None = None  # of the CPU's own kernels, a key of ``exl.layout.cpu_steps.ARITHMETIC``
    one_group: bool = False  # layers that have a window keep all tokens, as the others do

    @property
    def window(self) -> int | None:
        """Of all layers, if there is one in each and a sequence may get longer."""
        window = self.config.window
        return None if window is None or window >= self.limits.max_context else window

    @property
    def num_pages(self) -> int:
        """Pages of the cache, the last of which may hold more tokens than were asked for. With windows the null page
        is one of them."""
        return -(-self.limits.cache_tokens // PAGE_SIZE) + (self.window is not None)

    def window_group(self, streams: bool) -> WindowGroup | None:
        """The pages of layers that have a window, where others have none; None: all layers keep all tokens, as it takes
        no more memory. ``streams``: some layers are streamed, so that a prompt's rows go through a layer together.

        One sequence needs room for its window and for what it computes at once. There is room for as many as the cache
        has contexts, and for a few at least: short ones need as many pages here as in the other layers."""
        limits, windows = self.limits, self.config.windows
        layers = mixed_layers(windows, limits.max_context)
        if not layers or self.one_group or self.num_kept_pages:
            return None
        window = max(windows[i] for i in layers)
        contexts = -(-limits.cache_tokens // limits.max_context)
        sequences = max(contexts, min(limits.max_sequences, _SEQUENCES_WITH_WINDOWS))
        rows = limits.window_rows - limits.decode_rows if streams else limits.chunk_rows
        num_pages = num_group_pages(window, sequences, limits.chunk_rows, rows)
        return WindowGroup(window, layers, num_pages) if num_pages < self.num_pages else None

    def cache_slabs(self, layers: Iterable[int], windows: WindowGroup | None) -> tuple[int, int]:
        """Bytes of the cache of some layers: of those that keep all tokens, and of ``windows``."""
        inside = frozenset() if windows is None else windows.layers
        count = {True: 0, False: 0}
        for layer in layers:
            count[layer in inside] += 1
        few = 0 if windows is None else self.kv_layout.layer_bytes(windows.num_pages)
        return count[False] * self.kv_layout.layer_bytes(self.num_pages), count[True] * few

    @property
    def compiled_sizes(self) -> CompiledSizes:
        """What the CPU's own kernels compute in."""
        head = self.head if self.head.linears else self.embed
        return compiled_sizes(self.layers, self.limits, self.arithmetic, head, self.experts)

    @property
    def expert_bytes(self) -> list[int]:
        """Of the experts of each layer."""
        return [0 if experts is None else experts.num_bytes for experts in self.experts]
