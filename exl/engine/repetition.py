"""How long the end of a text repeats what stands earlier in it: what the DRY sampler punishes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAX_F32 = float(np.finfo(np.float32).max)
_KEPT = 64  # earlier states: drafts are taken back more often than texts are begun anew


class _Matches(NamedTuple):
    """Of a text's last token: the earlier places of the same token, rising, and how many tokens up to each of them are
    the same as up to the end."""

    places: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Repetitions:
    """A text's tokens, and the repetitions that its last tokens are.

    A token more costs one search for its earlier places: at each of them the repetition is one longer than the one that
    ended before it. Where that is not known, the Z-algorithm says it all (Gusfield, "Algorithms on Strings, Trees and
    Sequences", 1997, section 1.4).
    """

    def __init__(self, ids: Sequence[int], breakers: Iterable[int]) -> None:
        """``breakers``: token ids that no repetition crosses."""
        self._ids = np.array(ids, np.int32)
        self._count = len(self._ids)
        self._breakers = frozenset(breakers)
        self._broken = [i for i, token_id in enumerate(ids) if token_id in self._breakers]
        self._known: list[_Matches] = []  # after the last tokens, the newest last

    def copy(self) -> Repetitions:
        other = object.__new__(Repetitions)
        other._ids, other._count, other._breakers = self._ids.copy(), self._count, self._breakers
        other._broken, other._known = list(self._broken), list(self._known)
        return other

    def append(self, token_id: int) -> None:
        before = self._matches() if self._count else _Matches(np.empty(0, np.int64), np.empty(0, np.int64))
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(256, self._count), np.int32)])
        self._ids[self._count] = token_id
        places = np.flatnonzero(self._ids[: self._count] == token_id)
        at = np.searchsorted(before.places, places - 1)
        found = np.append(before.places, -2)[at] == places - 1
        lengths = 1 + np.where(found, np.append(before.lengths, 0)[at], 0)
        if token_id in self._breakers:
            self._broken.append(self._count)
        self._count += 1
        self._known.append(_Matches(places, lengths))
        del self._known[:-_KEPT]

    def pop(self) -> None:
        self._count -= 1
        if self._known:
            self._known.pop()
        if self._broken and self._broken[-1] == self._count:
            self._broken.pop()

    def _matches(self) -> _Matches:
        if not self._known:
            lengths = suffix_matches(self._ids[: self._count].tolist())
            places = np.flatnonzero(lengths)
            self._known.append(_Matches(places, lengths[places]))
        return self._known[-1]

    def continued(self, window: int, least: int) -> dict[int, int]:
        """Token ids that would go on with a repetition of at least ``least`` of the last ``window`` tokens (0: of all),
        and the longest such repetition of each. Breakers never go on with one."""
        start = max(0, self._count - window) if window else 0
        longest = self._count - 1 - self._broken[-1] if self._broken else self._count
        if longest < least or self._count < 2:
            return {}
        places, lengths = self._matches()
        lengths = np.minimum(np.minimum(lengths, places - start + 1), longest)
        counted = lengths >= least
        following, lengths = self._ids[places[counted] + 1], lengths[counted]
        order = np.argsort(lengths, kind="stable")  # of a token's lengths, the longest is kept
        found = dict(zip(following[order].tolist(), lengths[order].tolist(), strict=True))
        return {token_id: length for token_id, length in found.items() if token_id not in self._breakers}


def suffix_matches(ids: Sequence[int]) -> NDArray[np.int64]:
    """[n]: how many tokens up to place i are the same as up to the end; 0 for the last place itself."""
    count = len(ids)
    backwards = ids[::-1]
    z = [0] * count
    left = right = 0  # backwards[left:right] is the beginning again
    for i in range(1, count):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < count and backwards[length] == backwards[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return np.array(z[::-1], np.int64)


class DryPenalties:
    """multiplier base^(length - allowed length), in f32, finite: a penalty makes a token unlikely, never impossible."""

    def __init__(self, multiplier: float, base: float, allowed_length: int) -> None:
        self._base, self._allowed_length = base, allowed_length
        self._values = [min(multiplier, _MAX_F32)]  # by repeated multiplication: the same bits on every machine

    def of(self, length: int) -> float:
        exponent = length - self._allowed_length
        while len(self._values) <= exponent and self._values[-1] < _MAX_F32:
            self._values.append(min(self._values[-1] * self._base, _MAX_F32))
        return self._values[min(exponent, len(self._values) - 1)]
