"""From a request to the engine and back: every protocol's way to text, reasoning, tool calls, counts and times."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exl.completion import Completion
from exl.engine.handle import Handle
from exl.engine.request import Outcome
from exl.engine.ticket import Event
from exl.parse.parts import AnswerParser, Part, Reasoning, Text, ToolCallArguments
from exl.request_options import CONSTRAINTS, RequestOptions
from exl.server.errors import ApiError
from exl.server.served import ServedModel
from exl.server.state import Server
from exl.server.watch import Journey
from exl.text.logprobs import TokenLogprob


@dataclass(frozen=True)
class Job:
    """What a protocol asks of the engine."""

    prompt: Sequence[int]  # token ids
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


class _Reader:
    """Reads one choice's tokens, and counts those of its reasoning."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._num_undecided = 0  # tokens that no part has come of yet
        self.num_reasoning = 0

    def read(self, token_ids: Sequence[int], is_last: bool) -> list[Part]:
        parts: list[Part] = []
        for token_id in token_ids:
            self._num_undecided += 1
            self._decide(parts, self._parser.push((token_id,)))
        if is_last:
            self._decide(parts, self._parser.finish())
        return parts

    @property
    def is_whole(self) -> bool:
        return self._parser.is_whole

    def _decide(self, parts: list[Part], found: list[Part]) -> None:
        """A token counts as what came first of it and of the silent ones before it: tags, halves of characters."""
        if not found:
            return
        if isinstance(found[0], Reasoning):
            self.num_reasoning += self._num_undecided
        self._num_undecided = 0
        for part in found:
            parts[-1:] = _joined(parts[-1], part) if parts else (part,)


def _joined(before: Part, part: Part) -> tuple[Part, ...]:
    """One part instead of two of a kind: what comes together is told together."""
    if isinstance(part, Text) and isinstance(before, Text):
        return (Text(before.text + part.text),)
    if isinstance(part, Reasoning) and isinstance(before, Reasoning):
        return (Reasoning(before.text + part.text),)
    if isinstance(part, ToolCallArguments) and isinstance(before, ToolCallArguments) and part.index == before.index:
        return (ToolCallArguments(part.index, before.text + part.text),)
    return (before, part)


