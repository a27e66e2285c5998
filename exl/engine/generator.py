"""Token ids in, token ids out: one sequence at a time over pages of the cache. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from exl.batch import PAGE_SIZE, ForwardBatch
from exl.cache.page_pool import PagePool
from exl.engine.draws import DrawState, sampling_batch
from exl.engine.runner import Runner
from exl.errors import ConfigError, MemoryBudgetError
from exl.forks import ForkGuard
from exl.ops.base import Samples
from exl.ops.rope import depends_on_length
from exl.request_options import PromptProgress
from exl.sampling import no_distribution
from exl.sampling_params import SamplingParams


@dataclass(frozen=True)
class GeneratedToken:
    token_id: int
    finish_reason: str | None  # "stop": an end-of-sequence id; "length": max_tokens or the context is used up
    num_reused: int = 0  # tokens of the prompt that were in the cache
    ranked: tuple[tuple[int, float], ...] | None = None  # (id, logprob) of the token, then of the likeliest


@dataclass
class CachedSequence:
    """A sequence's list of pages, and the tokens whose K and V they hold."""

    pages: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_reused: int = 0  # tokens that were in the cache when it began

    @property
    def num_cached(self) -> int:
        return len(self.token_ids)


class Generator:
    def __init__(
        self, runner: Runner, pool: PagePool, context: int, eos_ids: Sequence[int], max_decode_prompt: int = 1
    ) -> None:
        """``max_decode_prompt``: prompts up to this length run as decode rows, whose kernels are faster there."""
        self.runner, self.pool, self.context = runner, pool, context
        self.eos_ids = frozenset(eos_ids)
        self.max_decode_prompt = max_decode_prompt
        self.guard = ForkGuard(on_gpu=runner.decoder.ops.backend is not None)

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse_prefix: bool = False,
        top_logprobs: int | None = None,
        prompt_progress: Callable[[PromptProgress], None] | None = None,
    ) -> Iterator[GeneratedToken]:
        """Yields tokens as they are made; the last one carries the reason to stop.

        ``top_logprobs``: tokens come with their log-probability and those of this many likeliest, as in ``ranked``:
        natural logarithms of the softmax of the plain logits, without penalty, temperature and filters.
        ``prompt_progress`` is called after each layer of a prefill window.

        ``reuse_prefix`` takes the part of the prompt that is in the cache instead of computing it again. Through
        the CPU's own kernels the results are the same; else equal up to rounding, not bit for bit: the cached rows were
        computed in other chunks.

        All pages that the request can need are reserved first, so that it cannot run out of memory once it has begun.
        Closing the iterator frees them. Raises ``ConfigError`` for a prompt that is empty, foreign or too long.
        """
        self._check_ids(prompt_ids)
        num_new = min(params.max_tokens, self.context - len(prompt_ids))
        if num_new == 0:
            return
        # The last token is returned and never cached; the prompt's last one is always computed, for its logits.
        reused = prompt_ids[:-1] if reuse_prefix and self._reusable(len(prompt_ids) + num_new) else ()
        sequence = self.begin(len(prompt_ids) + num_new - 1, reused)
        try:
            logits = self.extend(sequence, prompt_ids[sequence.num_cached :], prompt_progress)
            yield from self._generate(sequence, prompt_ids, params, num_new, top_logprobs, logits)
        finally:
            self.end(sequence)

    def _generate(
        self,
        sequence: CachedSequence,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        num_new: int,
        top_logprobs: int | None,
        logits: torch.Tensor,
    ) -> Iterator[GeneratedToken]:
        """``logits``: after the prompt. On a device that runs ahead, step n + 1 is launched before the host reads token
        n: the device takes it from its own samples and never waits for the host."""
        ops = self.runner.decoder.ops
        ahead = ops.runs_ahead and top_logprobs is None
        vocab_size, num_logprobs = logits.shape[1], -1 if top_logprobs is None else top_logprobs
        state = DrawState(params, prompt_ids, self.eos_ids, vocab_size)
        ends = self.eos_ids | set(params.stop_token_ids)
        drawn: Samples | None = None  # of the previous step, not read yet
        token_id: int | None = None  # its token, once it has been read
        for step in range(num_new):
            if step > 0 and ahead:
                logits = self._forward(sequence, (-1,))
                token_id, _ = self._read(drawn, state)
                sequence.token_ids.append(token_id)
            elif step > 0:
                logits = self.extend(sequence, (token_id,))
            if ahead and token_id in ends:
                yield GeneratedToken(token_id, "stop", sequence.num_reused)
                return
            drawn = ops.sample(logits, sampling_batch([state.row(0, num_logprobs=num_logprobs)], vocab_size))
            if ahead:
                if token_id is not None:
                    yield GeneratedToken(token_id, None, sequence.num_reused)
                continue
            token_id, ranked = self._read(drawn, state)
            reason = "stop" if token_id in ends else "length" if step == num_new - 1 else None
            yield GeneratedToken(token_id, reason, sequence.num_reused, ranked)
            if reason == "stop":
                return
        if ahead:
            token_id, _ = self._read(drawn, state)
            yield GeneratedToken(token_id, "stop" if token_id in ends else "length", sequence.num_reused)

    def _read(self, drawn: Samples, state: DrawState) -> tuple[int, tuple[tuple[int, float], ...] | None]:
        self.guard.check()
        rows = drawn.read()
        token_id = rows.ids[0]
        if token_id < 0:
            raise no_distribution(token_id)
        state.accept(token_id, rows.surprise[0])
        return token_id, rows.ranked[0]

    def logits(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits of every position, f32 [n, V] per chunk; each chunk is valid until the next is asked for."""
        self._check_ids(ids)
        sequence = self.begin(len(ids))
        try:
            for chunk in self.runner.forward(self._batches(sequence, ids, every=True)):
                yield chunk
                self.guard.check()
        finally:
            self.end(sequence)

    def begin(self, num_tokens: int, known_ids: Sequence[int] = ()) -> CachedSequence:
        """Reserves pages for ``num_tokens`` tokens, including the prefix of ``known_ids`` that the cache has.

        Raises ``MemoryBudgetError`` if there are not enough pages.
        """
        self.guard.begin()
        match = self.pool.find(known_ids)
        num_pages = -(-num_tokens // PAGE_SIZE)
        pages, num_reused = list(match.pages), match.num_tokens
        held = list(match.pages)
        try:
            if match.copy_from is not None:
                held.append(match.copy_from)
                if num_pages - len(pages) <= self.pool.num_free:
                    pages += self.pool.allocate(num_pages - len(pages))
                    self.runner.decoder.ops.fence()  # a late thread of the last step may still write to its page
                    self.runner.kv.copy_pages([match.copy_from], [pages[len(match.pages)]])
                    self.pool.release([match.copy_from])
                # The page to copy from is the one that lacks: it is written in place, or left to its other holders.
                elif self.pool.claim(match.copy_from):
                    pages.append(match.copy_from)
                else:
                    self.pool.release([held.pop()])
                    num_reused = len(pages) * PAGE_SIZE
            pages += self.pool.allocate(num_pages - len(pages))
        except MemoryBudgetError:
            self.pool.release(held)
            self.guard.end()
            raise
        return CachedSequence(pages, list(known_ids[:num_reused]), num_reused)

    def extend(
        self, sequence: CachedSequence, ids: Sequence[int], progress: Callable[[PromptProgress], None] | None = None
    ) -> torch.Tensor:
        """Runs new tokens of a sequence; logits after the last one, f32 [1, V], valid until the next call."""
        logits = self._forward(sequence, ids, progress)
        sequence.token_ids.extend(ids)  # only now: an interrupted run must not be found as a prefix
        return logits

    def _forward(
        self, sequence: CachedSequence, ids: Sequence[int], progress: Callable[[PromptProgress], None] | None = None
    ) -> torch.Tensor:
        self.guard.check()
        logits = None
        for logits in self.runner.forward(self._batches(sequence, ids, every=False), progress):  # noqa: B007
            pass
        return logits

    def end(self, sequence: CachedSequence) -> None:
        """Releases the pages; a later prompt can reuse them until they are evicted."""
        if self._reusable(sequence.num_cached):
            self.pool.remember(sequence.token_ids, sequence.pages)
        self.pool.release(sequence.pages)
        sequence.pages = []
        self.guard.end()

    def _reusable(self, num_tokens: int) -> bool:
        """Beyond the model's maximum, "dynamic" RoPE depends on the length of the whole text: K of a prefix differs."""
        rope = self.runner.decoder.config.rope
        return not depends_on_length(rope) or num_tokens <= rope.max_position

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab_size = self.runner.limits.vocab_size
        if not ids:
            raise ConfigError("prompt: found no tokens, expected at least one")
        if len(ids) > self.context:
            raise ConfigError(f"prompt: found {len(ids)} tokens, the context holds {self.context}")
        for token_id in ids:
            if not isinstance(token_id, int | np.integer) or not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"prompt: found token id {token_id!r}, expected an integer from 0 to {vocab_size - 1}"
                )

    def _batches(self, sequence: CachedSequence, ids: Sequence[int], *, every: bool) -> list[ForwardBatch]:
        """Cuts new tokens into chunks. Logits of every token, or only of the last."""
        limits = self.runner.limits
        chunk = min(limits.max_rows, limits.max_logit_rows) if every else limits.max_rows
        pages = np.asarray(sequence.pages, dtype=np.int32)
        total = sequence.num_cached + len(ids)
        as_decode = not every and len(ids) <= self.max_decode_prompt
        batches = []
        for start in range(0, len(ids), chunk):
            part = np.asarray(ids[start : start + chunk], dtype=np.int32)
            n = len(part)
            cached = sequence.num_cached + start
            positions = np.arange(cached, cached + n, dtype=np.int32)
            last = cached + n == total
            batches.append(
                ForwardBatch(
                    token_ids=part,
                    positions=positions,
                    slots=pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
                    query_start=np.array([0, n], dtype=np.int32),
                    context_len=np.array([cached + n], dtype=np.int32),
                    rope_len=np.array([total], dtype=np.int32),
                    page_table=pages[None],
                    logit_rows=np.arange(0 if every else n - last, n, dtype=np.int32),
                    num_decode_rows=n if as_decode else 0,
                )
            )
        return batches
