"""The memory plan of one or several GPUs and of the RAM: a pure function, like ``cpu.py``; no GPU is queried.

Layers are placed on the GPUs in order. Those that fit on no GPU are streamed to the last one: from pinned RAM, and
those beyond ``ram`` from the disk. Their part of the KV cache is on the last GPU too. An embedding that is not also the
head stays in pinned RAM, where the first GPU reads a step's rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exl.batch import PAGE_SIZE
from exl.layout.arena import ArenaLayout, arena_layout
from exl.layout.fields import BLOB_ALIGN, align_up
from exl.layout.window import WindowGroup
from exl.planning.cpu import loading_bytes, window_lines
from exl.planning.plan import MemoryPlan, Placement, PlanInput, PlanLine, Tier
from exl.units import format_bytes

HOST = "ram"  # the name of host memory's lines
# torch's caching allocator takes memory from the driver in segments of these sizes (its c10 source's kSmallBuffer,
# kLargeBuffer, kMinLargeAlloc, kRoundLarge): a slab is rounded as it will be.
_SMALL_ALLOCATION, _SMALL_SEGMENT = 1 << 20, 2 << 20
_LARGE_ALLOCATION, _MIDDLE_SEGMENT, _ROUND = 10 << 20, 20 << 20, 2 << 20
# Estimates, not yet measured on a GPU: the driver's context with torch's and our modules, and cuBLAS's workspace
# (documented for torch: 8 MiB + 128 KiB, 32 MiB on Hopper).
CONTEXT_BYTES = 500 << 20
_CUBLAS_BYTES, _CUBLAS_LARGE_BYTES = (8 << 20) + (128 << 10), 32 << 20
STARTED_LINES = (
    "cuBLAS workspace",
    "CUDA context, modules",
)  # taken before the first tensor and kept after the last
# Free memory that is not planned for: cuBLAS kernels that are loaded at first use, graphs, other programs. On Windows
# the desktop needs some, and too much does not fail: it is paged out, and everything becomes slow.
_MARGIN_BYTES, _WINDOWS_MARGIN_BYTES = 512 << 20, 1 << 30


def started_bytes(arch: int) -> int:
    """Of ``STARTED_LINES``."""
    return CONTEXT_BYTES + (_CUBLAS_LARGE_BYTES if arch in (90, 100) else _CUBLAS_BYTES)


def usable_bytes(free: int, arch: int, system: str = sys.platform) -> int:
    """The default budget of a GPU that has ``free`` bytes left after it was started; at least 1. ``system`` as
    ``sys.platform`` names it."""
    margin = _WINDOWS_MARGIN_BYTES if system == "win32" else _MARGIN_BYTES
    return max(1, free + started_bytes(arch) - margin)


def segment_bytes(num_bytes: int) -> int:
    """What torch's allocator reserves for one slab of ``num_bytes`` on an empty GPU."""
    if num_bytes == 0:
        return 0
    if num_bytes <= _SMALL_ALLOCATION:
        return _SMALL_SEGMENT
    return _MIDDLE_SEGMENT if num_bytes < _LARGE_ALLOCATION else align_up(num_bytes, _ROUND)


@dataclass(frozen=True)
class _Asked:
    """What is planned for."""

    model: PlanInput
    embed: Tier
    arena: ArenaLayout
    ram: int | None
    max_pinned: int | None

    @classmethod
    def of(cls, model: PlanInput, embed: Tier, ram: int | None, max_pinned: int | None) -> _Asked:
        rows_of = model.embed.linears["embed"][0] if embed is Tier.DISK else None
        arena = arena_layout(model.limits, model.target, (*model.layers, model.head), rows_of)
        return cls(model, embed, arena, ram, max_pinned)

    def excess(self, plan: MemoryPlan) -> int:
        """Bytes beyond budgets; for an embedding in pinned RAM, locked bytes beyond what may be locked, too. Without
        it the locked bytes are those that no plan can do without."""
        over = [plan.device_bytes(device) - budget for device, budget in plan.budgets.items()]
        if self.embed is Tier.PINNED and self.max_pinned is not None:
            locked = sum(line.num_bytes for line in plan.lines if line.device == HOST and line.exact)
            over.append(locked - self.max_pinned)
        return sum(max(0, num_bytes) for num_bytes in over)


@dataclass(frozen=True)
class _Share:
    """What one GPU holds."""

    name: str
    layers: range  # resident
    streamed: range  # computed here, through stream buffers
    is_first: bool
    is_last: bool


