"""From logits to token ids: the CPU implementation of sampling.

A draw depends only on its row of logits and its own values in the batch, not on the other draws.

Of what is computed here, only exponentials and sums can have other bits on another processor, for torch chooses their
code and the order of sums by it. They are a ``SamplingMath``, so that a backend with kernels of its own can give the
same bits everywhere. Everything else is comparing, sorting, selecting, counting and searching, which round nothing, or
one multiplication, division, addition or square root at a time, which IEEE 754 defines, or ``natural_log``. ``topk``
orders equals as it likes, so only the value of its last element is used; sorts are stable, by descending value and
rising id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from exl.batch import INFINITE_LOGIT, NAN_LOGIT, NOTHING_ALLOWED, SampleRows, SamplingBatch
from exl.errors import ConstraintError, ExlError, KernelError, NotFiniteError
from exl.logarithm import natural_log

if TYPE_CHECKING:
    import torch

# This many of the likeliest tokens are sorted first: nearly every draw is among them, and sorting 128,000 logits would
# take longer than all the rest of sampling.
_FIRST_SORTED = 1024
_SORT_GROWTH = 16
_LN2 = 0.6931471805599453
_LEAST_TEMPERATURE = 2.0**-1000  # a dynamic temperature of 0: whatever is not the likeliest weighs nothing
XTC_OFF = 0.5  # above it no two tokens can have this probability


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
    Probabilities are f64. A logit of -inf forbids its token, and a token that the mask forbids may have any logit. A
    row in which an allowed token has NaN or +inf, or no token is allowed, gives a code in the place of an id. Raises
    ``KernelError`` for logits of another shape or type, and for what the batch says of tokens that are not there.
    """
    import torch

    _check(logits, batch)
    if batch.takes_largest and not logits.is_cuda:
        return _largest(logits.numpy(), batch.rows)
    ids, surprise, ranked = [], [], []
    for i in range(len(batch.row)):  # draw by draw, so that no bit of a row can depend on the others
        row = _adjusted(logits, batch, i)
        greedy = batch.temperature[i] == 0.0
        found = int(row.argmax())  # the first NaN, if there is any
        code, bits = _code(float(row[found])), math.nan
        if not code and not greedy:
            found, bits = _drawn(torch.from_numpy(row), batch, i, functions)
        ids.append(code or found)
        surprise.append(bits)
        count = int(batch.num_logprobs[i])
        ranked.append(None if code or count < 0 else ranked_tokens(logits[int(batch.row[i])], found, count, functions))
    return SampleRows(ids, surprise, ranked)


def _largest(logits: NDArray[np.float32], rows: list[int]) -> SampleRows:
    ids = []
    for row in rows:
        values = logits[row]
        found = int(values.argmax())  # the lowest id of the largest; the first NaN, if there is any
        ids.append(_code(float(values[found])) or found)
    return SampleRows(ids, [math.nan] * len(ids), [None] * len(ids))


def probabilities(logits: torch.Tensor, batch: SamplingBatch, functions: SamplingMath = _TORCH_MATH) -> torch.Tensor:
    """The distribution that ``sample`` draws from: logits [L, V] f32 -> [R, V] f64.

    Raises ``ExlError`` for a row that has no distribution. A draw with temperature 0 has all its mass on one token.
    """
    import torch

    _check(logits, batch)
    out = torch.zeros(len(batch.row), logits.shape[1], dtype=torch.float64)
    for i in range(len(batch.row)):
        row = _adjusted(logits, batch, i)
        found = int(row.argmax())
        code = _code(float(row[found]))
        if code:
            raise no_distribution(code)
        if batch.temperature[i] == 0.0:
            out[i, found] = 1.0
            continue
        part = _candidates(torch.from_numpy(row), batch, i, functions).whole(functions)
        kept = slice(part.start, part.stop)
        out[i, part.ids[kept]] = part.weights[kept] / (float(part.cumulated[part.stop - 1]) - part.before)
    return out


def likeliest(log_probs: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """(id, value) of the ``count`` largest of [V], descending, ties by lower id; fewer if the others are -inf."""
    if count == 0:
        return []
    ids, values, _ = _sorted_prefix(log_probs, count)
    return list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))


