"""Panels of a quantized matrix, dequantized for many tokens at a time: their sizes, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection

from exl.errors import KernelError
from exl.layout.tiles import ROWS, TileLayout

PANEL_BYTES = 64 << 20  # of one panel, at most: stays in the L2 of the GPUs that have one of this size


def panel_tiles(layout: TileLayout, max_bytes: int = PANEL_BYTES) -> int:
    """Tiles of the largest panel within ``max_bytes``. Raises ``KernelError`` if not even one fits."""
    tile_bytes = ROWS * layout.K * 2
    if not tile_bytes <= max_bytes <= PANEL_BYTES:
        raise KernelError(f"panel of {max_bytes} bytes: expected {tile_bytes} (one tile) to {PANEL_BYTES}")
    return min(layout.num_tiles, max_bytes // tile_bytes)


def panel_scratch_shapes(
    layouts: Collection[TileLayout], max_tokens: int, panel_bytes: int = PANEL_BYTES
) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``linear_many.PanelScratch`` that serves all of ``layouts``."""
    tiles = {layout: panel_tiles(layout, panel_bytes) for layout in layouts}
    return {
        "x": ("f16", max_tokens * max(layout.K for layout in layouts)),
        "panel": ("f16", max(count * ROWS * layout.K for layout, count in tiles.items())),
        "product": ("f32", max_tokens * ROWS * max(tiles.values())),
    }
