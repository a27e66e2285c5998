"""Drafts of a second, smaller model with the same vocabulary.

It keeps K and V on pages of its own: they follow the target's sequence when drafts are asked for, and nothing of the
target's paging, pausing and prefix reuse concerns it. A sequence for which it has no page gets no drafts. With the
target's page numbers one prefix tree would serve both, but only for what both have computed, and every fork, eviction
and pause would be a matter of two caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exl.engine.speculation import SequenceView

# More tokens than these are a prompt, or were decoded while speculation was off: they are caught up with.
_FEW = 32
_CAUGHT_UP_A_CALL = 512


@dataclass(frozen=True)
class DraftJob:
    """One sequence's part in a call of the draft model."""

    sequence: SequenceView
    start: int  # its tokens before this have K and V; what lies behind is overwritten
    ids: Sequence[int]  # the tokens from there on, at least one
    length: int  # how many tokens to draft after them; 0: only K and V are wanted


class DraftRunner(Protocol):
    """Runs the draft model: ``exl.engine.draft_runner.BatchedDrafts``."""

    def draft(self, jobs: Sequence[DraftJob]) -> list[tuple[int, ...] | None]:
        """For each job: runs its tokens, then draws ``length`` tokens one after another, running all but the last.

        Draft j is drawn as the request would draw there: greedily, or with the uniform number of that step and the
        same parameters, so that two models that agree draw the same token. An id that is no token ends a job's drafts.
        None: there is no page left for the sequence, and nothing of it has K and V any more."""

    def release(self, sequence: SequenceView) -> None:
        """Gives its pages back, if it has any."""


@dataclass
class _Followed:
    num_cached: int = 0  # tokens of the sequence that have K and V, drafts that were not kept left out
    num_drafted: int = 0  # drafts behind them that have K and V, until they are committed


class DraftModel:
    """See ``Drafter``."""

    def __init__(self, runner: DraftRunner, context: int, vocab_size: int) -> None:
        """``context``: most tokens of a sequence that the draft model can see. ``vocab_size``: the target's; padding
        rows of the draft model's head lie beyond it."""
        self._runner, self._context, self._vocab_size = runner, context, vocab_size
        self._followed: dict[SequenceView, _Followed] = {}

    def propose(self, want: Sequence[tuple[SequenceView, int]]) -> list[tuple[int, ...]]:
        """Nothing for a sequence that is longer than the draft model's context, or not caught up with yet: a call
        runs at most 512 tokens of prompts, first come, first served."""
        room = _CAUGHT_UP_A_CALL
        jobs: list[DraftJob] = []
        places: list[int] = []
        for place, (sequence, most) in enumerate(want):
            # The last draft is not run, so it may stand just beyond the context.
            length = min(most, self._context + 1 - len(sequence.ids))
            if length < 1:
                continue
            known = self._followed.setdefault(sequence, _Followed())
            start = min(known.num_cached, len(sequence.ids) - 1)
            missing = len(sequence.ids) - start
            if missing > _FEW:
                taken = min(missing, room)
                room -= taken
                if taken == 0:
                    continue
                length = length if taken == missing else 0
                missing = taken
            jobs.append(DraftJob(sequence, start, sequence.ids[start : start + missing], length))
            places.append(place)
        drafts: list[tuple[int, ...]] = [()] * len(want)
        for place, job, found in zip(places, jobs, self._runner.draft(jobs) if jobs else (), strict=True):
            drafts[place] = self._taken(job, found)
        return drafts

    def _taken(self, job: DraftJob, found: tuple[int, ...] | None) -> tuple[int, ...]:
        if found is None:
            self._followed.pop(job.sequence)
            return ()
        known = self._followed[job.sequence]
        known.num_cached = job.start + len(job.ids)
        foreign = (j for j, token_id in enumerate(found) if not 0 <= token_id < self._vocab_size)
        found = found[: next(foreign, len(found))]
        known.num_drafted = min(len(found), max(0, job.length - 1))
        return found

    def commit(self, sequence: SequenceView, num_accepted: int) -> None:
        known = self._followed.get(sequence)
        if known is not None:
            known.num_cached += min(num_accepted, known.num_drafted)
            known.num_drafted = 0

    def truncate(self, sequence: SequenceView, num_tokens: int) -> None:
        known = self._followed.get(sequence)
        if known is not None:
            known.num_cached, known.num_drafted = min(known.num_cached, num_tokens), 0

    def release(self, sequence: SequenceView) -> None:
        if self._followed.pop(sequence, None) is not None:
            self._runner.release(sequence)
