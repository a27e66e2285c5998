"""From drawn tokens to what callers get: what ends a sequence, its text, its events."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import SampleRows
from exl.engine.draws import DrawRow, DrawState
from exl.engine.request import Outcome, TokenRequest
from exl.engine.sequence import Sequence
from exl.engine.shift import MAX_POSITIONS, Shift
from exl.engine.ticket import Event, Ticket
from exl.errors import ConfigError, ExlError, MemoryBudgetError
from exl.text.sink import Rewind

MAX_REWINDS = 32  # at one position, before a request that bans strings is given up


class Answers:
    """Of all requests to one model."""

    def __init__(self, context: int, vocab_size: int, num_pages: int, page_size: int) -> None:
        self.context, self.vocab_size = context, vocab_size
        self.eos_ids: frozenset[int] = frozenset()
        self._most_tokens = num_pages * page_size
        self._num_words = -(-vocab_size // 32)  # of a mask

    # ---- before anything runs

    def check(self, request: TokenRequest) -> None:
        """Raises ``ConfigError`` for a prompt that is empty, foreign or too long; ``MemoryBudgetError`` for one
        for which even an empty cache has no room."""
        ids = request.prompt_ids
        if not len(ids):
            raise ConfigError("prompt: found no tokens, expected at least one")
        if len(ids) > self.context:
            raise ConfigError(f"prompt: found {len(ids)} tokens, the context holds {self.context}")
        for token_id in ids:
            if not isinstance(token_id, int | np.integer) or not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"prompt: found token id {token_id!r}, expected an integer from 0 to {self.vocab_size - 1}"
                )
        if request.shift_keep is not None:
            most = Shift.of(request.shift_keep, self.context).num_tokens
            if len(ids) > most:
                raise ConfigError(
                    f"prompt: found {len(ids)} tokens; with overflow='shift' and shift_keep={request.shift_keep} a "
                    f"context of {self.context} holds {most} and copies of the first ones"
                )
        if len(ids) + (not request.wants_all) > self._most_tokens:
            raise MemoryBudgetError(
                f"prompt: found {len(ids)} tokens, the cache has room for {self._most_tokens}: load the model with "
                f"cache_tokens={len(ids) + 1} or more"
            )

    def sequences(self, ticket: Ticket, arrival: int) -> list[Sequence]:
        """One for each choice."""
        request = ticket.request
        ids = [int(token_id) for token_id in request.prompt_ids]
        if request.wants_all:
            sequence = Sequence(
                ticket, ticket.answers[0], ids, len(ids), 1, None, None, None, (arrival, 0), wants_all=True
            )
            ticket.sequences.append(sequence)
            return ticket.sequences
        shift = None if request.shift_keep is None else Shift.of(request.shift_keep, self.context)
        longest = min(self.context, self._most_tokens) if shift is None else MAX_POSITIONS
        max_new = min(request.params.max_tokens, longest - len(ids))
        stop_ids = self.eos_ids.union(request.params.stop_token_ids)
        draws = DrawState(request.params, ids, self.eos_ids, self.vocab_size, request.dry_breakers)
        made: list[Sequence] = []
        for answer in ticket.answers:
            sequence = Sequence(
                ticket=ticket,
                answer=answer,
                ids=list(ids),
                num_prompt=len(ids),
                max_new=max(0, max_new),
                draws=draws if answer.choice == 0 else draws.copy(answer.seed),
                sink=None if request.make_sink is None else request.make_sink(),
                matcher=None if request.make_matcher is None else request.make_matcher(),
                arrival=(arrival, answer.choice),
                stop_ids=stop_ids,
                shift=shift,
            )
            made.append(sequence)
        ticket.sequences += made
        return made

    # ---- while it runs

    def draw(self, sequence: Sequence, logits_row: int, drafts: tuple[int, ...] = ()) -> list[DrawRow]:
        """How the next tokens are to be drawn: the next one, and those after each draft, from the rows that follow.
        Fewer of them if a constraint forbids a draft."""
        matcher, top = sequence.matcher, sequence.ticket.request.top_logprobs
        if matcher is None and not drafts:
            return [sequence.draws.row(logits_row, num_logprobs=-1 if top is None else top)]
        masks: list[NDArray[np.uint32] | None] = [None] * (1 + len(drafts))
        if matcher is not None and drafts:
            words = np.zeros((1 + len(drafts), self._num_words), np.uint32)
            drafts = drafts[: matcher.masks_ahead(drafts, words)]
            masks = list(words)
        elif matcher is not None:
            words = np.zeros(self._num_words, np.uint32)
            masks = [words if matcher.mask(words) else None]
        return [
            sequence.draws.row(logits_row + j, masks[j], drafts[:j], num_logprobs=-1 if top is None else top)
            for j in range(1 + len(drafts))
        ]

    def take(self, sequence: Sequence, rows: SampleRows, i: int) -> bool:
        """Takes draw i of a sequence. Returns whether it has ended. A banned string may have taken tokens back: then
        the sequence is shorter than before."""
        token_id, answer = rows.ids[i], sequence.answer
        answer.last = time.perf_counter()
        if answer.first == 0.0:
            answer.first = answer.last
        sequence.ids.append(token_id)
        if token_id in sequence.stop_ids:
            answer.outcome = Outcome("stop", token_id)
            return True
        sequence.draws.accept(token_id, rows.surprise[i])
        if sequence.matcher is not None:
            sequence.matcher.consume(token_id)
        answer.token_ids.append(token_id)
        if rows.ranked[i] is not None:
            answer.ranked.append(rows.ranked[i])
        text, num_final = "", len(answer.token_ids)
        if sequence.sink is not None:
            verdict = sequence.sink.push(token_id)
            if verdict.rewind is not None:
                self._take_back(sequence, verdict.rewind)
                return False
            text, num_final = verdict.text, sequence.sink.num_final_tokens
            if verdict.stopped is not None:
                answer.outcome = Outcome("stop", verdict.stopped)
        if answer.outcome is None and sequence.matcher is not None and sequence.matcher.is_finished:
            answer.outcome = Outcome("stop", "grammar")
        if answer.outcome is None and len(answer.token_ids) >= sequence.max_new:
            answer.outcome = self._length(sequence)
        self._tell(sequence, text, len(answer.token_ids) if answer.outcome is not None else num_final)
        return answer.outcome is not None

    def _take_back(self, sequence: Sequence, rewind: Rewind) -> None:
        """Tokens of a banned string: another one is drawn in the place of the first of them."""
        answer, position = sequence.answer, len(sequence.ids) - rewind.num_tokens
        sequence.rewinds[position] = sequence.rewinds.get(position, 0) + 1
        if sequence.rewinds[position] > MAX_REWINDS:
            raise ExlError(
                f"banned_strings: {MAX_REWINDS} ways to go on after {position - sequence.num_prompt} tokens were "
                "tried, and each one came to a banned string"
            )
        del sequence.ids[position:]
        num_kept = position - sequence.num_prompt
        del answer.token_ids[num_kept:]
        if answer.ranked is not None:
            del answer.ranked[num_kept:]
        sequence.draws.truncate(num_kept)
        sequence.draws.block(rewind.blocked)
        if sequence.matcher is not None:
            sequence.matcher.rollback(rewind.num_tokens)

    def _tell(self, sequence: Sequence, text: str, num_tokens: int) -> None:
        """An event with a text and the tokens up to ``num_tokens`` that no event has told of."""
        answer = sequence.answer
        if text:
            answer.pieces.append(text)
        new = slice(answer.num_told, num_tokens)
        answer.num_told = num_tokens
        token_ids = tuple(answer.token_ids[new])
        if text or token_ids:
            ranked = None if answer.ranked is None else tuple(answer.ranked[new])
            sequence.ticket.put(Event(answer.choice, text, token_ids, ranked))

    def logits(self, sequence: Sequence, rows: torch.Tensor) -> bool:
        """The logits after the last tokens of a text that were computed. Returns whether these were all. Of a text that
        was paused some may be computed for the second time."""
        num_new = sequence.num_cached - sequence.ticket.num_put
        if num_new > 0:
            sequence.ticket.put(Event(0, logits=rows[-num_new:].to("cpu", copy=True)))
        if sequence.num_cached == len(sequence.ids):
            sequence.answer.outcome = Outcome("stop")
        return sequence.answer.outcome is not None

    def _length(self, sequence: Sequence) -> Outcome:
        wanted = sequence.ticket.request.params.max_tokens
        return Outcome("length", limit="max_tokens" if sequence.max_new == wanted else "context")

    # ---- the end

    def finish(self, sequence: Sequence) -> None:
        """The rest of the text, and the outcome."""
        answer, ticket = sequence.answer, sequence.ticket
        text = "" if sequence.sink is None else sequence.sink.finish()
        self._tell(sequence, text, len(answer.token_ids))
        ticket.put(Event(answer.choice, outcome=answer.outcome))
        if all(other.outcome is not None for other in ticket.answers):
            ticket.end()

    def cut_off(self, sequence: Sequence) -> None:
        """A sequence that may not draw any token."""
        sequence.answer.outcome = self._length(sequence)
        self.finish(sequence)

    def refused(self, ticket: Ticket) -> None:
        """A request that was cancelled before it began, or interrupted anywhere: its text is what has been told."""
        for answer in ticket.answers:
            if answer.outcome is None:
                answer.outcome = Outcome("cancelled")
                ticket.put(Event(answer.choice, outcome=answer.outcome))
        ticket.end()

    def failed(self, ticket: Ticket, error: BaseException) -> None:
        ticket.end(error)
