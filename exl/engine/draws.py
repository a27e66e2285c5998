"""What a sequence's next draw asks for, and how the draws of a step become one batch. On the host alone."""

from __future__ import annotations

import functools
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exl.batch import SamplingBatch
from exl.engine.repetition import DryPenalties, Repetitions
from exl.errors import ConfigError
from exl.philox import uniform, unit, words
from exl.sampling_params import SamplingParams

_XTC_OFF = 1.0


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
    mirostat_mu: float = math.inf
    xtc_threshold: float = _XTC_OFF
    num_logprobs: int = -1
    adjustments: Adjustments | None = None
    mask: NDArray[np.uint32] | None = None  # [ceil(V / 32)]; None: every token is allowed


class DrawState:
    """Of one sequence: what its earlier tokens mean for the next draws. All of it follows from the tokens, and with
    mirostat from their surprises, exactly: what is taken back leaves no trace."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: frozenset[int],
        vocab_size: int,
        dry_breakers: frozenset[int] = frozenset(),
    ) -> None:
        """``eos_ids``: what ends a text; ``params.stop_token_ids`` do too. ``dry_breakers``: the tokens that contain
        one of ``params.dry_breakers``. Raises ``ConfigError`` for a parameter with a token id that does not exist."""
        _check_ids(params, vocab_size)
        self.params, self.vocab_size = params, vocab_size
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._num_generated = 0
        self._mus = [2.0 * params.mirostat_tau]  # before each token
        self._blocked: dict[int, set[int]] = {}  # by position
        self._ends = eos_ids | set(params.stop_token_ids)
        banned = set(params.banned_tokens) | (eos_ids if params.ignore_eos else set())
        self._adjusted = _Adjusted(params, banned, prompt_ids)
        self._repetitions, self._dry = None, None
        if params.dry_multiplier > 0.0:
            self._repetitions = Repetitions(list(prompt_ids), dry_breakers)
            self._dry = DryPenalties(params.dry_multiplier, params.dry_base, params.dry_allowed_length)
        # What all draws have in common, in the order of ``DrawRow`` from temperature to min_p.
        self._fixed = (
            params.temperature,
            params.dynamic_range,
            params.dynamic_exponent,
            params.temperature_last,
            params.top_n_sigma,
            params.top_k,
            params.typical_p,
            params.top_p,
            params.min_p,
        )
        if params.temperature == 0.0:  # ignores them
            self._fixed = DrawRow(0)[2:11]

    @property
    def num_generated(self) -> int:
        return self._num_generated

    def accept(self, token_id: int, surprise: float = math.nan) -> None:
        """A generated token is final. ``surprise``: as the draw gave it."""
        params = self.params
        if params.mirostat_tau > 0.0:
            change = 0.0 if math.isnan(surprise) else params.mirostat_eta * (surprise - params.mirostat_tau)
            self._mus.append(self._mus[-1] - change)
        self._push(token_id)

    def truncate(self, num_generated: int) -> None:
        """Takes back all but the first tokens that were generated."""
        if not 0 <= num_generated <= self._num_generated:
            raise ValueError(f"truncate: {num_generated} of {self._num_generated} tokens")
        if num_generated == self._num_generated:
            return
        while self._num_generated > num_generated:
            self._pop()
        del self._mus[num_generated + 1 :]
        # At earlier positions the text before is still the same, and so are the reasons to block a token there.
        self._blocked = {place: ids for place, ids in self._blocked.items() if place <= num_generated}

    def block(self, token_id: int) -> None:
        """``token_id`` must not be drawn at the present position, as long as the text before it stays as it is."""
        self._blocked.setdefault(self._num_generated, set()).add(token_id)

    def row(
        self,
        logits_row: int,
        mask: NDArray[np.uint32] | None = None,
        drafted: Sequence[int] = (),
        num_logprobs: int = -1,
    ) -> DrawRow:
        """The draw after the tokens so far and ``drafted`` ones, from this row of the logits."""
        for token_id in drafted:
            self._push(token_id)
        try:
            return self._row(logits_row, mask, num_logprobs)
        finally:
            for _ in drafted:
                self._pop()

    def copy(self, seed: int | None) -> DrawState:
        """The same state for another choice, whose draws are those of another seed; None: of the system's entropy."""
        other = object.__new__(DrawState)
        other.__dict__.update(self.__dict__)
        other._seed = secrets.randbits(64) if seed is None else seed
        other._mus = list(self._mus)
        other._blocked = {place: set(ids) for place, ids in self._blocked.items()}
        other._adjusted = self._adjusted.copy()
        other._repetitions = None if self._repetitions is None else self._repetitions.copy()
        return other

    def _push(self, token_id: int) -> None:
        self._num_generated += 1
        self._adjusted.append(token_id)
        if self._repetitions is not None:
            self._repetitions.append(token_id)

    def _pop(self) -> None:
        self._num_generated -= 1
        self._adjusted.pop()
        if self._repetitions is not None:
            self._repetitions.pop()

    def _row(self, logits_row: int, mask: NDArray[np.uint32] | None, num_logprobs: int) -> DrawRow:
        params, step = self.params, self._num_generated
        draw, mu, threshold = 0.0, math.inf, _XTC_OFF
        if params.temperature > 0.0:
            if params.xtc_probability > 0.0:
                first, coin, _, _ = words(self._seed, step)
                draw = unit(first)
                if unit(coin) < params.xtc_probability:
                    threshold = params.xtc_threshold
            else:
                draw = uniform(self._seed, step)
            if params.mirostat_tau > 0.0:
                mu = self._mus[-1]
        adjustments = self._adjusted.adjustments(self._subtracted(step))
        return DrawRow(logits_row, draw, *self._fixed, mu, threshold, num_logprobs, adjustments, mask)

    def _subtracted(self, step: int) -> dict[int, float]:
        """What this draw alone subtracts from logits, by token id."""
        params, found = self.params, {}
        if self._repetitions is not None:
            repeated = self._repetitions.continued(params.dry_window, params.dry_allowed_length)
            found = {token_id: self._dry.of(length) for token_id, length in repeated.items()}
        if step < params.min_tokens:
            found.update(dict.fromkeys(self._ends, math.inf))
        if step in self._blocked:
            found.update(dict.fromkeys(self._blocked[step], math.inf))
        return found


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    listed = {
        "logit_bias": [token_id for token_id, _ in params.logit_bias],
        "banned_tokens": params.banned_tokens,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, ids in listed.items():
        if ids and ids[-1] >= vocab_size:  # they are sorted
            raise ConfigError(f"{name}: found token id {ids[-1]}, expected 0 to {vocab_size - 1}")


class _Adjusted:
    """The adjustments that follow from counting tokens, kept sorted by id: a token more changes one or two entries."""

    def __init__(self, params: SamplingParams, banned: set[int], prompt_ids: Sequence[int]) -> None:
        self._penalty, self._window = params.repetition_penalty, params.penalty_window
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._counts = self._penalty != 1.0 or self._frequency != 0.0 or self._presence != 0.0
        self._bias, self._banned = dict(params.logit_bias), banned
        counted = prompt_ids if self._penalty != 1.0 and params.penalize_prompt else ()
        # Tokens that count, the generated ones last; and how often the window has each.
        self._ids = list(counted) if self._counts else []
        self._num_prompt = len(self._ids)
        in_window = self._ids[-self._window :] if self._window else self._ids
        self._seen, self._generated = Counter(in_window), Counter()
        entries = sorted({*self._bias, *banned, *self._seen})
        self._size = len(entries)
        self._table = Adjustments(np.array(entries, np.int32), *(np.zeros(self._size, np.float32) for _ in range(3)))
        for place, token_id in enumerate(entries):
            self._write(place, token_id)

    def copy(self) -> _Adjusted:
        other = object.__new__(_Adjusted)
        other.__dict__.update(self.__dict__)
        other._ids, other._seen, other._generated = list(self._ids), Counter(self._seen), Counter(self._generated)
        other._table = Adjustments(*(column.copy() for column in self._table))
        return other

    def append(self, token_id: int) -> None:
        if not self._counts:
            return
        self._ids.append(token_id)
        self._count(len(self._ids) - 1, 1)
        if self._window and len(self._ids) > self._window:
            self._count(len(self._ids) - 1 - self._window, -1)

    def pop(self) -> None:
        if not self._counts:
            return
        self._count(len(self._ids) - 1, -1)
        if self._window and len(self._ids) > self._window:
            self._count(len(self._ids) - 1 - self._window, 1)
        self._ids.pop()

    def adjustments(self, subtracted: dict[int, float]) -> Adjustments | None:
        """For one draw, which subtracts more from some logits. None: there are none."""
        if not self._size and not subtracted:
            return None
        ids, bias, factor, subtract = (column[: self._size].copy() for column in self._table)
        if subtracted:
            more = np.array(sorted(subtracted), np.int32)
            new = np.setdiff1d(more, ids, assume_unique=True)
            if len(new):
                places = np.searchsorted(ids, new)
                ids, bias = np.insert(ids, places, new), np.insert(bias, places, 0.0)
                factor, subtract = np.insert(factor, places, 1.0), np.insert(subtract, places, 0.0)
            subtract[np.searchsorted(ids, more)] += np.array([subtracted[i] for i in more.tolist()], np.float32)
        return Adjustments(ids, bias, factor, subtract)

    def _count(self, index: int, change: int) -> None:
        """The token at ``index`` enters the window or leaves it."""
        token_id = self._ids[index]
        self._seen[token_id] += change
        if index >= self._num_prompt:
            self._generated[token_id] += change
        place = int(np.searchsorted(self._table.ids[: self._size], token_id))
        if place == self._size or self._table.ids[place] != token_id:
            self._insert(place, token_id)
        elif not self._seen[token_id] and token_id not in self._bias and token_id not in self._banned:
            self._remove(place)
            return
        self._write(place, token_id)

    def _write(self, place: int, token_id: int) -> None:
        _, bias, factor, subtract = self._table
        times = self._generated[token_id]
        bias[place] = self._bias.get(token_id, 0.0)
        factor[place] = self._penalty if self._seen[token_id] else 1.0
        counted = self._frequency * times + (self._presence if times else 0.0)
        subtract[place] = math.inf if token_id in self._banned else counted

    def _insert(self, place: int, token_id: int) -> None:
        if self._size == len(self._table.ids):
            room = max(256, self._size)
            self._table = Adjustments(*(np.concatenate([c, np.zeros(room, c.dtype)]) for c in self._table))
        for column in self._table:
            column[place + 1 : self._size + 1] = column[place : self._size]
        self._table.ids[place] = token_id
        self._size += 1

    def _remove(self, place: int) -> None:
        for column in self._table:
            column[place : self._size - 1] = column[place + 1 : self._size]
        self._size -= 1


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


_PLAIN_GREEDY = DrawRow(0)[1:_NUM_SCALARS]  # all but the row


def _is_plain_greedy(draw: DrawRow) -> bool:
    return draw.mask is None and draw.adjustments is None and draw[1:_NUM_SCALARS] == _PLAIN_GREEDY


def sampling_batch(rows: Sequence[DrawRow], vocab_size: int) -> SamplingBatch:
    """The draws of a step, as arrays; the columns of single numbers are views of one table."""
    if all(map(_is_plain_greedy, rows)):
        return _greedy_batch(tuple(draw.row for draw in rows), vocab_size)
    return _batch_of(rows, vocab_size)


@functools.lru_cache(maxsize=256)
def _greedy_batch(rows: tuple[int, ...], vocab_size: int) -> SamplingBatch:
    """Made once: a step that takes the largest logits needs no other numbers than those before it."""
    return _batch_of([DrawRow(row) for row in rows], vocab_size)


def _batch_of(rows: Sequence[DrawRow], vocab_size: int) -> SamplingBatch:
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
