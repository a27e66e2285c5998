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
_LEAST = float(np.finfo(np.float32).smallest_subnormal)
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
    "typical_p": (0.0, 1.0, "0 to 1"),
    "dynamic_range": (0.0, 100.0, "0 to 100"),
    "temperature_last": (0, 1, "False or True"),
}
_COLUMNS = {name: i for i, name in enumerate(_RANGES)}
_LOWEST = np.array([[low] for low, _, _ in _RANGES.values()], np.float64)
_HIGHEST = np.array([[high] for _, high, _ in _RANGES.values()], np.float64)
# What only the host can do, with the values at which it is off; after the last column of what a launch can do.
_ON_HOST = slice(_COLUMNS["typical_p"], None)
_OFF = np.array([[1.0], [0.0], [0.0]])


@dataclass(frozen=True)
class CheckedBatch:
    """A batch that a launch may believe."""

    batch: SamplingBatch
    numbers: NDArray[np.float64]  # [columns, R]: those of ``_RANGES``

    def column(self, name: str) -> NDArray[np.float64]:
        return self.numbers[_COLUMNS[name]]


@dataclass(frozen=True)
class LaunchRows:
    """The rows of one launch, n in all: draws, and rows of logits that are measured for log-probabilities."""

    draws: NDArray[np.int64]  # [n]; of the batch
    measured: NDArray[np.bool_]  # [n]; whether the draw's row of logits is measured, not drawn from


def launch_rows(checked: CheckedBatch, on_host: NDArray[np.bool_], num_rows: int) -> list[LaunchRows]:
    """All draws but those on the host, then a measured row for each of them that asks for log-probabilities, in as few
    launches of ``num_rows`` rows as they take."""
    drawn, asked = np.flatnonzero(~on_host), np.flatnonzero(~on_host & (checked.column("num_logprobs") >= 0.0))
    draws = np.concatenate([drawn, asked])
    measured = np.arange(len(draws)) >= len(drawn)
    starts = range(0, len(draws), num_rows)
    return [LaunchRows(draws[i : i + num_rows], measured[i : i + num_rows]) for i in starts]


def host_rows(checked: CheckedBatch) -> NDArray[np.bool_]:
    """[R]: which draws no launch can do. Typical sampling keeps no interval of the falling order; dynamic temperature
    needs the entropy before the first weight; a temperature after the filters has two sets of weights. A launch ranks
    20 tokens, and takes 4,096 adjustments of a draw."""
    many = np.diff(checked.batch.adjust_start) > MAX_ADJUSTMENTS
    found = many | (checked.column("num_logprobs") > MAX_RANKED)
    if not (checked.numbers[_ON_HOST] != _OFF).any():
        return found
    temperature = checked.column("temperature")
    typical = (checked.column("typical_p") < 1.0) & (checked.column("mirostat_mu") == math.inf)
    later = (checked.column("temperature_last") != 0.0) & (temperature != 1.0)
    return found | (temperature > 0.0) & (typical | later | (checked.column("dynamic_range") > 0.0))


def check_batch(batch: SamplingBatch, num_logits: int, vocab_size: int) -> CheckedBatch:
    """Raises ``KernelError`` that names the first draw and value that is wrong: the device believes them.
    ``num_logits``: rows of logits."""
    count = len(batch.row)
    for name in (*_RANGES, "row", "mask_idx"):
        if (shape := getattr(batch, name).shape) != (count,):
            raise KernelError(f"sample: {name} has shape {shape}: expected ({count},)")
    numbers = np.array([getattr(batch, name) for name in _RANGES], np.float64)
    right = (numbers >= _LOWEST) & (numbers <= _HIGHEST)
    if not right.all():
        at, i = np.argwhere(~right)[0].tolist()
        name = list(_RANGES)[at]
        raise KernelError(f"sample: draw {i}: {name} is {numbers[at, i]}: expected {_RANGES[name][2]}")
    if count and not 0 <= batch.row.min() <= batch.row.max() < num_logits:
        raise KernelError(f"sample: draws from rows {batch.row.tolist()}: expected 0 to {num_logits - 1}")
    _check_masks(batch, vocab_size)
    _check_adjustments(batch, count, vocab_size)
    return CheckedBatch(batch, numbers)


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