_FOUND = {
    NAN_LOGIT: "a logit of nan",
    INFINITE_LOGIT: "a logit of inf",
    NOTHING_ALLOWED: "no allowed token (all logits are -inf)",
}


def no_distribution(code: int) -> ExlError:
    """The error that a code in the place of an id stands for."""
    kind = ConstraintError if code == NOTHING_ALLOWED else NotFiniteError
    return kind(f"sample: found {_FOUND[code]}, expected finite logits")


def _code(top: float) -> int:
    """0 for a row that has a distribution, by its largest logit, which is NaN if any is."""
    if math.isfinite(top):
        return 0
    return NAN_LOGIT if math.isnan(top) else INFINITE_LOGIT if top > 0 else NOTHING_ALLOWED


def _check(logits: torch.Tensor, batch: SamplingBatch) -> None:
    import torch

    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise KernelError(
            f"sample: found logits of {logits.dtype} {list(logits.shape)}, expected torch.float32 [rows, vocabulary]"
        )
    num_rows, vocab_size = logits.shape
    if not batch.rows:
        return
    if not 0 <= min(batch.rows) <= max(batch.rows) < num_rows:
        raise KernelError(f"sample: found draws from rows {batch.rows}, expected 0 to {num_rows - 1}")
    if batch.takes_largest:
        return
    ids = batch.adjust_id
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise KernelError(f"sample: found an adjusted token id outside 0 to {vocab_size - 1}")
    used = int(batch.mask_idx.max()) + 1
    if used and (used > len(batch.masks) or batch.masks.shape[1] != -(-vocab_size // 32)):
        raise KernelError(
            f"sample: found masks {list(batch.masks.shape)}, expected at least {used} of {-(-vocab_size // 32)} words"
        )


def ranked_tokens(
    row: torch.Tensor, drawn: int, count: int, functions: SamplingMath = _TORCH_MATH
) -> tuple[tuple[int, float], ...] | None:
    """(id, log-probability) of the drawn token and the likeliest ones, by the plain logits. None: they have no
    distribution, for a token that may not be drawn has a logit of NaN or inf."""
    x = row.cpu().double()
    top = float(x.max())
    if not math.isfinite(top):
        return None
    x = x - top
    log_probs = x - natural_log(functions.mass(x, -math.inf))
    return ((drawn, float(log_probs[drawn])), *likeliest(log_probs, count))


def _adjusted(logits: torch.Tensor, batch: SamplingBatch, i: int) -> NDArray[np.float32]:
    """The logits of draw i after mask and adjustments: [V]; a view of ``logits`` if there are none.

    The factor is the repetition penalty of Keskar et al., "CTRL: A Conditional Transformer Language Model for
    Controllable Generation", 2019, as transformers applies it: away from large logits, whatever their sign.
    """
    row: NDArray[np.float32] = logits[int(batch.row[i])].cpu().numpy()
    start, stop, mask_idx = int(batch.adjust_start[i]), int(batch.adjust_start[i + 1]), int(batch.mask_idx[i])
    if mask_idx >= 0:
        allowed = np.unpackbits(batch.masks[mask_idx].view(np.uint8), bitorder="little")[: len(row)]
        row = np.where(allowed, row, np.float32(-np.inf))
    if start == stop:
        return row
    ids, factor = batch.adjust_id[start:stop], batch.adjust_factor[start:stop]
    row = row.copy() if mask_idx < 0 else row
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is +inf and has its code
        value = row[ids] + batch.adjust_bias[start:stop]
        row[ids] = np.where(value < 0, value * factor, value / factor) - batch.adjust_subtract[start:stop]
    return row


def _drawn(row: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> tuple[int, float]:
    """The drawn id, and its surprise in bits where mirostat wants to know it (else NaN)."""
    candidates = _candidates(row, batch, i, functions)
    uniform, size = float(batch.uniform[i]), _FIRST_SORTED
    while True:
        part = candidates.first(size, functions)
        target = part.before + uniform * (part.mass - part.before)
        if part.is_whole or (part.is_settled and float(part.cumulated[-1]) > target):
            break
        size *= _SORT_GROWTH
    found = part.at(target)
    return found, candidates.surprise(found)


def _candidates(row: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> _Candidates:
    """What draw i may draw from its adjusted logits ``row``, [V] f32."""
    import torch

    x = row.double()
    x = x - x.max()
    sigmas = float(batch.top_n_sigma[i])
    if sigmas > 0.0:
        x = torch.where(x >= -sigmas * _deviation(x, functions), x, -math.inf)
    if not batch.temperature_last[i]:
        return _Candidates.of(x / _temperature(x, batch, i, functions), batch, i, functions)
    filtered = _Candidates.of(x, batch, i, functions)
    part = filtered.whole(functions)
    kept = part.ids[part.start : part.stop]
    y = torch.full_like(x, -math.inf)
    y[kept] = x[kept] - float(x[kept[0]])
    y = y / _temperature(y, batch, i, functions)
    return replace(filtered, x=y, cut=-math.inf, top_mass=None, mass=functions.mass(y, -math.inf), xtc_threshold=None)


def _sum(values: torch.Tensor, functions: SamplingMath) -> float:
    return float(functions.cumulated(values)[-1])


def _deviation(x: torch.Tensor, functions: SamplingMath) -> float:
    """The standard deviation of the allowed logits, over their number."""
    allowed = x[x > -math.inf]
    centred = allowed - _sum(allowed, functions) / len(allowed)
    return math.sqrt(_sum(centred * centred, functions) / len(allowed))


def _entropy(x: torch.Tensor, functions: SamplingMath) -> tuple[float, float]:
    """Of finite x [n], whose probabilities are exp(x) / Z: ln Z and the entropy in nats."""
    weights = functions.weights(x)
    mass = _sum(weights, functions)
    log_mass = natural_log(mass)
    return log_mass, log_mass - _sum(weights * x, functions) / mass


def _temperature(x: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> float:
    """Draw i's temperature for x [V]; with a dynamic one: low + (high - low) (H / ln n)^exponent, by the entropy H of
    the n tokens that are left (llama.cpp, pull request 4972)."""
    import torch

    temperature, reach = float(batch.temperature[i]), float(batch.dynamic_range[i])
    if reach == 0.0:
        return temperature
    left = x[x > -math.inf]
    if len(left) == 1:
        return temperature
    share = min(1.0, max(0.0, _entropy(left, functions)[1] / natural_log(len(left))))
    exponent = float(batch.dynamic_exponent[i])
    if exponent != 1.0:  # a power by the backend's exponential, for those of mathematical libraries differ
        power = exponent * natural_log(share) if exponent else 0.0
        share = float(functions.weights(torch.tensor([power], dtype=torch.float64))[0])
    low = max(0.0, temperature - reach)
    return max(_LEAST_TEMPERATURE, low + (temperature + reach - low) * share)


def _typical(x: torch.Tensor, cut: float, share: float, functions: SamplingMath) -> torch.Tensor:
    """x [V] with -inf for all but the tokens whose surprise is nearest to its expectation, the entropy, up to this
    share of the mass; equally near ones stay together (Meister et al., "Locally Typical Sampling", 2022, as its authors
    and transformers have it)."""
    import torch

    ids = torch.nonzero((x >= cut) & (x > -math.inf)).flatten()
    log_mass, entropy = _entropy(x[ids], functions)
    nearness = -((log_mass - x[ids]) - entropy).abs()
    target = share * functions.mass(x[ids], -math.inf)
    size = _FIRST_SORTED
    while True:
        order, values, complete = _sorted_prefix(nearness, size)
        cumulated = functions.cumulated(functions.weights(x[ids[order]]))
        if complete or float(cumulated[-1]) >= target:
            break
        size *= _SORT_GROWTH
    last = min(int(torch.searchsorted(cumulated, target)), len(values) - 1)
    kept = ids[nearness >= values[last]]
    out = torch.full_like(x, -math.inf)
    out[kept] = x[kept]
    return out


@dataclass(frozen=True)
class _Candidates:
    """Which tokens of a row the filters keep: of the tokens in descending order those from one place to another."""

    x: torch.Tensor  # [V] f64; weights are exp(x); -inf: removed
    cut: float  # top-k, min-p and mirostat keep x >= cut
    top_mass: float | None  # top-p keeps a token if the tokens before it weigh less than this; None: off
    mass: float | None  # weight of all those tokens; None: top-p is on, and only sorting can tell
    xtc_threshold: float | None  # None: off
    plain: torch.Tensor  # x as mirostat sees it
    log_mass: float  # ln of the weight of all tokens of ``plain``; NaN without mirostat

    @classmethod
    def of(cls, x: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath) -> _Candidates:
        """``x``: [V] f64, logits / temperature, shifted so that the largest is 0."""
        plain, top_mass, log_mass, mu = x, None, math.nan, float(batch.mirostat_mu[i])
        if mu < math.inf:
            # Basu et al., "Mirostat", 2020, version 2: surprises up to mu, and the likeliest token.
            log_mass = natural_log(functions.mass(x, -math.inf))
            cut = min(0.0, log_mass - mu * _LN2)
        else:
            x, cut, top_mass = cls._filtered(x, batch, i, functions)
        mass = functions.mass(x, cut) if top_mass is None else None
        threshold = float(batch.xtc_threshold[i])
        return cls(x, cut, top_mass, mass, threshold if threshold <= XTC_OFF else None, plain, log_mass)

    @staticmethod
    def _filtered(
        x: torch.Tensor, batch: SamplingBatch, i: int, functions: SamplingMath
    ) -> tuple[torch.Tensor, float, float | None]:
        """After top-k, typical, top-p and min-p: x, cut and top_mass."""
        top_k, top_p, min_p = int(batch.top_k[i]), float(batch.top_p[i]), float(batch.min_p[i])
        typical_p, top = float(batch.typical_p[i]), 0.0
        cut = float(x.topk(top_k).values[-1]) if 0 < top_k < len(x) else -math.inf
        if typical_p < 1.0:
            x, cut = _typical(x, cut, typical_p, functions), -math.inf
            top = float(x.max())
        # Top-p is a share of the mass that top-k and typical keep; min-p comes after top-p.
        top_mass = top_p * functions.mass(x, cut) if top_p < 1.0 else None
        if min_p > 0.0:
            cut = max(cut, top + natural_log(min_p))
        return x, cut, top_mass

    def surprise(self, token_id: int) -> float:
        """-log2 of the token's probability before mirostat's cut, as in the paper; NaN without mirostat."""
        return (self.log_mass - float(self.plain[token_id])) / _LN2

    def whole(self, functions: SamplingMath) -> _Part:
        """With all kept tokens."""
        size = _FIRST_SORTED
        while not (part := self.first(size, functions)).is_whole:
            size *= _SORT_GROWTH
        return part

    def first(self, size: int, functions: SamplingMath) -> _Part:
        """The likeliest ``size`` tokens, and all ties with the last of them."""
        import torch

        ids, x, is_complete = _sorted_prefix(self.x, size)
        weights = functions.weights(x)
        cumulated = functions.cumulated(weights)
        stop = len(x) if self.cut == -math.inf else int((x >= self.cut).sum())
        if self.top_mass is not None:
            stop = min(stop, 1 + int(torch.searchsorted(cumulated, self.top_mass)))
        is_whole = is_complete or stop < len(ids)
        mass = float(cumulated[stop - 1]) if self.mass is None else self.mass
        start = 0
        if self.xtc_threshold is not None:
            # All but the last of the tokens that are at least this likely (p-e-w, text-generation-webui, pull 6335).
            start = max(0, int((weights[:stop] >= self.xtc_threshold * mass).sum()) - 1)
        is_settled = self.mass is not None and (self.xtc_threshold is None or start + 1 < stop)
        return _Part(ids, weights, cumulated, start, stop, mass, is_whole, is_settled)


@dataclass(frozen=True)
class _Part:
    """The first of a row's tokens, in descending order."""

    ids: torch.Tensor
    weights: torch.Tensor
    cumulated: torch.Tensor
    start: int  # the kept tokens are [start:stop]
    stop: int
    mass: float  # of all tokens up to the last kept one
    is_whole: bool  # has all kept tokens
    is_settled: bool  # start and mass are right even if not whole

    @property
    def before(self) -> float:
        """The weight of the tokens before the first kept one."""
        return float(self.cumulated[self.start - 1]) if self.start else 0.0

    def at(self, target: float) -> int:
        """The id of the token at which the cumulated weight passes ``target``."""
        import torch

        # Rounding may put the target at the very end: then take the last kept token that has any weight.
        last = int((self.weights[: self.stop] > 0).sum()) - 1
        return int(self.ids[min(int(torch.searchsorted(self.cumulated[: self.stop], target, right=True)), last)])


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
