"""How decode attention cuts its work, and what its blocks hand over: from shapes alone."""

from __future__ import annotations

COLUMNS = 8  # of one tensor-core product: heads of a group times new tokens
MAX_NEW_TOKENS = 8  # per sequence


def num_items(length: int) -> int:
    """Items of a context: 256 tokens each up to 4096, then 1024."""
    return -(-length // 256) if length <= 4096 else 16 + -(-(length - 4096) // 1024)


def scratch_shapes(
    num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int, max_new: int = 1
) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``attention_decode.DecodeScratch``."""
    pairs = num_sequences * num_kv_heads * column_tiles(num_heads, num_kv_heads, max_new)
    return {
        "partial": ("f32", pairs * num_items(max_context) * COLUMNS * (head_dim + 2)),
        "arrived": ("i32", pairs),
    }


def column_tiles(num_heads: int, num_kv_heads: int, max_new: int) -> int:
    """Tiles of 8 columns; columns are heads of a group times new tokens."""
    return -(-num_heads // num_kv_heads * max_new // COLUMNS)
