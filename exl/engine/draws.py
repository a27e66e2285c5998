"""What a sequence's next draw asks for, and how the draws of a step become one batch. On the host alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exl.batch import SamplingBatch
from exl.sampling import uniform
from exl.sampling_params import SamplingParams

_entropy = random.SystemRandom()


class Adjustments(NamedTuple):
    """Changes of single logits: see ``SamplingBatch``. Ids are distinct and rising."""

    ids: NDArray[np.int32]
    bias: NDArray[np.float32]
    factor: NDArray[np.float32]
    subtract: NDArray[np.float32]


class DrawRow(NamedTuple):
    """One draw: the columns of ``SamplingBatch``, by name, with their values that are off."""

    row: int
    uniform: float = 0.0
    temperature: float = 0.0
    dynamic_range: float = 0.0
    dynamic_exponent: float = 1.0
    temperature_last: bool = False
    top_n_sigma: float = 0.0
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    mirostat_mu: float = float("inf")
    xtc_threshold: float = 1.0
    num_logprobs: int = -1
    adjustments: Adjustments | None = None
    mask: NDArray[np.uint32] | None = None  # [ceil(V / 32)]; None: every token is allowed


def draw_row(params: SamplingParams, step: int, seen: Collection[int] = ()) -> DrawRow:
    """The draw of step ``step`` after the tokens ``seen``, without any state."""
    greedy, factor = params.temperature == 0.0, params.repetition_penalty
    adjustments = None
    if factor != 1.0 and seen:
        ids = np.unique(np.asarray(list(seen), np.int32))
        zeros = np.zeros(len(ids), np.float32)
        adjustments = Adjustments(ids, zeros, np.full(len(ids), factor, np.float32), zeros)
    return DrawRow(
        row=0,
        uniform=0.0 if greedy else _entropy.random() if params.seed is None else uniform(params.seed, step),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        adjustments=adjustments,
    )


_SCALARS = np.dtype(
    [
        ("row", "<i4"),
        ("uniform", "<f8"),
        ("temperature", "<f4"),
        ("dynamic_range", "<f4"),
        ("dynamic_exponent", "<f4"),
        ("temperature_last", "?"),
        ("top_n_sigma", "<f4"),
        ("top_k", "<i4"),
        ("typical_p", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("mirostat_mu", "<f8"),
        ("xtc_threshold", "<f4"),
        ("num_logprobs", "<i4"),
    ],
    align=True,
)
_NUM_SCALARS = len(_SCALARS)
_NO_ADJUSTMENTS = Adjustments(np.empty(0, np.int32), *(np.empty(0, np.float32) for _ in range(3)))


def sampling_batch(rows: Sequence[DrawRow], vocab_size: int) -> SamplingBatch:
    """The draws of a step, as arrays; the columns of single numbers are views of one table."""
    table = np.array([draw[:_NUM_SCALARS] for draw in rows], dtype=_SCALARS)
    starts = np.zeros(len(rows) + 1, np.int32)
    mask_idx = np.full(len(rows), -1, np.int32)
    parts, masks = [], []
    for i, draw in enumerate(rows):
        if draw.adjustments is not None:
            parts.append(draw.adjustments)
            starts[i + 1] = len(draw.adjustments.ids)
        if draw.mask is not None:
            mask_idx[i] = len(masks)
            masks.append(draw.mask)
    if parts:
        starts = np.cumsum(starts, dtype=np.int32)
    joined = parts[0] if len(parts) == 1 else _joined(parts)
    return SamplingBatch(
        **{name: table[name] for name in _SCALARS.names},
        adjust_start=starts,
        adjust_id=joined.ids,
        adjust_bias=joined.bias,
        adjust_factor=joined.factor,
        adjust_subtract=joined.subtract,
        mask_idx=mask_idx,
        masks=np.stack(masks) if masks else np.empty((0, -(-vocab_size // 32)), np.uint32),
    )


def _joined(parts: Sequence[Adjustments]) -> Adjustments:
    return Adjustments(*map(np.concatenate, zip(*parts, strict=True))) if parts else _NO_ADJUSTMENTS