def pack_tables(checked: CheckedBatch, rows: LaunchRows, num_rows: int, vocab_size: int, out: NDArray[np.uint8]) -> int:
    """Writes a launch into ``out``, u8 [table_bytes(num_rows, vocab_size)], and returns how many of its bytes, from the
    beginning, are to be copied. What a launch does not read is left out."""
    batch, draws, measured, count = checked.batch, rows.draws, rows.measured, len(rows.draws)
    if not 1 <= count <= num_rows:
        raise KernelError(f"sample: a launch of {count} rows: expected 1 to {num_rows}")
    params = out[: count * ROW.itemsize].view(ROW)
    params[:] = _params(checked, draws)
    masks = batch.mask_idx[draws]
    if measured.any():
        params[measured] = _measured(params[measured], batch.num_logprobs[draws[measured]])
        draws, masks = np.where(measured, -1, draws), np.where(measured, -1, masks)
    at = params_bytes(num_rows)
    at += _pack_adjustments(batch, draws, params, out[at:])
    return at + _pack_masks(batch, masks, params, out, at)


def _params(checked: CheckedBatch, draws: NDArray[np.int64]) -> NDArray[np.void]:
    """Rows of ``ROW`` without adjustments and masks, for draws."""
    numbers = dict(zip(_COLUMNS, checked.numbers[:, draws], strict=True))
    temperature, mu = numbers["temperature"], numbers["mirostat_mu"]
    mirostat = mu < math.inf
    if mirostat.any():  # in the place of these
        for name, off in (("top_k", 0.0), ("top_p", 1.0), ("min_p", 0.0)):
            numbers[name] = np.where(mirostat, off, numbers[name])
    params = np.zeros(len(draws), ROW)
    params["uniform"] = numbers["uniform"] * 2.0**64
    on = np.array([numbers["top_p"] < 1.0, mirostat, numbers["xtc_threshold"] <= 0.5])
    if on.any():
        values = np.array([numbers["top_p"], np.exp2(-np.maximum(mu, 0.0)), numbers["xtc_threshold"]])
        shares = np.maximum(np.ceil(np.minimum(values, _BELOW_ONE) * 2.0**64), 1.0)
        params["top_p"], params["mirostat"], params["xtc"] = np.where(on, shares, 0.0)
    params["log_min_p"] = _logarithms(numbers["min_p"])
    params["sigmas"], params["temperature"], params["top_k"] = numbers["top_n_sigma"], temperature, numbers["top_k"]
    # Where the scale is no f32, what is not equal to the largest logit weighs nothing anyway.
    scale = np.minimum(_LOG2_E / np.maximum(temperature, _LEAST), _MOST_F32)
    params["scale_hi"] = scale
    params["scale_lo"] = scale - params["scale_hi"]
    params["row"], params["sample"], params["mask"] = checked.batch.row[draws], draws, -1
    return params


def _measured(params: NDArray[np.void], num_ranked: NDArray[np.int32]) -> NDArray[np.void]:
    """The rows that measure what these draw from: temperature 1, no filters."""
    found = np.zeros(len(params), ROW)
    found["row"], found["sample"], found["mask"], found["num_ranked"] = params["row"], -1, -1, num_ranked
    found["log_min_p"] = -np.inf
    found["temperature"], found["scale_hi"] = 1.0, _LOG2_E
    found["scale_lo"] = _LOG2_E - found["scale_hi"].astype(np.float64)
    return found


def _logarithms(values: NDArray[np.float64]) -> NDArray[np.float64] | float:
    """Natural, with the same bits on every machine; -inf for 0."""
    if not values.any():
        return -math.inf
    return np.array([natural_log(value) for value in values.tolist()])  # remembered: requests share few values


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
    if not (masks >= 0).any():
        return 0
    wanted = np.unique(masks[masks >= 0])
    words = batch.masks.shape[1]
    params["mask"] = np.where(masks >= 0, at // 4 + np.searchsorted(wanted, masks) * words, -1)
    num_bytes = 4 * len(wanted) * words
    out[at : at + num_bytes].view("<u4").reshape(len(wanted), words)[:] = batch.masks[wanted]
    return num_bytes
