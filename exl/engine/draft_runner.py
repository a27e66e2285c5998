"""Runs a draft model for all sequences of a step together: its tokens are drawn as the requests themselves would draw
them, so that two models that agree draw the same token."""

from __future__ import annotations

from collections.abc import Sequence

from exl.batch import PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.engine.compose import batch_of
from exl.engine.draft_model import DraftJob
from exl.engine.draws import sampling_batch
from exl.engine.manual import ManualSequence
from exl.engine.runner import Runner
from exl.engine.sequence import Sequence as Tokens
from exl.errors import MemoryBudgetError


class BatchedDrafts:
    """See ``exl.engine.draft_model.DraftRunner``."""

    def __init__(self, runner: Runner, pool: PagePool) -> None:
        self._runner, self._pool = runner, pool
        self._followed: dict[Tokens, ManualSequence] = {}

    def draft(self, jobs: Sequence[DraftJob]) -> list[tuple[int, ...] | None]:
        found: dict[int, list[int] | None] = {}
        running: list[tuple[int, DraftJob, ManualSequence]] = []
        for i, job in enumerate(jobs):
            followed = self._placed(job)
            found[i] = None if followed is None else []
            if followed is not None:
                running.append((i, job, followed))
        starts = {i: job.start for i, job, _ in running}
        while running:
            logits = self._runner.step(*self._rows(running, starts))
            drawing = [(i, job, followed) for i, job, followed in running if len(found[i]) < job.length]
            rows = [
                job.sequence.draws.row(row, None, tuple(found[i]))
                for row, (i, job, _) in enumerate(running)
                if len(found[i]) < job.length
            ]
            if not rows:
                break
            drawn = self._runner.sample(logits, sampling_batch(rows, self._runner.vocab_size)).read().ids
            running = []
            for token_id, (i, job, followed) in zip(drawn, drawing, strict=True):
                found[i].append(token_id)
                if token_id >= 0 and len(found[i]) < job.length:
                    starts[i] = len(followed.ids)
                    followed.ids.append(token_id)
                    running.append((i, job, followed))
        return [None if ids is None else tuple(ids) for ids in (found[i] for i in range(len(jobs)))]

    def _placed(self, job: DraftJob) -> ManualSequence | None:
        """The sequence's tokens up to the job's last one, with pages for them and for its drafts. None: there are too
        few; then it has none at all."""
        followed = self._followed.setdefault(job.sequence, ManualSequence())
        followed.ids[job.start :] = job.ids
        num_tokens = len(followed.ids) + max(0, job.length - 1)
        try:
            self._pool.grow(followed.pages, max(0, -(-num_tokens // PAGE_SIZE) - len(followed.pages)))
        except MemoryBudgetError:
            self.release(job.sequence)
            return None
        return followed

    def _rows(self, running: Sequence[tuple[int, DraftJob, ManualSequence]], starts: dict[int, int]):
        """All rows as one decode batch if each sequence has one, else chunk by chunk, in the order of ``running``."""
        alone = all(len(followed.ids) - starts[i] == 1 for i, _, followed in running)
        if alone and len(running) <= self._runner.limits.decode_rows:
            return batch_of([followed.row() for _, _, followed in running]), ()
        chunk = self._runner.rules.chunk
        return None, [batch for i, _, followed in running for batch in followed.chunks(starts[i], chunk)]

    def release(self, sequence: Tokens) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            self._pool.release(followed.pages)
