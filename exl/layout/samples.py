"""Memory that sampling on a GPU takes (``sample.cu``), from shapes alone."""

from __future__ import annotations

import numpy as np

MAX_ROWS = 64  # per launch
PART = 4096  # vocabulary entries per block
NUM_BINS = 45 * 16
MAX_ADJUSTMENTS = 4096  # of a draw; one that has more is drawn on the host
MAX_RANKED = 20  # likeliest tokens that a measured row tells; more are found on the host

# ``Params`` of the kernel. Shares are times 2^64, rounded up; 0 turns their filter off.
ROW = np.dtype(
    [
        ("uniform", "<u8"),  # times 2^64
        ("top_p", "<u8"),
        ("mirostat", "<u8"),  # 2^-mu
        ("xtc", "<u8"),
        ("log_min_p", "<f8"),  # -inf: off
        ("sigmas", "<f8"),  # 0: off
        ("temperature", "<f4"),
        ("scale_hi", "<f4"),  # log2(e) / temperature, in two parts
        ("scale_lo", "<f4"),
        ("top_k", "<i4"),
        ("row", "<i4"),  # of the logits
        ("sample", "<i4"),  # where the token goes; -1: the row is measured
        ("num_ranked", "<i4"),
        ("adjust_start", "<i4"),
        ("adjust_stop", "<i4"),
        ("mask", "<i4"),  # its first word; -1: every token is allowed
    ]
)
ADJUSTMENT = np.dtype([("id", "<i4"), ("bias", "<f4"), ("factor", "<f4"), ("subtract", "<f4")])
# ``Result``: weights in units of 2^-44 of the likeliest token's.
RESULT = np.dtype(
    [
        ("weight", "<u8"),  # of the drawn token
        ("mass", "<u8"),  # of all that it was drawn from; a measured row: of all
        ("mass_before", "<u8"),  # before mirostat's cut
        ("logit", "<f4"),  # the drawn token's own; a measured row: the largest
        ("num_ranked", "<i4"),
    ]
)
RANKED = np.dtype([("id", "<i4"), ("logit", "<f4")])
_PART_WORDS = 5  # of 8 bytes: ``Part`` of the kernel


def params_bytes(num_rows: int) -> int:
    """Of the parameters at the beginning of the tables: adjustments and masks follow."""
    return -(-num_rows * ROW.itemsize // 16) * 16


def mask_words(vocab_size: int) -> int:
    """u32 of one mask."""
    return -(-vocab_size // 32)


def table_bytes(num_rows: int, vocab_size: int) -> int:
    """Of the buffer for ``num_rows`` rows, each with a mask and with as many adjustments as a row may have."""
    data = ADJUSTMENT.itemsize * min(MAX_ADJUSTMENTS, vocab_size) + 4 * mask_words(vocab_size)
    return -(-(params_bytes(num_rows) + num_rows * data) // 16) * 16


def found_bytes(max_draws: int, num_rows: int) -> tuple[int, int, int]:
    """Of the ids of that many draws, in launches of ``num_rows`` rows, and of their results and ranked tokens: what
    comes back to the host, when each draw has a measured row."""
    rows = -(-2 * max_draws // num_rows) * num_rows
    return 4 * max_draws, rows * RESULT.itemsize, rows * MAX_RANKED * RANKED.itemsize


def scratch_shapes(num_rows: int, vocab_size: int) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``SampleScratch``, for up to ``num_rows`` rows."""
    return {
        "parts": ("i64", num_rows * -(-vocab_size // PART) * _PART_WORDS),
        "words": ("i64", num_rows * mask_words(vocab_size)),
        "values": ("f32", num_rows * min(MAX_ADJUSTMENTS, vocab_size)),
        "bin_counts": ("i32", num_rows * NUM_BINS),
        "bin_weights": ("i64", num_rows * NUM_BINS),
        "arrived": ("i32", num_rows),
        "results": ("i64", num_rows * RESULT.itemsize // 8),
        "ranked": ("i64", num_rows * MAX_RANKED),
    }
