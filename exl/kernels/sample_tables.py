"""What a batch of draws asks of ``sample.cu``, as bytes for the device; and what no launch can do, found beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.batch import SamplingBatch
from exl.errors import KernelError
from exl.layout.samples import ADJUSTMENT, MAX_ADJUSTMENTS, MAX_RANKED, ROW, mask_words, params_bytes
from exl.logarithm import natural_log

_LOG2_E = math.log2(math.e)
_MOST_F32 = float(np.finfo(np.float32).max)
_BELOW_ONE = 1.0 - 2.0**-53  # as a share, more than any token has beside another one
# Columns, their least and largest values: as ``SamplingParams`` has them. The kernel's arithmetic is proven for these.
_RANGES = {
    "uniform": (0.0, _BELOW_ONE, "0 to 1, below 1"),
    "temperature": (0.0, 100.0, "0 to 100"),
    "top_n_sigma": (0.0, _MOST_F32, "a finite number, 0 or more"),
    "top_k": (0, 2**31 - 1, "0 or more"),
    "top_p": (0.0, 1.0, "0 to 1"),  # 0: a number too small for f32
    "min_p": (0.0, 1.0, "0 to 1"),
    "mirostat_mu": (-math.inf, math.inf, "a number"),
    "xtc_threshold": (0.0, math.inf, "0 or more"),
    "num_logprobs": (-1, 2**31 - 1, "-1 or more"),
}
_LOWEST = np.array([[low] for low, _, _ in _RANGES.values()], np.float64)
_HIGHEST = np.array([[high] for _, high, _ in _RANGES.values()], np.float64)


@dataclass(frozen=True)
class LaunchRows:
    """The rows of one launch, n in all: draws, and rows of logits that are measured for log-probabilities."""

    draws: NDArray[np.int64]  # [n]; of the batch
    measured: NDArray[np.bool_]  # [n]; whether the draw's row of logits is measured, not drawn from


def launch_rows(batch: SamplingBatch, on_host: NDArray[np.bool_], num_rows: int) -> list[LaunchRows]:
    """All draws but those on the host, then a measured row for each of them that asks for log-probabilities, in as few
    launches of ``num_rows`` rows as they take."""
    drawn, asked = np.nonzero(~on_host)[0], np.nonzero(~on_host & (batch.num_logprobs >= 0))[0]
    draws = np.concatenate([drawn, asked])
    measured = np.arange(len(draws)) >= len(drawn)
    starts = range(0, len(draws), num_rows)
    return [LaunchRows(draws[i : i + num_rows], measured[i : i + num_rows]) for i in starts]


def host_rows(batch: SamplingBatch) -> NDArray[np.bool_]:
    """[R]: which draws no launch can do. Typical sampling keeps no interval of the falling order; dynamic temperature
    needs the entropy before the first weight; a temperature after the filters has two sets of weights. A launch ranks
    20 tokens, and takes 4,096 adjustments of a draw."""
    typical = (batch.typical_p < 1.0) & np.isposinf(batch.mirostat_mu)
    later = batch.temperature_last & (batch.temperature != 1.0)
    drawn = (batch.temperature > 0.0) & (typical | later | (batch.dynamic_range > 0.0))
    many = np.diff(batch.adjust_start) > MAX_ADJUSTMENTS
    return drawn | many | (batch.num_logprobs > MAX_RANKED)


def check_batch(batch: SamplingBatch, num_logits: int, vocab_size: int) -> None:
    """Raises ``KernelError`` that names the first draw and value that is wrong: the device believes them.
    ``num_logits``: rows of logits."""
    count = len(batch.row)
    for name in (*_RANGES, "row", "mask_idx"):
        values = getattr(batch, name)
        if values.shape != (count,):
            raise KernelError(f"sample: {name} has shape {values.shape}: expected ({count},)")
    values = np.array([getattr(batch, name) for name in _RANGES], np.float64)
    wrong = ~((values >= _LOWEST) & (values <= _HIGHEST))
    if wrong.any():
        at, i = np.argwhere(wrong)[0].tolist()
        name = list(_RANGES)[at]
        raise KernelError(f"sample: draw {i}: {name} is {values[at, i]}: expected {_RANGES[name][2]}")
    if count and not 0 <= batch.row.min() <= batch.row.max() < num_logits:
        raise KernelError(f"sample: draws from rows {batch.row.tolist()}: expected 0 to {num_logits - 1}")
    _check_masks(batch, vocab_size)
    _check_adjustments(batch, count, vocab_size)


def _check_masks(batch: SamplingBatch, vocab_size: int) -> None:
    masks, words = batch.masks, mask_words(vocab_size)
    if len(masks) and (masks.ndim != 2 or masks.shape[1] != words or masks.dtype != np.uint32):
        raise KernelError(f"sample: masks are {masks.dtype} {masks.shape}: expected uint32 [masks, {words}]")
    if len(batch.mask_idx) and not -1 <= batch.mask_idx.min() <= batch.mask_idx.max() < len(masks):
        raise KernelError(f"sample: mask_idx is {batch.mask_idx.tolist()}: expected -1 to {len(masks) - 1}")


def _check_adjustments(batch: SamplingBatch, count: int, vocab_size: int) -> None:
    starts, ids = batch.adjust_start, batch.adjust_id
    rising = starts.shape == (count + 1,) and starts[0] >= 0 and (np.diff(starts) >= 0).all()
    if not rising or starts[-1] > len(ids):
        raise KernelError(
            f"sample: adjust_start is {starts.tolist()}: expected {count + 1} rising numbers up to {len(ids)}"
        )
    if starts[-1] == starts[0]:
        return
    span = slice(int(starts[0]), int(starts[-1]))
    of = np.repeat(np.arange(count), np.diff(starts))

    def check(wrong: NDArray[np.bool_], found: str) -> None:
        if wrong.any():
            raise KernelError(f"sample: draw {of[np.argmax(wrong)]}: found {found}")

    ids = ids[span]
    check((ids < 0) | (ids >= vocab_size), f"an adjusted token id outside 0 to {vocab_size - 1}")
    falls = np.zeros(len(ids), np.bool_)
    falls[1:] = (np.diff(ids) <= 0) & (of[1:] == of[:-1])
    check(falls, "adjusted token ids that do not rise")
    factor, subtract = batch.adjust_factor[span], batch.adjust_subtract[span]
    check(~np.isfinite(batch.adjust_bias[span]), "an adjust_bias that is not finite")
    check(~((factor > 0.0) & (factor <= _MOST_F32)), "an adjust_factor that is not a finite number above 0")
    check(~(subtract >= -_MOST_F32), "an adjust_subtract that is neither a finite number nor inf")


def pack_tables(batch: SamplingBatch, rows: LaunchRows, num_rows: int, vocab_size: int, out: NDArray[np.uint8]) -> int:
    """Writes a launch of a checked batch into ``out``, u8 [table_bytes(num_rows, vocab_size)], and returns how many of
    its bytes, from the beginning, are to be copied. What a launch does not read is left out."""
    draws, count = rows.draws, len(rows.draws)
    if not 1 <= count <= num_rows:
        raise KernelError(f"sample: a launch of {count} rows: expected 1 to {num_rows}")
    params = out[: count * ROW.itemsize].view(ROW)
    params[:] = _params(batch, draws)
    measured = rows.measured
    plain = params[measured]
    if len(plain):
        params[measured] = _measured(plain, batch.num_logprobs[draws[measured]])
    at = params_bytes(num_rows)
    at += _pack_adjustments(batch, np.where(measured, -1, draws), params, out[at:])
    return at + _pack_masks(batch, np.where(measured, -1, batch.mask_idx[draws]), params, out, at)


def _params(batch: SamplingBatch, draws: NDArray[np.int64]) -> NDArray[np.void]:
    """Rows of ``ROW`` without adjustments and masks, for draws."""
    temperature, mu = batch.temperature[draws].astype(np.float64), batch.mirostat_mu[draws]
    mirostat = mu < np.inf
    params = np.zeros(len(draws), ROW)
    params["uniform"] = (batch.uniform[draws] * 2.0**64).astype(np.uint64)
    params["top_p"] = _shares(batch.top_p[draws], ~mirostat & (batch.top_p[draws] < 1.0))
    if mirostat.any():
        params["mirostat"] = _shares(np.exp2(-np.maximum(mu, 0.0)), mirostat)
    params["xtc"] = _shares(batch.xtc_threshold[draws], batch.xtc_threshold[draws] <= 0.5)
    params["log_min_p"] = _logarithms(np.where(mirostat, 0.0, batch.min_p[draws]))
    params["sigmas"] = batch.top_n_sigma[draws]
    # Where the scale is no f32, what is not equal to the largest logit weighs nothing anyway.
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.minimum(_LOG2_E / temperature, _MOST_F32)
    params["temperature"], params["scale_hi"] = temperature, scale
    params["scale_lo"] = scale - params["scale_hi"]
    params["top_k"] = np.where(mirostat, 0, batch.top_k[draws])
    params["row"], params["sample"] = batch.row[draws], draws
    params["mask"] = -1
    return params


def _measured(params: NDArray[np.void], num_ranked: NDArray[np.int32]) -> NDArray[np.void]:
    """The rows that measure what these draw from: temperature 1, no filters."""
    found = np.zeros(len(params), ROW)
    found["row"], found["sample"], found["mask"], found["num_ranked"] = params["row"], -1, -1, num_ranked
    found["log_min_p"] = -np.inf
    found["temperature"], found["scale_hi"] = 1.0, _LOG2_E
    found["scale_lo"] = _LOG2_E - found["scale_hi"].astype(np.float64)
    return found


def _shares(values: NDArray[np.floating], on: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Times 2^64, rounded up to at least 1; 0 where ``on`` is false."""
    shares = np.minimum(np.where(on, values, 0.0).astype(np.float64), _BELOW_ONE) * 2.0**64
    return np.where(on, np.maximum(np.ceil(shares), 1.0), 0.0).astype(np.uint64)


