"""Which sequences guess ahead in a step, how far, and what has come of it. No output depends on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from exl.engine.draft_length import DraftLength, StepCosts, share_rows
from exl.engine.sequence import Sequence as Tokens
from exl.engine.speculation import Drafter

_SLOPE = 0.12  # of a step's cost, for each row more, while nothing was measured: eight rows cost less than two
_FRESH = 0.2  # weight of the newest measurement
_WARM = 3  # steps of a shape that are not measured: they load, record and capture what the later ones only run


class MeasuredCosts:
    """Seconds of decode steps by their number of rows, as they were of late."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: Counter[int] = Counter()
        self._draft = 0.0  # of proposing one token more for each sequence

    def drafted(self, longest: int, seconds: float) -> None:
        """Proposing up to ``longest`` tokens for each sequence of a step has taken so long."""
        each = seconds / longest
        self._draft += (each - self._draft) * (_FRESH if self._draft else 1.0)

    def draft(self, longest: int) -> float:
        return longest * self._draft

    def measured(self, num_rows: int, seconds: float) -> None:
        self._counts[num_rows] += 1
        if self._counts[num_rows] <= _WARM:
            return
        before = self._seconds.get(num_rows)
        self._seconds[num_rows] = seconds if before is None else before + _FRESH * (seconds - before)

    def rows(self, num_rows: int) -> float:
        """Between two measured numbers a straight line; beyond, the usual slope."""
        known = sorted(self._seconds)
        if not known:
            return 1.0 + _SLOPE * (num_rows - 1)
        below = max((n for n in known if n <= num_rows), default=None)
        above = min((n for n in known if n >= num_rows), default=None)
        if below is None:
            return self._seconds[above] / (1.0 + _SLOPE * (above - num_rows))
        if above is None:
            return self._seconds[below] * (1.0 + _SLOPE * (num_rows - below))
        if below == above:
            return self._seconds[below]
        share = (num_rows - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])


class DrafterError(Exception):
    """A drafter has failed, for its cause; ``sequences`` wanted drafts of it."""

    def __init__(self, sequences: list[Tokens]) -> None:
        self.sequences = sequences


class Drafts:
    """Of all sequences of a model. A sequence asks for a drafter by name (``TokenRequest.speculate``)."""

    def __init__(self, drafters: Mapping[str, Drafter], max_rows: int, max_drafts: int) -> None:
        """``max_rows``: of a decode batch. ``max_drafts``: of one sequence."""
        self._drafters, self._max_rows, self._max_drafts = dict(drafters), max_rows, max_drafts
        self._lengths: dict[Tokens, DraftLength] = {}
        self._granted: dict[Tokens, int] = {}
        self.costs = MeasuredCosts()

    def add(self, name: str, drafter: Drafter) -> None:
        self._drafters[name] = drafter

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._drafters)

    def wanted(self, sequence: Tokens) -> bool:
        """Whether the sequence may have drafts in its next step: its tokens must be known before."""
        request = sequence.ticket.request
        # Mirostat's draws depend on how likely all tokens before were, which is known only when they are drawn.
        return request.speculate is not None and not sequence.prompt_only and request.params.mirostat_tau == 0.0

    def propose(self, sequences: Sequence[Tokens]) -> dict[Tokens, tuple[int, ...]]:
        """Drafts for the decode rows of a step, those of sequences that want none included."""
        asking = [
            sequence
            for sequence in sequences
            if sequence.ticket.request.speculate is not None and self.wanted(sequence)
        ]
        if not asking:
            return {}
        lengths = [self._lengths.setdefault(sequence, DraftLength()) for sequence in asking]
        asks = [length.ask(self._room(sequence)) for sequence, length in zip(asking, lengths, strict=True)]
        fixed = [sequence.ticket.request.draft_tokens for sequence in asking]
        granted = share_rows(asks, StepCosts(self.costs.rows, self.costs.draft), self._max_rows, len(sequences))
        left = self._max_rows - len(sequences)
        for i, (ask, count) in enumerate(zip(asks, fixed, strict=True)):
            wanted = granted[i] if count is None else min(count, ask.most)  # whether they pay or not
            granted[i] = min(wanted, max(left, 0))
            left -= granted[i]
        began, found = time.perf_counter(), {}
        for name, drafter in self._drafters.items():
            want = [
                (sequence, count)
                for sequence, count in zip(asking, granted, strict=True)
                if sequence.ticket.request.speculate == name and count > 0
            ]
            try:
                proposed = drafter.propose(want) if want else ()
            except Exception as error:
                raise DrafterError([sequence for sequence, _ in want]) from error
            for (sequence, _), drafts in zip(want, proposed, strict=True):
                found[sequence] = drafts
        for sequence, count in zip(asking, granted, strict=True):
            self._granted[sequence] = count
        if max(granted) > 0:
            self.costs.drafted(max(granted), time.perf_counter() - began)
        return found

    def _room(self, sequence: Tokens) -> int:
        """Drafts that it can take: the last token that it may draw needs no draft."""
        return max(0, min(self._max_drafts, sequence.max_new - sequence.num_drawn - 1))

    def drawn(self, sequence: Tokens, num_drafted: int, num_accepted: int) -> None:
        """What has become of a sequence's drafts in a step."""
        if sequence not in self._granted:
            return
        self._lengths[sequence].advance(self._granted.pop(sequence), num_drafted, num_accepted)
        if num_drafted:
            self._drafters[sequence.ticket.request.speculate].commit(sequence, num_accepted)
            sequence.answer.num_drafted += num_drafted
            sequence.answer.num_accepted += num_accepted

    def truncated(self, sequence: Tokens) -> None:
        if sequence in self._lengths:
            self._drafters[sequence.ticket.request.speculate].truncate(sequence, len(sequence.ids))

    def release(self, sequence: Tokens) -> None:
        self._granted.pop(sequence, None)
        if self._lengths.pop(sequence, None) is not None:
            self._drafters[sequence.ticket.request.speculate].release(sequence)