class Generation:
    """One request under way, made by ``begin``. ``close`` ends it, if it has not ended."""

    def __init__(
        self,
        server: Server,
        model: ServedModel,
        job: Job,
        handle: Handle[Completion],
        journey: Journey,
    ) -> None:
        self.model, self.journey, self.prompt_ids = model, journey, job.prompt
        self._server, self._job, self._handle = server, job, handle
        self._readers: dict[int, _Reader | None] = {}
        self._wants_logprobs = job.options.get("top_logprobs") is not None
        self._arrived: dict[int, float] = {}  # when each choice's last tokens came

    @classmethod
    async def begin(cls, server: Server, model: ServedModel, job: Job, journey: Journey) -> Generation:
        """Raises ``ExlError`` for what is refused. Grammars are compiled in a thread. Of several
        generations for one HTTP request, which begin one after the other, each but the first has a journey of its
        own, so that whoever looks on hears of each."""
        if journey.submitted is not None:
            journey = Journey(journey.request_id, journey.route, arrived=journey.arrived)
        journey.model = model.name

        def submit() -> Handle[Completion]:
            if server.options.log_prompts:
                journey.prompt = model.llm.tokenizer.decode(job.prompt)
            journey.submitted, journey.num_prompt = time.perf_counter(), len(job.prompt)  # before: it may begin at once
            return model.llm.submit(job.prompt, **job.options, lora=model.adapter)

        handle = await server.in_thread(submit, slow=any(name in job.options for name in CONSTRAINTS))
        return cls(server, model, job, handle, journey)

    @property
    def num_choices(self) -> int:
        return len(self._handle.answers)

    @property
    def seed(self) -> int:
        """Of the first choice."""
        return self._handle.answers[0].seed

    def is_ending(self, choice: int) -> bool:
        """Whether a choice has come to its end, though its last update is yet to come."""
        return self._handle.answers[choice].outcome is not None

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Until all choices have ended. Leaving it cancels the request. Events that have come together, as those of
        several tokens of a step, or of a loop that is late, are one update of each choice."""
        try:
            while (event := await self._handle.anext_event()) is not None:
                for joined in self._with_ready(event):
                    if joined.token_ids:
                        self._count(joined)
                    yield self._update(joined)
        finally:
            self.close()

    def _with_ready(self, event: Event) -> Collection[Event]:
        """An event and those that wait behind it, one for each choice."""
        more = self._handle.ready_event()
        if more is None:
            return (event,)
        found = {event.choice: event}
        while more is not None:
            before = found.get(more.choice)
            found[more.choice] = more if before is None else _merged(before, more)
            more = self._handle.ready_event()
        return found.values()

    def close(self) -> None:
        """Cancels what still runs. May be called more than once."""
        self._handle.cancel()
        self._end()

    async def choices(self) -> list[Choice]:
        """All answers, once they are whole; with ``best_of`` the best ones, those first."""
        found = [Choice() for _ in self._handle.answers]
        async for update in self.updates():
            choice = found[update.choice]
            choice.parts += update.parts
            choice.token_ids += update.token_ids
            if update.logprobs is not None:
                choice.logprobs = [*(choice.logprobs or ()), *update.logprobs]
            if update.outcome is not None:
                choice.outcome, choice.is_whole = update.outcome, update.is_whole
        if self._job.options.get("best_of") is None:
            return found
        kept = self.completion()
        by_seed = {answer.seed: choice for answer, choice in zip(self._handle.answers, found, strict=True)}
        return [by_seed[one.seed] for one in kept.choices or (kept,)]

    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """Of each token of the prompt, None for the first; None unless they were asked for. All are there once the
        first token of the answer is, or its end."""
        ranked = self._handle.answers[0].prompt_ranked
        tokenizer = self.model.llm.tokenizer
        if ranked is None:
            return None
        return [None if one is None else TokenLogprob.of(one, tokenizer) for one in ranked]

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
            num_reasoning=sum(0 if one is None else one.num_reasoning for one in self._readers.values()),
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
        reader = self._reader(choice)
        if reader is None:
            parts: Sequence[Part] = (Text(event.text),) if event.text else ()
            return Update(choice, parts, ids, logprobs, event.outcome)
        is_last = event.outcome is not None
        parts = reader.read(ids, is_last)
        return Update(choice, parts, ids, logprobs, event.outcome, not is_last or reader.is_whole)

    def _reader(self, choice: int) -> _Reader | None:
        if choice not in self._readers:
            make = self._job.make_parser
            parser = None if make is None else make()
            self._readers[choice] = None if parser is None else _Reader(parser)
        return self._readers[choice]

    def _count(self, event: Event) -> None:
        now, journey = time.perf_counter(), self.journey
        before = self._arrived.get(event.choice)
        self._arrived[event.choice] = journey.last = now
        if journey.first is None:
            journey.first = now
        if before is not None:
            for watch in self._server.watches:
                watch.token_gap(journey, now - before, len(event.token_ids))

    def _end(self) -> None:
        """Tells what came of the request, as far as it came."""
        journey = self.journey
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


def _merged(event: Event, more: Event) -> Event:
    """Of one choice."""
    ranked = None if event.ranked is None and more.ranked is None else (*(event.ranked or ()), *(more.ranked or ()))
    text, token_ids = event.text + more.text, event.token_ids + more.token_ids
    return Event(event.choice, text, token_ids, ranked, more.outcome or event.outcome)


def total(usages: Sequence[Usage]) -> Usage:
    """Of several generations for one request. Their seconds are added: what the engine spent, not what passed."""
    return Usage(*(sum(values) for values in zip(*map(dataclasses.astuple, usages), strict=True)))


async def together(updates: Sequence[AsyncGenerator[Update, None]]) -> AsyncGenerator[tuple[int, Update], None]:
    """Updates of several generations, each with the place of its own, as they come. Leaving it ends all."""
    if len(updates) == 1:
        async for update in updates[0]:
            yield 0, update
        return
    queue: asyncio.Queue[tuple[int, Update] | BaseException | None] = asyncio.Queue()

    async def take(place: int) -> None:
        try:
            async for update in updates[place]:
                queue.put_nowait((place, update))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(take(place)) for place in range(len(updates))]
    try:
        for _ in updates:
            while (found := await queue.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