def _logarithms(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural, with the same bits on every machine; -inf for 0. Requests share few values."""
    if not values.any():
        return np.full(len(values), -np.inf)
    distinct, places = np.unique(values, return_inverse=True)
    return np.array([natural_log(float(value)) for value in distinct], np.float64)[places]


def _pack_adjustments(
    batch: SamplingBatch, draws: NDArray[np.int64], params: NDArray[np.void], out: NDArray[np.uint8]
) -> int:
    """Adjustments of the launch's draws, one draw's after another's; -1: this row has none. Returns their bytes."""
    if len(batch.adjust_id) == 0:
        return 0
    starts, places = adjustments_of(batch, draws)
    params["adjust_start"], params["adjust_stop"] = starts[:-1], starts[1:]
    total = len(places)
    entries = out[: total * ADJUSTMENT.itemsize].view(ADJUSTMENT)
    entries["id"], entries["bias"] = batch.adjust_id[places], batch.adjust_bias[places]
    entries["factor"], entries["subtract"] = batch.adjust_factor[places], batch.adjust_subtract[places]
    return total * ADJUSTMENT.itemsize


def adjustments_of(batch: SamplingBatch, draws: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """``adjust_start`` [n + 1] for n draws of a batch, -1: one without adjustments; and the places of theirs in it."""
    first, lengths = batch.adjust_start[:-1][draws], np.diff(batch.adjust_start)[draws]
    lengths[draws < 0] = 0
    starts = np.zeros(len(draws) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts, np.arange(starts[-1]) + np.repeat(first - starts[:-1], lengths)


def _pack_masks(
    batch: SamplingBatch, masks: NDArray[np.int32], params: NDArray[np.void], out: NDArray[np.uint8], at: int
) -> int:
    """The masks that the launch's rows name, -1: none, each once, from byte ``at`` of the tables on. Returns their
    bytes."""
    wanted = np.unique(masks[masks >= 0])
    if not len(wanted):
        return 0
    words = batch.masks.shape[1]
    params["mask"] = np.where(masks >= 0, at // 4 + np.searchsorted(wanted, masks) * words, -1)
    num_bytes = 4 * len(wanted) * words
    out[at : at + num_bytes].view("<u4").reshape(len(wanted), words)[:] = batch.masks[wanted]
    return num_bytes
