"""The samplers once more, written from their definitions in plain NumPy and f64, on the whole row and without care for
speed: what ``exl.sampling`` is held against.

- Top-n-sigma: Tang et al., "Top-n-sigma: Not All Logits Are You Need", arXiv 2411.07641, algorithm 1.
- Dynamic temperature: llama.cpp, pull request 4972.
- Typical: Meister et al., "Locally Typical Sampling", arXiv 2202.00666, equation 7 on the whole vocabulary.
- Mirostat 2: Basu et al., arXiv 2007.14966, with the truncation by surprise.
- XTC: p-e-w, text-generation-webui, pull request 6335.
- DRY: p-e-w, text-generation-webui, pull request 5677; breakers and the clamp as in llama.cpp, pull request 9702.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from exl.engine.draws import DrawRow

F64 = NDArray[np.float64]


def softmax(x: F64) -> F64:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def adjusted(logits: NDArray[np.float32], draw: DrawRow) -> F64:
    """One logit at a time, in f32."""
    out = logits.astype(np.float32)
    if draw.mask is not None:
        for i in range(len(out)):
            if not int(draw.mask[i // 32]) >> (i % 32) & 1:
                out[i] = -np.inf
    for token_id, bias, factor, subtract in zip(*(draw.adjustments or ((), (), (), ())), strict=True):
        value = np.float32(out[token_id]) + np.float32(bias)
        value = value * np.float32(factor) if value < 0 else value / np.float32(factor)
        out[token_id] = value - np.float32(subtract)
    return out.astype(np.float64)


def temperature_of(x: F64, draw: DrawRow) -> float:
    temperature, reach = float(np.float32(draw.temperature)), float(np.float32(draw.dynamic_range))
    left = x[x > -np.inf]
    if not reach or len(left) == 1:
        return temperature
    p = softmax(left)
    entropy = -sum(q * np.log(q) for q in p if q > 0)
    low, high = max(0.0, temperature - reach), temperature + reach
    return max(1e-300, low + (high - low) * (entropy / np.log(len(left))) ** float(np.float32(draw.dynamic_exponent)))


def typical(x: F64, share: float) -> F64:
    p = softmax(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(p)
        entropy = np.nansum(p * surprise)
        distance = np.where(x > -np.inf, np.abs(surprise - entropy), np.inf)
    taken, mass = [], 0.0
    for i in np.argsort(distance, kind="stable"):
        if mass >= share or distance[i] == np.inf:
            break
        taken.append(i)
        mass += p[i]
    return np.where(distance <= distance[taken].max(), x, -np.inf)


def kept_by_filters(x: F64, draw: DrawRow) -> F64:
    """x with -inf for what is cut off."""
    if draw.mirostat_mu < np.inf:
        with np.errstate(divide="ignore"):
            surprise = -np.log2(softmax(x))
        return np.where((surprise <= draw.mirostat_mu) | (x == x.max()), x, -np.inf)
    if 0 < draw.top_k < len(x):
        x = np.where(x >= np.sort(x)[-draw.top_k], x, -np.inf)
    if draw.typical_p < 1:
        x = typical(x, float(np.float32(draw.typical_p)))
    if draw.top_p < 1:
        p = softmax(x)
        order = np.lexsort((np.arange(len(x)), -x))
        before = np.cumsum(p[order]) - p[order]
        keep = np.zeros(len(x), bool)
        keep[order[(before < float(np.float32(draw.top_p))) | (np.arange(len(x)) == 0)]] = True
        x = np.where(keep, x, -np.inf)
    if draw.min_p > 0:
        x = np.where(np.exp(x - x.max()) >= float(np.float32(draw.min_p)) * (1 - 1e-13), x, -np.inf)
    return x


def without_top_choices(x: F64, threshold: float) -> F64:
    p = softmax(x)
    order = np.lexsort((np.arange(len(x)), -x))
    good = [i for i in order if p[i] >= threshold and x[i] > -np.inf]
    out = x.copy()
    out[good[:-1]] = -np.inf
    return out


def distribution(logits: NDArray[np.float32], draw: DrawRow) -> F64:
    x = adjusted(logits, draw)
    if draw.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(np.float64)
    if draw.top_n_sigma > 0:
        allowed = x[x > -np.inf]
        x = np.where(x >= x.max() - float(np.float32(draw.top_n_sigma)) * allowed.std(), x, -np.inf)
    x = x - x.max()
    if not draw.temperature_last:
        x = x / temperature_of(x, draw)
    x = kept_by_filters(x, draw)
    if draw.xtc_threshold <= 0.5:
        x = without_top_choices(x, float(np.float32(draw.xtc_threshold)))
    if draw.temperature_last:
        x = (x - x.max()) / temperature_of(x, draw)
    return softmax(x)


def dry_lengths(ids: Sequence[int], window: int, allowed_length: int, breakers: Collection[int]) -> dict[int, int]:
    """By comparing every place with the end, token by token."""
    ids = list(ids[-window:] if window else ids)
    found: dict[int, int] = {}
    for place in range(len(ids) - 1):
        length = 0
        while length <= place and ids[place - length] == ids[-1 - length] and ids[-1 - length] not in breakers:
            length += 1
        following = ids[place + 1]
        if length >= allowed_length and following not in breakers:
            found[following] = max(found.get(following, 0), length)
    return found


def dry_penalty(length: int, multiplier: float, base: float, allowed_length: int) -> float:
    with np.errstate(over="ignore"):
        return float(np.minimum(multiplier * np.float64(base) ** (length - allowed_length), np.finfo(np.float32).max))
