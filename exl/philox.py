"""Random numbers that are functions of a seed and a counter: the same on every machine and in any order of calls."""

from __future__ import annotations

from exl.errors import ConfigError

_WORD = 2**64 - 1
_CHILDREN = 2**63  # counters from here on make seeds


def words(seed: int, counter: int) -> tuple[int, int, int, int]:
    """A block of Philox4x64-10 with key (seed, 0) and counter (counter, 0, 0, 0): four independent words of 64 bits
    (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Both arguments are from 0 to 2^64 - 1."""
    if not 0 <= counter <= _WORD or not 0 <= seed <= _WORD:
        raise ConfigError(f"uniform: found seed {seed} and step {counter}, expected both from 0 to 2**64-1")
    # Integers of Python: faster for one block than to make NumPy's generator.
    a, b, c, d, key, other_key = counter, 0, 0, 0, seed, 0
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ key, second & _WORD, (first >> 64) ^ d ^ other_key, first & _WORD
        key, other_key = (key + 0x9E3779B97F4A7C15) & _WORD, (other_key + 0xBB67AE8584CAA73B) & _WORD
    return a, b, c, d


def unit(word: int) -> float:
    """A word's top 53 bits, as a number from 0 to below 1."""
    return (word >> 11) * 2.0**-53


def uniform(seed: int, step: int) -> float:
    """One draw from [0, 1) for step ``step`` of a request: the first word of the block."""
    return unit(words(seed, step)[0])


def child_seed(seed: int, choice: int) -> int:
    """The seed of the n-th answer to one request: the request's own for choice 0, so that it is the answer of n = 1."""
    return seed if choice == 0 else words(seed, _CHILDREN + choice)[0]
