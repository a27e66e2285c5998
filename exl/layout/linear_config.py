"""Which variant of the linear kernels runs a shape: pure functions, apart from launching.

No configuration changes a bit of the result (``tests/kernels/test_linear.py``); they differ in speed alone. The rules
are arithmetic about bytes in flight, shared memory and blocks, not measurements: GPU timings are not measured yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from exl.errors import KernelError
from exl.layout.arch import arch_limits
from exl.layout.tiles import TileLayout

NUM_WARPS = 8
NUM_THREADS = 32 * NUM_WARPS
NUM_SLICES = 8
NARROW_TOKENS = 8  # that linear_q.cu takes
MAX_TOKENS = 64  # that one launch takes
MIN_ARCH = 75  # tensor cores with f16 inputs

# Depth of the weights' ring by (bits, row tiles per warp): BYTES_AHEAD or more in flight per block, (depth - 1) *
# 8 warps * row tiles * planes * 512, which covers the latency of an H100's memory (Little's law; an RTX 3090: 9 KB).
BYTES_AHEAD = 24 * 1024
RING_STAGES = {
    (2, 1): 4, (2, 2): 3, (2, 4): 2,
    (3, 1): 3, (3, 2): 2,
    (4, 1): 4, (4, 2): 3, (4, 4): 2,
    (8, 1): 3, (8, 2): 2,
}  # fmt: skip
SHARED_PER_MULTIPROCESSOR = {
    75: 64,
    80: 164,
    86: 100,
    87: 164,
    89: 100,
    90: 228,
    100: 228,
    103: 228,
    120: 100,
    121: 100,
}
BLOCK_RESERVE = 1024  # of a multiprocessor's shared memory, that the driver takes per block


@dataclass(frozen=True)
class LinearConfig:
    """One way to run one launch of up to 64 tokens."""

    wide: bool  # linear_q_wide.cu: rows split over warps; else linear_q.cu: slices of K split over warps
    row_tiles: int  # per warp
    ring_stages: int
    x_stages: int  # stages whose activations are in shared memory at a time
    x_buffers: int = 1
    token_tiles: int = 1  # wide: of 8 tokens
    spread: int = 1  # wide: blocks that share K
    min_blocks: int = 2  # per multiprocessor, that registers must allow

    def macros(self, layout: TileLayout) -> dict[str, int]:
        macros = layout.macros
        macros |= {"EXL_R": self.row_tiles, "EXL_STAGES": self.ring_stages, "EXL_MIN_BLOCKS": self.min_blocks}
        if self.wide:
            macros |= {"EXL_NT": self.token_tiles, "EXL_SPREAD": self.spread, "EXL_BUFFERS": self.x_buffers}
        return macros

    def grid(self, layout: TileLayout) -> tuple[int, int]:
        blocks = self.row_blocks(layout)
        return (self.spread, blocks) if self.wide else (blocks, 1)

    def row_blocks(self, layout: TileLayout) -> int:
        """Blocks that share no rows."""
        return -(-layout.num_tiles // (self.row_tiles * (NUM_WARPS if self.wide else 1)))

    def shared_bytes(self, layout: TileLayout, num_tokens: int, arch: int) -> int:
        ring = ring_bytes(layout, self.row_tiles, self.ring_stages, arch)
        stage = layout.stage_inputs * 2
        if self.wide:
            return ring + self.x_buffers * self.x_stages * 8 * self.token_tiles * stage
        return max(ring + NUM_WARPS * num_tokens * self.x_stages * stage, self.row_tiles * NUM_SLICES * 512)

    def partial_bytes(self, layout: TileLayout) -> int:
        """Bytes of f32 sums that blocks hand over; 0 if each block has all of K."""
        if self.spread == 1:
            return 0
        return self.spread * self.row_blocks(layout) * NUM_THREADS * self.row_tiles * self.token_tiles * 16


def ring_bytes(layout: TileLayout, row_tiles: int, ring_stages: int, arch: int) -> int:
    """Shared memory of the weights' rings; below sm_80 weights wait in registers."""
    qparams = -(-row_tiles * layout.stage_qparam_bytes // 16) * 16
    return NUM_WARPS * ring_stages * (row_tiles * layout.planes * 512 + qparams) if arch >= 80 else 0


def ring_bytes_ahead(layout: TileLayout, row_tiles: int, ring_stages: int) -> int:
    """Bytes of codes, scales and zero points that a block of ``linear_q`` keeps in flight."""
    return NUM_WARPS * (ring_stages - 1) * row_tiles * (layout.planes * 512 + layout.stage_qparam_bytes)


def slice_stages(layout: TileLayout) -> int:
    """Stages of the longest slice."""
    return -(-layout.num_stages // NUM_SLICES)


def shared_per_multiprocessor(arch: int) -> int:
    known = [a for a in SHARED_PER_MULTIPROCESSOR if a <= arch]
    return 1024 * SHARED_PER_MULTIPROCESSOR[max(known)]


def choose_config(layout: TileLayout, num_tokens: int, arch: int, num_multiprocessors: int) -> LinearConfig:
    """The configuration for 1 to 64 tokens. Raises ``KernelError`` for other counts and GPUs without tensor cores."""
    if arch < MIN_ARCH:
        raise KernelError(f"linear_q needs compute capability 7.5 or higher, found {arch / 10}")
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise KernelError(f"{num_tokens} tokens: a launch takes 1 to {MAX_TOKENS}")
    if num_tokens <= NARROW_TOKENS:
        return _narrow(layout, num_tokens, arch, num_multiprocessors)
    return _wide(layout, num_tokens, arch, num_multiprocessors)


def _narrow(layout: TileLayout, num_tokens: int, arch: int, num_multiprocessors: int) -> LinearConfig:
    """Up to 16, 32, 64 rows per block for up to 2, 4, 8 tokens, as long as there are enough blocks to fill the GPU
    twice. Rows of a block share the staging of activations."""
    most = 1 if num_tokens <= 2 else 2 if num_tokens <= 4 else 4
    candidates = [r for r in (4, 2, 1) if r <= most and (layout.bits, r) in RING_STAGES]
    limit = arch_limits(arch).max_shared_bytes
    half = shared_per_multiprocessor(arch) // 2 - BLOCK_RESERVE
    for row_tiles in candidates:
        stages = RING_STAGES[layout.bits, row_tiles]
        if row_tiles > 1 and -(-layout.num_tiles // row_tiles) < 2 * num_multiprocessors:
            continue
        # Room for two blocks a multiprocessor first, which together need no deeper rings than one alone.
        tries = [(half, stages, row_tiles == 1)]
        if row_tiles == 1 and 2 * ring_bytes_ahead(layout, 1, stages - 1) >= BYTES_AHEAD:
            tries.append((half, stages - 1, True))
        tries += [(limit, depth, True) for depth in range(stages, 1, -1)]
        for budget, depth, in_parts in tries:
            config = _fit_narrow(layout, num_tokens, arch, row_tiles, depth, budget, in_parts)
            if config is not None:
                return config
    raise KernelError(f"linear_q does not fit sm_{arch}: {layout}, {num_tokens} tokens")


def _fit_narrow(
    layout: TileLayout, num_tokens: int, arch: int, row_tiles: int, depth: int, budget: int, in_parts: bool
) -> LinearConfig | None:
    """As many stages of activations at a time as fit: all of a slice, or ``in_parts`` a multiple of the ring's depth,
    so that each part starts at the ring's first slot."""
    whole = slice_stages(layout)
    parts = range((whole - 1) // depth * depth, 0, -depth) if in_parts else ()
    for x_stages in (whole, *parts):
        config = LinearConfig(False, row_tiles, depth, x_stages, min_blocks=2 if row_tiles == 1 else 1)
        if config.shared_bytes(layout, num_tokens, arch) <= budget:
            return config
    return None


def _wide(layout: TileLayout, num_tokens: int, arch: int, num_multiprocessors: int) -> LinearConfig:
    """128 rows per block; K spread over 8 blocks if rows alone do not fill the GPU. The more tokens, the fewer slices'
    sums a thread's registers can hold: ``least`` blocks share K.

    64 tokens: 256 rows per block if that nearly fills the GPU, as two row tiles share the reads of activations. A
    thread's registers then hold the sums of one slice: K is spread over 8 blocks."""
    token_tiles = 2 if num_tokens <= 16 else 4 if num_tokens <= 32 else 8
    blocks = -(-layout.num_tiles // NUM_WARPS)
    narrow_codes = layout.bits in (2, 3)
    roomy = not narrow_codes and layout.group_macro in (0, 128) and arch >= 80
    if token_tiles == 8 and roomy and layout.bits == 4 and 4 * (blocks // 2) * NUM_SLICES >= 3 * num_multiprocessors:
        return _fit_wide(layout, num_tokens, arch, 2, token_tiles, NUM_SLICES)
    least = {2: 1, 4: 2 if narrow_codes else 1, 8: 2 if roomy else NUM_SLICES}[token_tiles]
    spread = least if blocks * least >= num_multiprocessors else NUM_SLICES
    return _fit_wide(layout, num_tokens, arch, 1, token_tiles, spread)


def _fit_wide(
    layout: TileLayout, num_tokens: int, arch: int, row_tiles: int, token_tiles: int, spread: int
) -> LinearConfig:
    """As deep a ring as fits with a chunk of activations that is no shorter; two buffers for them if possible."""
    limit = arch_limits(arch).max_shared_bytes
    depth = RING_STAGES[layout.bits, row_tiles] if arch >= 80 else 2
    for ring in range(depth, 1, -1):
        for x_buffers in (2, 1) if row_tiles == 1 else (1,):
            for x_stages in range(4, 0, -1):
                config = LinearConfig(True, row_tiles, ring, x_stages, x_buffers, token_tiles, spread, min_blocks=1)
                long_enough = x_stages >= ring - 1 or (x_buffers == 1 and ring == 2)
                if long_enough and config.shared_bytes(layout, num_tokens, arch) <= limit:
                    return config
    raise KernelError(f"linear_q_wide does not fit sm_{arch}: {layout}, {num_tokens} tokens")


# By architecture, a multiprocessor and clock, from data sheets: bytes of memory; multiply-adds of f16 into f32 by mma;
# the same by what cuBLAS has (sm_90 and up: other instructions). RTX 2080 Ti, A100, 3090, 4090, H100, B200, 5090.
_RATES = {
    75: (5.9, 256, 256),
    80: (10.2, 1024, 1024),
    86: (6.7, 256, 256),
    89: (3.1, 256, 256),
    90: (13.9, 1024, 2048),
    100: (29.2, 1024, 4096),
    120: (4.4, 256, 256),
}
_KERNEL_SHARE, _CUBLAS_SHARE = 0.75, 0.9  # of those multiply-adds, at 64 tokens and at many: assumed, not measured
_PANEL_BYTES_A_WEIGHT = 0.53 + 2 + 2  # codes read, panel written and read


def crossover_tokens(arch: int, panel_in_l2: bool = False) -> int:
    """From how many tokens on ``linear_many`` is quicker than 64 at a time: a multiple of 64 from 256 to 1024.

    Per weight, a panel costs its bytes once; each token costs what the slower multiply-adds of ``linear_q_wide`` take
    more than cuBLAS's. ``panel_in_l2``: only the codes come from memory.
    """
    memory, by_mma, by_cublas = _RATES[max((a for a in _RATES if a <= arch), default=75)]
    num_bytes = 0.53 if panel_in_l2 else _PANEL_BYTES_A_WEIGHT
    saved = 1 / (_KERNEL_SHARE * by_mma) - 1 / (_CUBLAS_SHARE * by_cublas)
    return min(1024, max(256, 64 * round(num_bytes / memory / saved / 64)))


def scratch_shapes(layouts: Collection[TileLayout], arch: int, num_multiprocessors: int) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``linear.LinearScratch`` that serves all of ``layouts``; none below
    sm_75."""
    if arch < MIN_ARCH:
        return {"x": ("f16", 0), "x_scale": ("f32", 0), "partial": ("f32", 0), "arrived": ("i32", 0)}
    configs = [
        (layout, choose_config(layout, t, arch, num_multiprocessors)) for layout in layouts for t in (16, 32, 64)
    ]
    return {
        "x": ("f16", MAX_TOKENS * max(layout.K for layout in layouts)),
        "x_scale": ("f32", MAX_TOKENS * NUM_SLICES),
        "partial": ("f32", max(config.partial_bytes(layout) for layout, config in configs) // 4),
        "arrived": ("i32", max(config.row_blocks(layout) for layout, config in configs)),
    }


def reachable_configs(layout: TileLayout, num_tokens: int, arch: int) -> Iterator[LinearConfig]:
    """Every configuration that some number of multiprocessors leads to."""
    seen = set()
    for num_multiprocessors in range(1, 4 * layout.num_tiles + 2):
        config = choose_config(layout, num_tokens, arch, num_multiprocessors)
        if config not in seen:
            seen.add(config)
            yield config
