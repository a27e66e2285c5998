"""What is wanted of a prompt's rows besides the logits after the last one. After a pass they are still in the device's
buffer: the head runs over them in slices that fit into the buffer of the logits.

All choices of a request share it. What was told once is not told again, though a pause may compute its rows twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from exl.engine.compose import Piece
    from exl.engine.device import Device
    from exl.engine.ticket import Ticket


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


def prompt_rows(ticket: Ticket) -> PromptRows | None:
    """None: nothing is wanted."""
    if ticket.request.wants_all:
        return WholeText(ticket)
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