def plan_devices(
    model: PlanInput,
    vram: Sequence[int],
    ram: int | None = None,
    *,
    num_buffers: int = 2,
    max_resident: int | None = None,
    max_pinned: int | None = None,
    embed: str = "auto",
) -> MemoryPlan:
    """``vram``: bytes of each GPU, in the order in which layers are given to them; no more GPUs are used than the
    layers need. ``ram``: bytes of host memory, pinned memory included; None: no limit. ``max_pinned``: bytes
    that the system lets be page-locked; layers beyond are on the disk. The i-th streamed layer has buffer i modulo
    ``num_buffers``. ``embed``: where the embedding is, see ``embed_tiers``; of several places the one with which the
    fewest layers are on the disk, then the one with which the fewest are streamed. The plan may not fit: check
    ``fits``."""
    best: tuple[tuple[int, int, int], MemoryPlan] | None = None
    for tier in embed_tiers(model, embed):
        asked = _Asked.of(model, tier, ram, max_pinned)
        plan = _most_resident(asked, vram, num_buffers, max_resident)
        order = asked.excess(plan), len(plan.placement.on_tier(Tier.DISK)), plan.placement.num_streamed
        if best is None and order[:2] == (0, 0):
            return plan  # the first place takes the least VRAM: no other keeps more layers
        if best is None or order < best[0]:
            best = order, plan
    return best[1]


def embed_tiers(model: PlanInput, embed: str) -> tuple[Tier, ...]:
    """Where the embedding may be, first choice first. One that is also the head stays on the GPU, which reads all of it
    for every token."""
    if embed == "device" or not model.head.linears:
        return (Tier.DEVICE,)
    return (Tier.DISK,) if embed == "disk" else (Tier.PINNED, Tier.DEVICE, Tier.DISK)


def _most_resident(asked: _Asked, vram: Sequence[int], num_buffers: int, max_resident: int | None) -> MemoryPlan:
    """The plan that keeps the most layers on the GPUs."""
    num_layers = len(asked.model.layers)
    most = num_layers if max_resident is None else min(max_resident, num_layers)
    plan = None
    for num_resident in range(most, -1, -1):
        if num_resident and num_buffers > 1 and (num_layers - num_resident) % num_buffers == 1:
            continue  # the last layer of a step and the first of the next would have the same buffer: each step a stall
        for num_devices in range(1, len(vram) + 1):
            plan = _split_over(asked, vram[:num_devices], num_resident, num_buffers)
            if plan.fits:
                return plan
    return plan


def _split_over(asked: _Asked, vram: Sequence[int], num_resident: int, num_buffers: int) -> MemoryPlan:
    model = asked.model
    num_layers = len(model.layers)
    num_buffers = min(num_buffers, num_layers - num_resident)
    windows = model.window_group(num_resident < num_layers)
    shares = list(_shares(asked, vram, num_resident, num_buffers, windows))
    lines = [line for share in shares for line in _device_lines(asked, share, num_buffers, windows)]
    pinned, host_lines = _host_lines(asked, num_resident, num_buffers)
    placed = [(Tier.DEVICE, share.name) for share in shares for _ in share.layers]
    last = shares[-1].name
    placed += [(Tier.PINNED if i < pinned else Tier.DISK, last) for i in range(num_layers - num_resident)]
    budgets = {share.name: vram[i] for i, share in enumerate(shares)}
    if asked.ram is not None:
        budgets[HOST] = asked.ram
    return MemoryPlan(
        (*lines, *host_lines),
        Placement(tuple(placed), asked.embed),
        model.limits.max_context,
        model.num_pages,
        num_buffers,
        budgets,
        num_kept_pages=model.num_kept_pages,
        windows=windows,
    )


def _shares(
    asked: _Asked, vram: Sequence[int], num_resident: int, num_buffers: int, windows: WindowGroup | None
) -> Iterator[_Share]:
    """Each GPU takes as many layers as fit, the last one the rest."""
    num_layers, start = len(asked.model.layers), 0
    for i, budget in enumerate(vram):
        name, is_last = f"cuda:{i}", i == len(vram) - 1
        stop = num_resident if is_last else start
        while not is_last and stop < num_resident:
            larger = _Share(name, range(start, stop + 1), range(0), i == 0, False)
            if sum(line.num_bytes for line in _device_lines(asked, larger, num_buffers, windows)) > budget:
                break
            stop += 1
        streamed = range(num_resident, num_layers) if is_last else range(0)
        yield _Share(name, range(start, stop), streamed, i == 0, is_last)
        start = stop


