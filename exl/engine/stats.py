"""What the engine is doing and has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl.cache.page_pool import PagePool
    from exl.engine.scheduler import Scheduler
    from exl.engine.seat import Seat
    from exl.weights.reader import StreamStats


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of ``LLM.stats()``: what is now, then counts since the model was loaded. While the engine runs,
    numbers may be a step apart from each other."""

    running: int  # sequences: one for each choice of a request, with guidance two; in a beam search one for each beam
    waiting: int  # sequences that have not begun or were paused, and requests that have just come
    pages_total: int  # of the cache
    pages_free: int  # free at once, or kept and given away when others need them
    pages_kept: int  # of those, pages whose text is known: a prompt that begins like it reuses them

    steps: int
    prompt_tokens: int  # computed, of prompts
    generated_tokens: int
    preemptions: int  # sequences that were paused, since pages had run out
    recomputed_tokens: int  # computed again after a pause
    prefix_lookups: int
    prefix_hits: int  # lookups that found at least one token
    prefix_tokens: int  # that were reused
    drafts_tried: int
    drafts_accepted: int
    read_bytes: int = 0  # of streamed layers, from the disk
    read_wait_seconds: float = 0.0  # that steps waited for them
    window_pages_total: int = 0  # of layers that have a window, where they have pages of their own
    window_pages_free: int = 0

    @property
    def cache_used(self) -> float:
        """The share of pages that running sequences hold; of two kinds of pages the fuller one's, for which new
        sequences wait."""
        kinds = (self.pages_total, self.pages_free), (self.window_pages_total, self.window_pages_free)
        return max(1 - free / total if total else 0.0 for total, free in kinds)

    @classmethod
    def of(cls, seat: Seat, scheduler: Scheduler, pool: PagePool, read: StreamStats) -> EngineStats:
        """From any thread; waits for nobody."""
        done, known = scheduler.stats, pool.stats
        arriving = sum(not ticket.sequences for ticket in seat.unfinished)
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + arriving,
            pages_total=pool.num_usable,
            pages_free=pool.num_free,
            pages_kept=pool.num_kept,
            steps=done.steps,
            prompt_tokens=done.prompt_tokens,
            generated_tokens=done.generated_tokens,
            preemptions=done.preemptions,
            recomputed_tokens=done.recomputed_tokens,
            prefix_lookups=known.lookups,
            prefix_hits=known.hits,
            prefix_tokens=known.tokens_reused,
            drafts_tried=done.drafts_tried,
            drafts_accepted=done.drafts_accepted,
            read_bytes=read.bytes_read,
            read_wait_seconds=read.wait_seconds,
            window_pages_total=0 if pool.windows is None else pool.windows.num_usable,
            window_pages_free=0 if pool.windows is None else pool.windows.num_free,
        )
