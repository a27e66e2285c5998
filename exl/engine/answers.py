"""From drawn tokens to what callers get: what ends a sequence, its text, its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from exl.batch import SampleRows
from exl.engine.beams import Beams, check_beams
from exl.engine.draws import DrawRow, DrawState
from exl.engine.guidance import Guided, check_guidance, negative_ids
from exl.engine.request import Outcome, TokenRequest
from exl.engine.sequence import Sequence
from exl.engine.shift import MAX_POSITIONS, Shift
from exl.engine.ticket import Event, Ticket
from exl.errors import ConfigError, ConstraintError, MemoryBudgetError
from exl.text.sink import Rewind

MAX_REWINDS = 32  # at one position, before a request that bans strings is given up


class Answers:
    """Of all requests to one model."""

    def __init__(
        self,
        context: int,
        vocab_size: int,
        num_pages: int,
        page_size: int,
        max_sequences: int,
        group_pages: int | None = None,
        fits_together: Callable[[int, int, int | None], bool] | None = None,
    ) -> None:
        """``num_pages``: that limit a text. ``max_sequences``: that run at once. ``group_pages``: that there are for
        those of a group together, if they are fewer, since a text gives pages back on its way. ``fits_together``: see
        ``GroupedPages``."""
        self.context, self.vocab_size = context, vocab_size
        self._num_pages = num_pages if group_pages is None else group_pages
        self._max_sequences, self._fits_together = max_sequences, fits_together
        self.eos_ids: frozenset[int] = frozenset()
        self._most_tokens = num_pages * page_size
        self._num_words = -(-vocab_size // 32)  # of a mask

    # ---- before anything runs

    def check(self, request: TokenRequest) -> None:
        """Raises ``ConfigError`` for a prompt that is empty, foreign or too long; ``MemoryBudgetError`` for one
        for which even an empty cache has no room."""
        ids = request.prompt_ids
        self._check_ids("prompt", ids)
        if request.scored_ids is not None:
            self._check_ids("continuation", request.scored_ids)
        if request.shift_keep is not None:
            most = Shift.of(request.shift_keep, self.context).num_tokens
            if len(ids) > most:
                raise ConfigError(
                    f"prompt: found {len(ids)} tokens; with overflow='shift' and shift_keep={request.shift_keep} a "
                    f"context of {self.context} holds {most} and copies of the first ones"
                )
        if len(ids) + (not request.draws_nothing) > self._most_tokens:
            raise MemoryBudgetError(
                f"prompt: found {len(ids)} tokens, the cache has room for {self._most_tokens}: load the model with "
                f"cache_tokens={len(ids) + 1} or more"
            )
        if request.guidance_scale != 1.0:
            self._check_ids("negative_prompt", negative_ids(request))
            check_guidance(request, self.context, self._num_pages, self._max_sequences)
        if request.num_beams > 1:
            num_ends = len(self.eos_ids.union(request.params.stop_token_ids))
            check_beams(request, num_ends, self.vocab_size, self.context, self._num_pages, self._max_sequences)
        if self._fits_together is not None:
            self._check_windows(request)

    def _check_windows(self, request: TokenRequest) -> None:
        """Whether sequences that run together have room in the layers that have a window."""
        beams = request.num_beams > 1
        if not beams and request.guidance_scale == 1.0:
            return
        length = max(len(request.prompt_ids), 0 if beams else len(negative_ids(request)))
        max_new = min(request.params.max_tokens, self.context - length)
        count = request.num_beams if beams else 2
        if not self._fits_together(count, length + max_new, max_new if beams else None):
            name = "num_beams" if beams else "guidance_scale"
            raise MemoryBudgetError(
                f"{name}: {count} sequences need more pages together than there are for layers with a sliding window: "
                "load the model with a larger cache_tokens= or max_sequences=, or with window_cache=False"
            )

    def _check_ids(self, name: str, ids: Ids[int]) -> None:
        if not len(ids):
            raise ConfigError(f"{name}: found no tokens, expected at least one")
        if len(ids) > self.context:
            raise ConfigError(f"{name}: found {len(ids)} tokens, the context holds {self.context}")
        for token_id in ids:
            if not isinstance(token_id, int | np.integer) or not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"{name}: found token id {token_id!r}, expected an integer from 0 to {self.vocab_size - 1}"
                )

    def sequences(self, ticket: Ticket, arrival: int) -> list[Sequence]:
        """One for each choice, with guidance two; or one for each beam."""
        request = ticket.request
        ids = [int(token_id) for token_id in request.prompt_ids]
        if request.draws_nothing:
            sequence = Sequence(
                ticket, ticket.answers[0], ids, len(ids), 1, None, None, None, (arrival, 0), prompt_only=True
            )
            ticket.sequences.append(sequence)
            return ticket.sequences
        guided = request.guidance_scale != 1.0
        shift = None if request.shift_keep is None else Shift.of(request.shift_keep, self.context)
        most = min(self.context, self._most_tokens) if shift is None else MAX_POSITIONS
        longest = max(len(ids), len(negative_ids(request)) if guided else 0)
        max_new = min(request.params.max_tokens, most - longest)
        stop_ids = self.eos_ids.union(request.params.stop_token_ids)
        draws = DrawState(request.params, ids, self.eos_ids, self.vocab_size, request.dry_breakers)
        scores = max_new <= 0 and ticket.rows is not None and ticket.rows.is_wanted
        made: list[Sequence] = []
        for answer in ticket.answers[:1] if request.num_beams > 1 else ticket.answers:
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
                prompt_only=scores and answer.choice == 0,
            )
            group = Beams(sequence) if request.num_beams > 1 else Guided(sequence) if guided else None
            made += [sequence] if group is None else group.members
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
            raise ConstraintError(
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

    def _length(self, sequence: Sequence) -> Outcome:
        wanted = sequence.ticket.request.params.max_tokens
        return Outcome("length", limit="max_tokens" if sequence.max_new == wanted else "context")

    # ---- the end

    def finish(self, sequence: Sequence) -> None:
        """The rest of the text, and the outcome."""
        answer, ticket = sequence.answer, sequence.ticket
        if isinstance(sequence.group, Beams):
            self._finish_beams(sequence.group)
            return
        text = "" if sequence.sink is None else sequence.sink.finish()
        self._tell(sequence, text, len(answer.token_ids))
        ticket.put(Event(answer.choice, outcome=answer.outcome))
        if all(other.outcome is not None for other in ticket.answers):
            ticket.end()

    def _finish_beams(self, beams: Beams) -> None:
        """All choices at once: the best texts. One that was cancelled has those that there are."""
        leader, ticket = beams.leader, beams.leader.ticket
        ended = leader.answer.outcome  # of a search that did not come to its end
        for answer, found in zip(ticket.answers, beams.search.best(len(ticket.answers)), strict=True):
            answer.began, answer.first, answer.last = leader.answer.began, leader.answer.first, leader.answer.last
            answer.num_reused, answer.beam_score = leader.answer.num_reused, found.score
            answer.token_ids = list(found.token_ids)
            if answer.ranked is not None:
                answer.ranked = list(found.ranked)
            sink = None if ticket.request.make_sink is None else ticket.request.make_sink()
            text = "" if sink is None else "".join(sink.push(token_id).text for token_id in found.token_ids)
            text += "" if sink is None else sink.finish()
            reached = self._length(leader) if found.stop_id is None else Outcome("stop", found.stop_id)
            answer.outcome = ended or reached
            answer.pieces, answer.num_told = [text], len(found.token_ids)
            ticket.put(Event(answer.choice, text, found.token_ids, None if answer.ranked is None else found.ranked))
            ticket.put(Event(answer.choice, outcome=answer.outcome))
        ticket.end()

    def cut_off(self, sequence: Sequence) -> None:
        """A sequence that may not draw any token."""
        drew_nothing = sequence.ticket.request.draws_nothing
        sequence.answer.outcome = Outcome("stop") if drew_nothing else self._length(sequence)
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
