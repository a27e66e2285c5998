"""From logits to token ids: the CPU implementation of sampling.

A row's draw depends only on its logits, its parameters, its seed and its step, not on the other rows of its batch.

Of what is computed here, only exponentials and sums can have other bits on another processor, for torch chooses their
code and the order of sums by it. They are a ``SamplingMath``, so that a backend with kernels of its own can give the
same bits everywhere. Everything else is comparing, sorting, selecting, counting and searching, which round nothing, or
one multiplication, division or subtraction at a time, which IEEE 754 defines. ``topk`` orders equals as it likes, so
only the value of its last element is used; sorts are stable, by descending value and rising id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from exl.batch import INFINITE_LOGIT, NAN_LOGIT, NOTHING_ALLOWED, SampleRows, SamplingBatch
from exl.errors import ConfigError, ExlError, KernelError
from exl.logarithm import natural_log

if TYPE_CHECKING:
    import torch

_MAX_SEED = 2**64 - 1
# This many of the likeliest tokens are sorted first: nearly every draw is among them, and sorting 128,000 logits would
# take longer than all the rest of sampling.
_FIRST_SORTED = 1024
_SORT_GROWTH = 16


def uniform(seed: int, step: int) -> float:
    """One draw from [0, 1) for step ``step`` of a request: the same on every machine and in any order of calls.

    The first word of Philox4x64-10 with key (seed, 0) and counter (step, 0, 0, 0), its top 53 bits times 2^-53
    (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
    """
    if not 0 <= step <= _MAX_SEED or not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"uniform: found seed {seed} and step {step}, expected both from 0 to 2**64-1")
    # NumPy's generator increments the counter before it generates a block.
    word = np.random.Philox(key=seed, counter=(step - 1) % 2**256).random_raw()
    return (int(word) >> 11) * 2.0**-53


class SamplingMath(Protocol):
    """The functions of f64 [n] whose bits are the backend's."""

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """exp(x)."""

    def mass(self, x: torch.Tensor, cut: float) -> float:
        """The sum of exp over all elements that are at least ``cut``."""

    def cumulated(self, weights: torch.Tensor) -> torch.Tensor:
        """Element i: the sum of the elements 0 to i, added in this order."""


class TorchMath:
    """See ``SamplingMath``: torch's own, on any device."""

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    def mass(self, x: torch.Tensor, cut: float) -> float:
        return float((x if cut == -math.inf else x[x >= cut]).exp().sum())

    def cumulated(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.cumsum(0)


_TORCH_MATH = TorchMath()


def sample(logits: torch.Tensor, batch: SamplingBatch, functions: SamplingMath = _TORCH_MATH) -> SampleRows:
    """Draws R token ids from logits [L, V] f32.

    The kept tokens are ordered by descending probability, ties by lower id; the first one whose cumulative probability
    exceeds the draw's ``uniform`` is drawn. Temperature 0 takes the largest adjusted logit, ties by lower id.
    Probabilities are f64. A logit of -inf forbids its token. A row that has NaN or +inf, or in which every token is
    forbidden, gives a code in the place of an id. Raises ``KernelError`` for logits of another shape or type.
    """
    _check_logits(logits, batch)
    count = len(batch.row)
    ids = []
    for i in range(count):  # draw by draw, so that no bit of a row can depend on the others
        if batch.temperature[i] == 0.0 and batch.adjust_start[i] == batch.adjust_start[i + 1] and not logits.is_cuda:
            ids.append(_largest(logits[int(batch.row[i])].numpy()))
        else:
            row = _adjusted(logits, batch, i)
            ids.append(_code(float(row.max())) or int(_sample_row(row, batch, i, functions)))
    return SampleRows(ids, [math.nan] * count, [None] * count)


def _largest(row: NDArray[np.float32]) -> int:
    """The lowest id of the largest logit, or a code; without torch and its threads."""
    found = int(row.argmax())  # the first NaN, if there is any
    return _code(float(row[found])) or found


def _code(top: float) -> int:
    """0 for a row that has a distribution, by its largest logit, which is NaN if any is."""
    if math.isfinite(top):
        return 0
    return NAN_LOGIT if math.isnan(top) else INFINITE_LOGIT if top > 0 else NOTHING_ALLOWED


def probabilities(logits: torch.Tensor, batch: SamplingBatch, functions: SamplingMath = _TORCH_MATH) -> torch.Tensor:
    """The distribution that ``sample`` draws from: logits [L, V] f32 -> [R, V] f64.

    Raises ``ExlError`` for a row that has no distribution. A row with temperature 0 has all its mass on one token.
    """
    import torch

    _check_logits(logits, batch)
    out = torch.zeros(len(batch.row), logits.shape[1], dtype=torch.float64, device=logits.device)
    for i in range(len(batch.row)):
        row = _adjusted(logits, batch, i)
        code = _code(float(row.max()))
        if code:
            raise no_distribution(code)
        if batch.temperature[i] == 0.0:
            out[i, torch.argmax(row)] = 1.0
            continue
        kept = _Kept.of(row, batch, i, functions)
        ids, x, _ = _sorted_prefix(kept.x, len(row))
        weights = functions.weights(x)
        cumulated = functions.cumulated(weights)
        num_kept = kept.count(x, cumulated)
        out[i, ids[:num_kept]] = weights[:num_kept] / cumulated[num_kept - 1]
    return out


def likeliest(log_probs: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """(id, value) of the ``count`` largest of [V], descending, ties by lower id; fewer if the others are -inf."""
    if count == 0:
        return []
    ids, values, _ = _sorted_prefix(log_probs, count)
    return list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))


def _check_logits(logits: torch.Tensor, batch: SamplingBatch) -> None:
    import torch

    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise KernelError(
            f"sample: found logits of {logits.dtype} {list(logits.shape)}, expected torch.float32 [rows, vocabulary]"
        )
    if len(batch.row) and not 0 <= batch.row.min() <= batch.row.max() < len(logits):
        raise KernelError(f"sample: found draws from rows {batch.row.tolist()}, expected 0 to {len(logits) - 1}")


def _adjusted(logits: torch.Tensor, batch: SamplingBatch, i: int) -> torch.Tensor:
    """The logits of draw i after its adjustments: [V] f32. The repetition penalty is that of Keskar et al., "CTRL",
    2019, as transformers applies it."""
    import torch

    row = logits[int(batch.row[i])]
    span = slice(int(batch.adjust_start[i]), int(batch.adjust_start[i + 1]))
    if span.start == span.stop:
        return row
    ids = batch.adjust_id[span]
    if ids.min() < 0 or ids.max() >= len(row):
        raise KernelError(f"sample: draw {i}: found an adjusted token id outside 0 to {len(row) - 1}")
    where = torch.from_numpy(ids).to(device=row.device, dtype=torch.int64)
    bias, factor, subtract = (
        torch.from_numpy(values[span]).to(row.device)
        for values in (batch.adjust_bias, batch.adjust_factor, batch.adjust_subtract)
    )
    value = row[where] + bias
    return row.index_put((where,), torch.where(value < 0, value * factor, value / factor) - subtract)


_FOUND = {
    NAN_LOGIT: "a logit of nan",
    INFINITE_LOGIT: "a logit of inf",
    NOTHING_ALLOWED: "no allowed token (all logits are -inf)",
}


def no_distribution(code: int) -> ExlError:
    """The error that a code in the place of an id stands for."""
    return ExlError(f"sample: found {_FOUND[code]}, expected finite logits")


def _sample_row(row: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> torch.Tensor:
    import torch

    if batch.temperature[i] == 0.0:
        return torch.argmax(row)  # ties: the lowest id
    kept = _Kept.of(row, batch, i, functions)
    size, complete = _FIRST_SORTED, False
    while True:
        ids, x, complete = _sorted_prefix(kept.x, size)
        weights = functions.weights(x)
        cumulated = functions.cumulated(weights)
        num_kept = kept.count(x, cumulated)
        mass = float(cumulated[num_kept - 1]) if kept.mass is None else kept.mass
        target = float(batch.uniform[i]) * mass
        if complete or num_kept < len(ids) or (kept.mass is not None and float(cumulated[-1]) > target):
            break
        size *= _SORT_GROWTH
    # Rounding may put the target at the very end: then take the last kept token that has any weight.
    last = int((weights[:num_kept] > 0).sum()) - 1
    drawn = int(torch.searchsorted(cumulated[:num_kept], target, right=True))
    return ids[min(drawn, last)]


@dataclass(frozen=True)
class _Kept:
    """Which tokens of a row the filters keep: with any filters, the first n in descending order."""

    x: torch.Tensor  # [V] f64, logits / temperature, shifted so that the largest is 0; weights are exp(x)
    cut: float  # top-k and min-p keep x >= cut
    top_mass: float | None  # top-p keeps a token if the tokens before it weigh less than this; None: off
    mass: float | None  # weight of all kept tokens; None: top-p is on, and only sorting can tell

    @classmethod
    def of(cls, row: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> _Kept:
        x = row.double()
        x = (x - x.max()) / float(batch.temperature[i])
        top_k, top_p, min_p = int(batch.top_k[i]), float(batch.top_p[i]), float(batch.min_p[i])
        cut = float(x.topk(top_k).values[-1]) if 0 < top_k < len(x) else -math.inf
        # Top-p is a share of the mass that top-k keeps; min-p comes after top-p.
        top_mass = top_p * functions.mass(x, cut) if top_p < 1.0 else None
        if min_p > 0.0:
            cut = max(cut, natural_log(min_p))
        return cls(x, cut, top_mass, functions.mass(x, cut) if top_mass is None else None)

    def count(self, x: torch.Tensor, cumulated: torch.Tensor) -> int:
        """n, at least 1: the number of kept tokens among the sorted ``x``, with cumulative weights ``cumulated``."""
        import torch

        num_kept = len(x) if self.cut == -math.inf else int((x >= self.cut).sum())
        if self.top_mass is not None:
            num_kept = min(num_kept, 1 + int(torch.searchsorted(cumulated, self.top_mass)))
        return num_kept


def _sorted_prefix(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The ``size`` largest of x and all ties with the last of them, in descending order, ties by lower id.

    Returns (ids, values, whether they include all tokens that are not forbidden).
    """
    import torch

    bound = float(x.topk(size).values[-1]) if size < len(x) else -math.inf
    complete = bound == -math.inf
    ids = torch.nonzero(x > bound if complete else x >= bound).flatten()
    values, order = torch.sort(x[ids], descending=True, stable=True)
    return ids[order], values, complete