def _device_lines(asked: _Asked, share: _Share, num_buffers: int, windows: WindowGroup | None) -> list[PlanLine]:
    model, arena, name = asked.model, asked.arena, share.name
    limits = model.limits
    resident = sum(model.layers[i].num_bytes for i in share.layers)
    embed = model.embed.num_bytes if share.is_first and asked.embed is Tier.DEVICE else 0
    head = model.head.num_bytes if share.is_last else 0
    if share.is_last and not share.is_first and not model.head.linears:
        head += model.embed.num_bytes  # the embedding is the head, too, and on another GPU
    buffer_bytes = num_buffers * max((model.layers[i].num_bytes for i in share.streamed), default=0)
    cached = (*share.layers, *share.streamed)
    cache, beside = model.cache_slabs(cached, windows)
    num_whole = len(cached) if windows is None else len(set(cached) - windows.layers)
    logits = arena.bytes_of("logits", "samples") if share.is_last else 0
    rows = arena.bytes_of("embedding rows") if share.is_first else 0
    residual, activations = arena.bytes_of("residual"), arena.bytes_of("qkv", "attn", "mlp")
    scratch = arena.num_bytes - arena.bytes_of("logits", "samples", "embedding rows") - residual - activations
    slab = residual + activations + logits + rows + scratch
    rounding = sum(segment_bytes(size) - size for size in (embed + resident + head, buffer_bytes, cache, beside, slab))
    lines = [
        PlanLine("embedding", name, embed, True),
        PlanLine("embedding rows", name, rows, True, f"of {limits.window_rows} tokens"),
        PlanLine("resident layers", name, resident, True, f"{len(share.layers)} of {len(model.layers)}"),
        PlanLine("stream buffers", name, buffer_bytes, True, f"{num_buffers} for {len(share.streamed)} layers"),
        PlanLine("head and final norm", name, head, True),
        PlanLine(
            "KV cache", name, cache, True,
            f"{model.kv_layout.kind}, {limits.cache_tokens} tokens, {num_whole} layers",
        ),
        *window_lines(model, windows, name, beside),
        PlanLine("residual stream", name, residual, True, f"window of {limits.window_rows} rows"),
        PlanLine("activations", name, activations, True, f"{limits.max_rows} rows"),
        PlanLine("logits and samples", name, logits, True, f"{limits.max_logit_rows} rows"),
        PlanLine("scratch of operations", name, scratch, True),
        PlanLine("rounding to segments", name, rounding, True, "torch's allocator"),
        PlanLine(STARTED_LINES[0], name, started_bytes(model.target.arch) - CONTEXT_BYTES, False),
        PlanLine(STARTED_LINES[1], name, CONTEXT_BYTES, False, "an estimate"),
    ]  # fmt: skip
    return [line for line in lines if line.num_bytes]


def _host_lines(asked: _Asked, num_resident: int, num_buffers: int) -> tuple[int, list[PlanLine]]:
    """How many of the streamed layers are pinned, counted from the first; and the lines of host memory."""
    model, arena, max_pinned = asked.model, asked.arena, asked.max_pinned
    sizes = [layer.num_bytes for layer in model.layers[num_resident:]]
    embed = model.embed.num_bytes
    pinned_embed = embed if asked.embed is Tier.PINNED else 0
    unpinned = [
        embed - pinned_embed,
        model.head.num_bytes,
        *(layer.num_bytes for layer in model.layers[:num_resident]),
    ]

    def lines(pinned: int) -> list[PlanLine]:
        on_disk = len(sizes) - pinned
        read_bytes = num_buffers * max(sizes[pinned:], default=0)  # pinned; what the disk is read into
        staging = max(*unpinned, *sizes[pinned:], 0)  # where blobs that do not stay in host memory are packed
        loading = align_up(loading_bytes(model) + staging, BLOB_ALIGN)
        limited = f", {format_bytes(max_pinned)} may be pinned" if pinned < most else ""
        found = [
            PlanLine("embedding", HOST, pinned_embed, True, "pinned, the GPU reads its rows"),
            PlanLine("embedding rows", HOST, arena.row_upload_bytes, True, "from the disk: a step waits for its ids"),
            PlanLine("pinned layers", HOST, sum(sizes[:pinned]), True, f"{pinned} of {len(model.layers)}{limited}"),
            PlanLine("pinned read buffers", HOST, read_bytes, True, f"for {on_disk} layers on the disk"),
            PlanLine(
                "kept pages", HOST, model.num_kept_pages * model.kv_layout.slab_bytes(1), True,
                f"pinned, {model.num_kept_pages * PAGE_SIZE} tokens that the cache has no room for",
            ),
            PlanLine("pinned tables", HOST, arena.upload_bytes, True, "of a step, twice"),
            # While loading; read buffers are not there yet.
            PlanLine(
                "loading", HOST, max(0, loading - read_bytes), False, "the file's bytes of layers ahead, one packed"
            ),
        ]  # fmt: skip
        return [line for line in found if line.num_bytes]

    def fits(pinned: int, limit: int | None, exact: bool) -> bool:
        found = lines(pinned)
        return limit is None or sum(line.num_bytes for line in found if line.exact or not exact) <= limit

    most = len(sizes)
    while most and not fits(most, asked.ram, exact=False):
        most -= 1
    pinned = most
    while pinned and not (fits(pinned, asked.ram, exact=False) and fits(pinned, max_pinned, exact=True)):
        pinned -= 1
    return pinned, lines(pinned)
