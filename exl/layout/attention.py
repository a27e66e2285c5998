"""How decode attention cuts its work, and what its blocks hand over: from shapes alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.batch import MAX_STEP_TOKENS

COLUMNS = 8  # of one tensor-core product: heads of a group times new tokens
MAX_NEW_TOKENS = MAX_STEP_TOKENS  # per sequence
_SHORT, _SHORT_END, _LONG = 256, 4096, 1024  # tokens of an item up to token 4096, and of one after it


def num_items(length: int) -> int:
    """Items of a context: 256 tokens each up to 4096, then 1024."""
    if length <= _SHORT_END:
        return -(-length // _SHORT)
    return _SHORT_END // _SHORT + -(-(length - _SHORT_END) // _LONG)


def items_of(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """``num_items`` of each length: of the two ways to count, the one that is right counts fewer."""
    fewer = _SHORT_END // _SHORT - _SHORT_END // _LONG
    return np.minimum((lengths + (_SHORT - 1)) // _SHORT, (lengths + (_LONG - 1)) // _LONG + fewer)


def most_items(num_sequences: int, num_tokens: int, max_context: int) -> int:
    """Upper bound of the items of ``num_sequences`` contexts of up to ``max_context`` tokens, ``num_tokens`` in all.

    It is reached with as many tokens as possible in the short items, and an item that is not full in each context.
    """
    short = min(num_tokens, num_sequences * min(max_context, _SHORT_END))
    full = (short * (_LONG // _SHORT) + num_tokens - short) // _LONG
    return min(num_sequences * num_items(max_context), num_sequences + full)


def scratch_shapes(
    num_sequences: int, most: int, num_heads: int, num_kv_heads: int, head_dim: int, max_new: int = 1
) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``attention_decode.DecodeScratch``; ``most``: items of all
    sequences together."""
    tiles = num_kv_heads * column_tiles(num_heads, num_kv_heads, max_new)
    return {
        "partial": ("f32", most * tiles * COLUMNS * (head_dim + 2)),
        "arrived": ("i32", num_sequences * tiles),
    }


def column_tiles(num_heads: int, num_kv_heads: int, max_new: int) -> int:
    """Tiles of 8 columns; columns are heads of a group times new tokens."""
    return -(-num_heads // num_kv_heads * max_new // COLUMNS)
