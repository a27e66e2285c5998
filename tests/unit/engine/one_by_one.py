"""The plain way to run a draft model: one sequence after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from exl.engine.draft_model import DraftJob
from exl.engine.speculation import SequenceView
from exl.errors import MemoryBudgetError


class CachedModel(Protocol):
    """A model that runs one sequence at a time. A ``cached`` is whatever it knows a sequence by."""

    def begin(self, num_tokens: int) -> Any:
        """Pages for so many tokens. Raises ``MemoryBudgetError``."""

    def truncate(self, cached: Any, num_tokens: int) -> None:
        """Only the first tokens stay; their pages may all stay."""

    def extend(self, cached: Any, ids: Sequence[int]) -> torch.Tensor:
        """Runs the next tokens: logits after the last one, f32 [1, V], valid until the next call."""

    def end(self, cached: Any) -> None: ...


# The request's own draw: (logits [1, V] after the sequence and these drafts, the sequence, the drafts) -> token id, or
# less than 0 for a row that has no distribution.
Draw = Callable[[torch.Tensor, SequenceView, tuple[int, ...]], int]


class OneByOne:
    """See ``DraftRunner``: one sequence after the other, through a model like ``exl.engine.generator.Generator``."""

    def __init__(self, model: CachedModel, draw: Draw, context: int) -> None:
        """``context``: tokens for which a sequence has pages from the beginning."""
        self._model, self._draw, self._context = model, draw, context
        self._cached: dict[SequenceView, Any] = {}

    def draft(self, jobs: Sequence[DraftJob]) -> list[tuple[int, ...] | None]:
        return [self._one(job) for job in jobs]

    def _one(self, job: DraftJob) -> tuple[int, ...] | None:
        cached = self._cached.get(job.sequence)
        if cached is None:
            try:
                cached = self._cached[job.sequence] = self._model.begin(self._context)
            except MemoryBudgetError:
                return None
        self._model.truncate(cached, job.start)
        logits = self._model.extend(cached, job.ids)
        drafts: tuple[int, ...] = ()
        while len(drafts) < job.length:
            if drafts:
                logits = self._model.extend(cached, drafts[-1:])
            drafts = (*drafts, self._draw(logits, job.sequence, drafts))
            if drafts[-1] < 0:
                break
        return drafts

    def release(self, sequence: SequenceView) -> None:
        if sequence in self._cached:
            self._model.end(self._cached.pop(sequence))
