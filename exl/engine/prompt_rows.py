"""What is wanted of a prompt's rows besides the logits after the last one. After a pass they are still in the device's
buffer: the head runs over them in slices that fit into the buffer of the logits.

All choices of a request share it. What was told once is not told again, though a pause may compute its rows twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from exl.batch import NAN_LOGIT
from exl.engine.draws import DrawRow, sampling_batch
from exl.errors import ExlError, NotFiniteError
from exl.sampling import no_distribution

if TYPE_CHECKING:
    from exl.engine.compose import Piece
    from exl.engine.device import Device
    from exl.engine.ticket import Ticket


_STATES = 64  # rows that are copied to the host at once


class PromptRows(Protocol):
    num_rows: int  # of the prompt's rows the first ones are wanted
    num_done: int  # of those, the first ones, of which all has been told

    @property
    def is_wanted(self) -> bool:
        """Whether there is something left to tell."""

    def take(self, device: Device, chunk: int, rows: range) -> None:
        """Tells what ``rows`` of a chunk of the last step give, which are the next ones of the prompt."""


class _Rows:
    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.num_done = num_rows, 0

    @property
    def is_wanted(self) -> bool:
        return self.num_done < self.num_rows


class WholeText(_Rows):
    """The logits after each token, as events."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(len(ticket.request.prompt_ids))
        self._ticket = ticket

    def take(self, device: Device, chunk: int, rows: range) -> None:
        for some in slices(rows, device.max_logit_rows):
            logits = device.prompt_logits(chunk, some)
            self._ticket.put_logits(logits.to("cpu", copy=True))
            self.num_done += len(some)


class NotNumbersError(Exception):
    """A row of the prompt has NaN or inf."""

    def __init__(self, error: ExlError) -> None:
        """``error``: for the caller."""
        super().__init__(error)
        self.error = error


class TokenLogprobs(_Rows):
    """The log-probabilities of given tokens, one after each of a run of rows, and those of the likeliest at its place.
    Each is measured as that of a generated token is: by a draw, here one that only this token is allowed for."""

    def __init__(self, ticket: Ticket, count: int, targets: Sequence[int], first_row: int) -> None:
        """``count``: of the likeliest. ``targets[i]`` is the token after row ``first_row + i``."""
        self._targets, self._count, self._first_row = targets, count, first_row
        super().__init__(first_row + len(targets))
        self.num_done = first_row  # nothing is wanted of those before
        # Of each target: itself, then the likeliest.
        self.found: list[tuple[tuple[int, float], ...] | None] = []
        for answer in ticket.answers:
            answer.prompt_ranked = self.found

    def take(self, device: Device, chunk: int, rows: range) -> None:
        for some in slices(rows, device.max_logit_rows):
            logits = device.prompt_logits(chunk, some)
            done = self.num_done - self._first_row
            ids = self._targets[done : done + len(some)]
            draws = [
                DrawRow(i, num_logprobs=self._count, mask=_only(token_id, device.vocab_size))
                for i, token_id in enumerate(ids)
            ]
            drawn = device.sample(logits, sampling_batch(draws, device.vocab_size)).read()
            for token_id, ranked in zip(drawn.ids, drawn.ranked, strict=True):
                if token_id < 0 or ranked is None:  # None: a token that was not allowed has no number
                    raise NotNumbersError(no_distribution(min(token_id, NAN_LOGIT)))
                self.found.append(ranked)
                self.num_done += 1


class Pooled(_Rows):
    """One state for the whole text: of the last layer after the final norm, the mean over its tokens or the last one's.
    Sums are f64, in the order of the tokens, so that no bit depends on where chunks and slices end."""

    def __init__(self, ticket: Ticket) -> None:
        request = ticket.request
        super().__init__(len(request.prompt_ids))
        (self._answer,) = ticket.answers
        if request.pooling == "last":
            self.num_done = self.num_rows - 1  # nothing is wanted of those before
        self._count = self.num_rows - self.num_done
        self._total: NDArray[np.float64] | None = None

    def take(self, device: Device, chunk: int, rows: range) -> None:
        for some in slices(rows, _STATES):
            states = device.final_states(chunk, some)
            if not np.isfinite(states).all():
                raise NotNumbersError(
                    NotFiniteError("embed: found a hidden state of nan or inf, expected finite numbers")
                )
            for state in states:
                self._total = state if self._total is None else self._total + state
            self.num_done += len(some)
        if not self.is_wanted:
            self._answer.embedding = (self._total / self._count).astype(np.float32)


def _only(token_id: int, vocab_size: int) -> NDArray[np.uint32]:
    """A mask that allows one token."""
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    mask[token_id // 32] = 1 << token_id % 32
    return mask


def prompt_rows(ticket: Ticket) -> PromptRows | None:
    """None: nothing is wanted."""
    request = ticket.request
    if request.wants_all:
        return WholeText(ticket)
    if request.prompt_logprobs is not None:
        found = TokenLogprobs(ticket, request.prompt_logprobs, request.prompt_ids[1:], 0)
        found.found.append(None)  # nothing is known of the first token
        return found
    if request.scored_ids is not None:
        return TokenLogprobs(ticket, 1, request.scored_ids, len(request.prompt_ids) - len(request.scored_ids))
    if request.pooling is not None:
        return Pooled(ticket)
    return None


def slices(rows: range, most: int) -> list[range]:
    """``slices(range(2, 9), 4) == [range(2, 6), range(6, 9)]``."""
    return [rows[i : i + most] for i in range(0, len(rows), most)]


def rows_of(piece: Piece, first_row: int) -> range:
    """Which rows of its batch, where the piece begins at ``first_row``, have something to tell."""
    wanted = piece.sequence.ticket.rows
    if wanted is None:
        return range(0)
    first, last = max(piece.start, wanted.num_done), min(piece.stop, wanted.num_rows)
    return range(first_row + first - piece.start, first_row + max(first, last) - piece.start)
