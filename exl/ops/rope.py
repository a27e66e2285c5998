"""Inverse frequencies of rotary embedding: a pure function of the config and, for "dynamic" and "longrope", of the
length of the text.

Formulas: RoPE (arXiv 2104.09864), linear and NTK scaling as in transformers, yarn (arXiv 2309.00071), llama3
(Llama 3.1's reference code), longrope (arXiv 2402.13753). Computed in float32, like transformers: at position 100,000,
an error of half a unit in the last place of a frequency visibly shifts the phase.

The bits are the same on every machine: nothing here calls a mathematical library's exp, log or pow, or NumPy's, which
choose their code by the processor. Of NumPy's arithmetic only what IEEE 754 defines is used.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.rope_config import RopeConfig
from exl.logarithm import natural_log

_LN2 = (0.6931471804855391, 7.440617110012397e-11)  # high and low part: n * high is exact for |n| < 2^20
_TAYLOR = tuple(1 / math.factorial(i) for i in range(14))
_LARGEST_LOG = 200.0  # e^200 is beyond float32


def rotary_dim(rope: RopeConfig, head_dim: int) -> int:
    """The number of a head's channels that rotate: the first ones, paired as two halves."""
    return 2 if rope.kind == "none" else int(head_dim * rope.partial_rotary_factor)  # by an angle of 0


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[NDArray[np.float32], float]:
    """Frequencies f32 [ceil(rotary_dim / 2)] in radians per token, and the factor for cos and sin.

    ``length``: the sequence's length, used only by kinds that ``depends_on_length`` names.
    """
    if rope.kind == "none":
        return np.zeros(1, np.float32), 1.0
    dim = rotary_dim(rope, head_dim)
    theta, factor = rope.theta, rope.factor
    if rope.kind == "dynamic":
        stretch = factor * max(length, rope.max_position) / rope.max_position - (factor - 1)
        theta = theta * float(_power(stretch, np.float64(dim / (dim - 2))))
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freq = np.float32(1) / _power(float(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)
    if rope.kind == "linear":
        return freq / np.float32(factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, freq, dim), _yarn_attention_factor(rope)
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_position else rope.short_factor
        return freq / np.array(factors, np.float32), _longrope_attention_factor(rope)
    return freq, 1.0


def depends_on_length(rope: RopeConfig) -> bool:
    return rope.kind in ("dynamic", "longrope")


def longest_alike(rope: RopeConfig) -> int | None:
    """Texts of up to so many tokens turn alike; None: of any length."""
    return {"dynamic": rope.max_position, "longrope": rope.original_max_position}.get(rope.kind)


def query_scales(rope: RopeConfig, positions: NDArray[np.integer]) -> NDArray[np.float32]:
    """What a row's queries are multiplied by, f32 [T], see ``RopeConfig.query_beta``."""
    lengths, which = np.unique(positions // rope.original_max_position, return_inverse=True)
    scales = [1 + rope.query_beta * natural_log(1 + int(length)) for length in lengths]
    return np.array(scales, np.float32)[which.reshape(-1)]


def _power(base: float, exponent: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    """``base ** exponent`` to 2^-48 of itself, for base >= 0; results beyond e^-200 or e^200 become that.

    With x = exponent * ln(base), n = rint(x / ln 2) and r = x - n ln 2: 2^n times Taylor's series of e^r.
    """
    log = min(max(natural_log(base), -1e300), 1e300)  # finite, so that base ** 0 is 1 for each
    x = np.clip(exponent * log, -_LARGEST_LOG, _LARGEST_LOG)
    n = np.rint(x * (1 / _LN2[0]))
    r = (x - n * _LN2[0]) - n * _LN2[1]
    y = np.full_like(r, _TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        y = y * r + coefficient
    return np.ldexp(y, n.astype(np.int32))


def _llama3(rope: RopeConfig, freq: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divides frequencies of long wavelengths by the factor, keeps those of short ones, blends in the band between."""
    wavelength = 2 * math.pi / freq
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * freq / rope.factor + smooth * freq
    long = wavelength > rope.original_max_position / rope.low_freq_factor
    short = wavelength < rope.original_max_position / rope.high_freq_factor
    return np.where(long, freq / rope.factor, np.where(short, freq, blended)).astype(np.float32)


def _yarn(rope: RopeConfig, freq: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Channels with many rotations within the original length keep their frequency; those with few are interpolated."""

    def channel(rotations: float) -> float:
        return dim * natural_log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * natural_log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (freq / np.float32(rope.factor) * ramp + freq * (1 - ramp)).astype(np.float32)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + natural_log(rope.factor) / natural_log(rope.original_max_position))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * natural_log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
