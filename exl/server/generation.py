"""From a request to the engine and back: every protocol's way to text, reasoning, tool calls, counts and times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exl.completion import Completion
from exl.engine.handle import Handle
from exl.engine.request import Outcome
from exl.engine.ticket import Event
from exl.parse.parts import AnswerParser, Part, Text
from exl.request_options import RequestOptions
from exl.server.errors import ApiError
from exl.server.served import ServedModel
from exl.server.state import Server
from exl.server.watch import Journey
from exl.text.logprobs import TokenLogprob

_CONSTRAINTS = frozenset({"json_schema", "regex", "grammar", "choices"})


@dataclass(frozen=True)
class Job:
    """What a protocol asks of the engine."""

    prompt: str | Sequence[int]
    options: RequestOptions
    # For each choice; None: its text is all text.
    make_parser: Callable[[], AnswerParser | None] | None = None


class Update(NamedTuple):
    """News of one choice."""

    choice: int
    parts: Sequence[Part]
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each of the tokens
    outcome: Outcome | None = None  # of the choice's last update
    is_whole: bool = True  # False in the last update: the answer has ended inside a tool call


@dataclass(frozen=True)
class Usage:
    """Counts and times of a request that has ended. Seconds."""

    num_prompt: int
    num_cached: int
    num_generated: int  # tokens of all choices
    num_reasoning: int  # of those, inside reasoning
    num_drafted: int
    num_accepted: int
    prompt_seconds: float
    decode_seconds: float

    def timings(self) -> dict[str, Any]:
        """As llama-server tells them (tools/server/README.md of ggml-org/llama.cpp)."""
        computed = self.num_prompt - self.num_cached
        found: dict[str, Any] = {"cache_n": self.num_cached}
        for name, count, seconds in (
            ("prompt", computed, self.prompt_seconds),
            ("predicted", self.num_generated, self.decode_seconds),
        ):
            found[f"{name}_n"] = count
            found[f"{name}_ms"] = seconds * 1e3
            found[f"{name}_per_token_ms"] = seconds * 1e3 / count if count else 0.0
            found[f"{name}_per_second"] = count / seconds if seconds else 0.0
        if self.num_drafted:
            found |= {"draft_n": self.num_drafted, "draft_n_accepted": self.num_accepted}
        return found


@dataclass
class Choice:
    """All of one answer."""

    parts: list[Part] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    outcome: Outcome | None = None
    is_whole: bool = True


class Generation:
    """One request under way, made by ``begin``. ``close`` ends it, if it has not ended."""

    def __init__(
        self, server: Server, model: ServedModel, job: Job, handle: Handle[Completion], journey: Journey
    ) -> None:
        self.model, self.journey = model, journey
        self._server, self._job, self._handle = server, job, handle
        self._parsers: dict[int, AnswerParser | None] = {}
        self._wants_logprobs = job.options.get("top_logprobs") is not None
        self._arrived: dict[int, float] = {}  # when each choice's last tokens came
        self._num_reasoning = 0

    @classmethod
    async def begin(cls, server: Server, model: ServedModel, job: Job, journey: Journey) -> Generation:
        """Raises ``ExlError`` for what is refused. Grammars are compiled and prompts encoded in a thread."""
        journey.model = model.name

        def submit() -> tuple[Handle[Completion], int]:
            ids = model.llm.encode(job.prompt)
            if server.options.log_prompts:
                journey.prompt = model.llm.tokenizer.decode(ids)
            return model.llm.submit(ids, **job.options), len(ids)

        handle, num_prompt = await server.in_thread(submit, slow=not _CONSTRAINTS.isdisjoint(job.options))
        journey.submitted, journey.num_prompt = time.perf_counter(), num_prompt
        return cls(server, model, job, handle, journey)

    @property
    def num_choices(self) -> int:
        return len(self._handle.answers)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Until all choices have ended. Leaving it cancels the request."""
        try:
            while (event := await self._handle.anext_event()) is not None:
                if event.token_ids:
                    self._count(event)
                yield self._update(event)
        finally:
            self.close()

    def close(self) -> None:
        """Cancels what still runs. May be called more than once."""
        self._handle.cancel()
        self._end(self.journey)

    async def choices(self) -> list[Choice]:
        """All answers, once they are whole."""
        found = [Choice() for _ in self._handle.answers]
        async for update in self.updates():
            choice = found[update.choice]
            choice.parts += update.parts
            choice.token_ids += update.token_ids
            if update.logprobs is not None:
                choice.logprobs = [*(choice.logprobs or ()), *update.logprobs]
            if update.outcome is not None:
                choice.outcome, choice.is_whole = update.outcome, update.is_whole
        return found

    def completion(self) -> Completion:
        """What the engine tells of the request, which has ended: choices ordered by best_of, prompt_logprobs, ..."""
        return self._handle.result()

    @property
    def usage(self) -> Usage:
        answers = self._handle.answers
        first = answers[0]
        last = max(answer.last for answer in answers)
        return Usage(
            num_prompt=self.journey.num_prompt,
            num_cached=first.num_reused,
            num_generated=sum(len(answer.token_ids) for answer in answers),
            num_reasoning=self._num_reasoning,
            num_drafted=sum(answer.num_drafted for answer in answers),
            num_accepted=sum(answer.num_accepted for answer in answers),
            prompt_seconds=max(0.0, first.first - first.began),
            decode_seconds=max(0.0, last - first.first),
        )

    def _update(self, event: Event) -> Update:
        if event.outcome is not None:
            _check_not_cut(event.outcome)
        choice, ids = event.choice, event.token_ids
        logprobs = None
        if self._wants_logprobs and event.ranked is not None:
            logprobs = tuple(TokenLogprob.of(ranked, self.model.llm.tokenizer) for ranked in event.ranked)
        parser = self._parser(choice)
        if parser is None:
            parts: Sequence[Part] = (Text(event.text),) if event.text else ()
            return Update(choice, parts, ids, logprobs, event.outcome)
        parts = parser.push(ids) if ids else []
        is_whole = True
        if event.outcome is not None:
            parts = [*parts, *parser.finish()]
            is_whole = parser.is_whole
        return Update(choice, parts, ids, logprobs, event.outcome, is_whole)

    def _parser(self, choice: int) -> AnswerParser | None:
        if choice not in self._parsers:
            make = self._job.make_parser
            self._parsers[choice] = None if make is None else make()
        return self._parsers[choice]

    def _count(self, event: Event) -> None:
        now, journey = time.perf_counter(), self.journey
        before = self._arrived.get(event.choice)
        self._arrived[event.choice] = journey.last = now
        if journey.first is None:
            journey.first = now
        if before is not None:
            for watch in self._server.watches:
                watch.token_gap(journey, now - before, len(event.token_ids))

    def _end(self, journey: Journey) -> None:
        """Tells what came of the request, as far as it came."""
        if journey.ended is not None:
            return
        usage, answers = self.usage, self._handle.answers
        journey.ended = time.perf_counter()
        journey.began = answers[0].began or None
        journey.num_cached, journey.num_generated = usage.num_cached, usage.num_generated
        journey.num_drafted, journey.num_accepted = usage.num_drafted, usage.num_accepted
        outcomes = [answer.outcome for answer in answers]
        journey.finish_reasons = tuple("cancelled" if one is None else one.finish_reason for one in outcomes)
        for watch in self._server.watches:
            watch.generated(journey)


async def run_together(works: Sequence[Any]) -> list[Any]:
    """Results of coroutines that run at once; the first error cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _check_not_cut(outcome: Outcome) -> None:
    """Who has asked has not cancelled, or nobody would read this: the server ends, or its model is unloaded."""
    if outcome.finish_reason == "cancelled" and outcome.limit is None:
        raise ApiError(503, "the server ended this answer before it was whole", code="cut_off")
