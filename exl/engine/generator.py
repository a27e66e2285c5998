"""Token ids in, token ids out: requests to the engine below any text; and one sequence by hand, for measurements."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from exl.batch import MAX_STEP_TOKENS, PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.engine.admission import Pages
from exl.engine.answers import Answers
from exl.engine.drafts import Drafts
from exl.engine.grouped_pages import GroupedPages
from exl.engine.handle import Handle
from exl.engine.manual import ManualSequence
from exl.engine.prompt_lookup import PromptLookup
from exl.engine.request import Reuse, TokenRequest
from exl.engine.runner import Runner
from exl.engine.scheduler import Scheduler
from exl.engine.seat import Seat
from exl.engine.stats import EngineStats
from exl.engine.ticket import Answer, Ticket
from exl.errors import ConfigError
from exl.forks import ForkGuard
from exl.ops.rope import depends_on_length, longest_alike
from exl.philox import child_seed
from exl.request_options import PromptProgress
from exl.sampling_params import SamplingParams


class GeneratedToken(NamedTuple):
    token_id: int
    finish_reason: str | None  # "stop": an end-of-sequence id; "length": max_tokens or the context is used up
    num_reused: int = 0  # tokens of the prompt that were in the cache
    ranked: tuple[tuple[int, float], ...] | None = None  # (id, logprob) of the token, then of the likeliest


class Generator:
    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        context: int,
        eos_ids: Sequence[int],
        max_queue: int | None = None,
        *,
        window: int | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        """``max_queue``: how many requests may wait to begin; None: any number. ``window``: of all layers, if a
        sequence gives back the pages that it does not reach; then ``pool`` has a null page. With ``pool.windows`` the
        layers that have a window have pages of their own. ``adapters``: names, by number."""
        self.runner, self.pool, self.context = runner, pool, context
        self.guard = ForkGuard(on_gpu=runner.decoder.ops.backend is not None)
        # Where pages are given back, the cache limits no text.
        num_pages = pool.num_usable if window is None else -(-context // PAGE_SIZE) + 1
        pages = self._pages(window)
        self.answers = Answers(
            *(context, runner.vocab_size, num_pages, PAGE_SIZE, runner.max_sequences),
            group_pages=pool.num_usable,
            fits_together=pages.fits_together if isinstance(pages, GroupedPages) else None,
        )
        self.eos_ids = frozenset(eos_ids)
        self._windowed = window is not None
        self.adapters = tuple(adapters)
        drafts = Drafts({"prompt": PromptLookup()}, runner.limits.decode_rows, MAX_STEP_TOKENS - 1)
        self.scheduler = Scheduler(runner, pages, self.answers, drafts)
        self.seat = Seat(self.scheduler, self.guard, self._enter_thread, max_queue)

    def _pages(self, window: int | None) -> Pages:
        runner, pool = self.runner, self.pool
        if pool.windows is not None:
            copies = runner.copy_pages, runner.copy_windows
            return GroupedPages(pool, pool.windows, runner.rules, *copies, self._reusable, runner.step_tokens)
        return Pages(
            pool, runner.rules, runner.copy_pages, self._reusable, window, runner.step_tokens, runner.turn_pages
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.answers.eos_ids

    @eos_ids.setter
    def eos_ids(self, ids: frozenset[int]) -> None:
        self.answers.eos_ids = ids

    def _enter_thread(self) -> None:
        device = self.runner.decoder.ops.device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def _reusable(self, num_tokens: int) -> bool:
        """In long texts some kinds of RoPE depend on the length of the whole text: K of a prefix differs."""
        longest = map(longest_alike, self.runner.decoder.config.ropes)
        return all(length is None or num_tokens <= length for length in longest)

    def stats(self) -> EngineStats:
        """From any thread; waits for nobody."""
        return EngineStats.of(self.seat, self.scheduler, self.pool, self.runner.weights.stats)

    # ---- requests

    def submit(
        self,
        request: TokenRequest,
        finish: Callable[[list[Answer]], object] = list,
        *,
        inline: bool = False,
    ) -> Handle:
        """Begins a request. ``inline``: the calling thread will wait for it, and may drive. Raises ``ConfigError`` for
        a prompt that is empty, foreign or too long."""
        if request.shift_keep is not None:
            self._check_shift()
        self.answers.check(request)
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=secrets.randbits(63)))
        seed, ranked = request.params.seed, request.top_logprobs is not None
        answers = [Answer(i, child_seed(seed, i), ranked=[] if ranked else None) for i in range(request.num_choices)]
        ticket = Ticket(request, answers, threading.get_ident() if inline else None, self.adapter_number(request.lora))
        handle = Handle(self.seat, ticket, finish)
        self.seat.submit(ticket)
        return handle

    def adapter_number(self, name: str | None) -> int:
        """-1: none. Raises ``ConfigError`` for a name that no adapter has."""
        if name is None:
            return -1
        if name not in self.adapters:
            has = ", ".join(map(repr, self.adapters)) or "none: it was loaded without lora="
            raise ConfigError(f"lora: found {name!r}, the model has {has}")
        return self.adapters.index(name)

    def _check_shift(self) -> None:
        """Raises ``ConfigError`` for a model whose texts cannot go on beyond the context."""
        if kinds := [rope.kind for rope in self.runner.decoder.config.ropes if depends_on_length(rope)]:
            raise ConfigError(
                f"overflow: found 'shift' with RoPE of the kind {kinds[0]!r}, whose angles depend on the length of the "
                "text: expected 'stop'"
            )
        if self._windowed:
            raise ConfigError(
                "overflow: found 'shift', but all layers of this model have a sliding window, so that a longer context "
                "takes no more memory: expected 'stop' and a larger context"
            )
        if self.pool.windows is not None:
            raise ConfigError(
                "overflow: found 'shift', but this model's layers with a sliding window have pages of their own: "
                "expected 'stop', or the model loaded with window_cache=False"
            )

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse_prefix: Reuse = False,
        top_logprobs: int | None = None,
        prompt_progress: Callable[[PromptProgress], None] | None = None,
        lora: str | None = None,
    ) -> Iterator[GeneratedToken]:
        """Yields tokens as they are made; the last one carries the reason to stop."""
        request = TokenRequest(prompt_ids, params, reuse_prefix, top_logprobs, prompt_progress, lora=lora)
        count = 0
        with contextlib.closing(self.submit(request, inline=True)) as handle:
            (answer,) = handle.answers
            for event in handle.events():
                for i, token_id in enumerate(event.token_ids):
                    count += 1
                    last = answer.outcome is not None and count == len(answer.token_ids)
                    reason = answer.outcome.finish_reason if last and answer.outcome.stop_reason is None else None
                    ranked = None if event.ranked is None else event.ranked[i]
                    yield GeneratedToken(token_id, reason, answer.num_reused, ranked)
            if isinstance(answer.outcome.stop_reason, int):
                yield GeneratedToken(answer.outcome.stop_reason, "stop", answer.num_reused)

    def logits(self, ids: Sequence[int], lora: str | None = None) -> Iterator[torch.Tensor]:
        """Logits of every position, f32 [n, V] on the host, per chunk."""
        request = TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, wants_all=True, lora=lora)
        with contextlib.closing(self.submit(request, inline=True)) as handle:
            for event in handle.events():
                if event.logits is not None:
                    yield event.logits

    # ---- one sequence by hand

    def begin(self, num_tokens: int, lora: str | None = None) -> ManualSequence:
        """Pages for ``num_tokens`` tokens. While it lasts, nothing else may be asked of the engine. Raises
        ``MemoryBudgetError``."""
        self.guard.begin()
        try:
            with contextlib.ExitStack() as on_failure:
                number = self.adapter_number(lora)
                count, windows = -(-num_tokens // PAGE_SIZE), self.pool.windows
                pages = self.pool.allocate(count)
                on_failure.callback(self.pool.release, pages)
                # In turn: when one comes again, no window reaches what it had.
                own = [] if windows is None else windows.allocate(min(count, windows.num_usable))
                on_failure.pop_all()
        except BaseException:
            self.guard.end()
            raise
        return ManualSequence(pages, [own[i % len(own)] for i in range(count)] if own else [], lora=number)

    def extend(self, sequence: ManualSequence, ids: Sequence[int]) -> torch.Tensor:
        """Runs new tokens of a sequence, a prompt's or single ones; logits after the last one, f32 [1, V], valid until
        the next call."""
        self.guard.check()
        start, rules = len(sequence.ids), self.runner.rules
        sequence.ids += ids
        chunks = sequence.chunks(start, rules.chunk, as_decode=len(ids) <= rules.max_decode_prompt)
        try:
            return self.runner.step(None, chunks)
        except BaseException:
            del sequence.ids[start:]
            raise

    def end(self, sequence: ManualSequence) -> None:
        """Gives the pages back."""
        self.pool.release(sequence.pages)
        if self.pool.windows is not None:
            self.pool.windows.release(list(dict.fromkeys(sequence.window_pages)))
        sequence.pages, sequence.window_pages = [], []
        self.guard.end()
