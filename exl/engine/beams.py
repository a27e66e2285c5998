"""Beam search: of all continuations of a prompt, those with the highest log-probability that a narrow search finds.

The rules are those of transformers' ``generate(num_beams=K, do_sample=False)`` (``GenerationMixin._beam_search``), so
that the texts are the same. Each step looks at all continuations of K running texts by one token and takes the
K (1 + number of end tokens) best ones, but 2 K at least, by the sum of log-probabilities of the plain distribution. Of
those, the K best that do not end go on. Those that end, or have all the tokens that they may have, are finished if they
are among the first K: with a score of that sum over length ** ``length_penalty``, the end token counted. The K best
finished ones are kept. The search ends when there are K and ``early_stopping`` is True, or no running text can be
better than the worst of them: by its sum over its present length, or with "never" over the greatest length if the
penalty favours longer texts.

Sums are f64 here and f32 there: only texts whose scores are equal but for that rounding may change places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from exl.batch import PAGE_SIZE
from exl.engine.admission import Pages
from exl.engine.draws import DrawRow
from exl.engine.group import Group, check_fits
from exl.engine.request import TokenRequest
from exl.engine.sequence import Sequence as Tokens
from exl.engine.ticket import Answer
from exl.errors import ConfigError

Ranked = tuple[tuple[int, float], ...]  # (id, log-probability)


@dataclass(frozen=True)
class Beam:
    """A text: its generated tokens, and of each its log-probability and those of the likeliest ones at its place."""

    token_ids: tuple[int, ...] = ()
    score: float = 0.0  # the sum of log-probabilities; -inf: only there to fill a place
    ranked: tuple[Ranked, ...] = ()
    stop_id: int | None = None  # the end token behind it

    @property
    def length(self) -> int:
        return len(self.token_ids) + (self.stop_id is not None)


def num_candidates(num_beams: int, num_ends: int) -> int:
    return max(2, 1 + num_ends) * num_beams


class BeamSearch:
    """The texts of one search, without a model. ``running``: the best first; at first all are the prompt, and one of
    them counts. ``finished``: with their final scores, the best first."""

    def __init__(
        self,
        num_beams: int,
        max_new: int,
        end_ids: frozenset[int],
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        top: int = 0,
    ) -> None:
        """``max_new``: tokens that a text may have, its end token included. ``top``: how many of the likeliest tokens
        are told for each."""
        self.num_beams, self.num_candidates = num_beams, num_candidates(num_beams, len(end_ids))
        self._max_new, self._end_ids, self._top = max_new, end_ids, top
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self.running = [Beam(score=0.0 if i == 0 else -math.inf) for i in range(num_beams)]
        self.finished: list[Beam] = []
        self.is_done = False

    def advance(self, likeliest: Sequence[Ranked]) -> list[int]:
        """``likeliest``: for each running text the ``num_candidates`` likeliest next tokens or more, falling. Returns
        the place that each new running text's beginning had among the old ones."""
        found = [
            (beam.score + logprob, parent, place)
            for parent, beam in enumerate(self.running)
            for place, (_, logprob) in enumerate(likeliest[parent][: self.num_candidates])
        ]
        found.sort(key=lambda one: (-one[0], one[1], one[2]))
        going_on: list[tuple[int, Beam]] = []
        for rank, (score, parent, place) in enumerate(found[: self.num_candidates]):
            beam = self._extended(parent, score, likeliest[parent], place)
            if beam.stop_id is None and beam.length < self._max_new:
                going_on.append((parent, beam))
            elif rank < self.num_beams and score > -math.inf:
                self.finished.append(self._scored(beam, beam.length))
        self.finished = self._best(self.finished)
        while going_on and len(going_on) < self.num_beams:  # fewer tokens are possible at all
            parent, beam = going_on[0]
            going_on.append((parent, Beam(beam.token_ids, -math.inf, beam.ranked)))
        self.running = [beam for _, beam in going_on[: self.num_beams]]
        self.is_done = not self.running or not self._can_improve()
        return [parent for parent, _ in going_on[: self.num_beams]]

    def best(self, count: int) -> list[Beam]:
        """The finished texts; if the search was ended early, then those that run, as they are."""
        rest = [self._scored(beam, beam.length) for beam in self.running if beam.score > -math.inf]
        found = [*self.finished, *self._best(rest)]
        return [*found, *[Beam()] * count][:count]

    def _extended(self, parent: int, score: float, likeliest: Ranked, place: int) -> Beam:
        beam, token = self.running[parent], likeliest[place]
        if token[0] in self._end_ids:
            return Beam(beam.token_ids, score, beam.ranked, token[0])
        return Beam((*beam.token_ids, token[0]), score, (*beam.ranked, (token, *likeliest[: self._top])))

    def _scored(self, beam: Beam, length: int) -> Beam:
        score = beam.score / length**self._length_penalty if length else 0.0
        return Beam(beam.token_ids, score, beam.ranked, beam.stop_id)

    def _best(self, beams: Sequence[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: -beam.score)[: self.num_beams]

    def _can_improve(self) -> bool:
        if len(self.finished) < self.num_beams:
            return True
        if self._early_stopping is True:
            return False
        longest = self._early_stopping == "never" and self._length_penalty > 0.0
        best = self._scored(self.running[0], self._max_new if longest else self.running[0].length)
        return best.score > self.finished[-1].score


class Beams(Group):
    """The sequences of a search. They share the pages of their common beginnings; that of the best running text may be
    any of them (``order``). Nobody is told anything before the end."""

    shares_prompt = True

    def __init__(self, leader: Tokens) -> None:
        request = leader.ticket.request
        others = [
            Tokens(
                ticket=leader.ticket,
                answer=Answer(0, leader.answer.seed),  # that nobody gets
                ids=list(leader.ids),
                num_prompt=leader.num_prompt,
                max_new=leader.max_new,
                draws=leader.draws,
                sink=None,
                matcher=None,
                arrival=(*leader.arrival, i),
            )
            for i in range(1, request.num_beams)
        ]
        super().__init__([leader, *others])
        self.order = list(self.members)  # of the running texts
        self.search = BeamSearch(
            request.num_beams,
            leader.max_new,
            leader.stop_ids,
            request.length_penalty,
            request.early_stopping,
            request.top_logprobs or 0,
        )

    def draws(self, row_of: dict[Tokens, int]) -> list[DrawRow]:
        """Of each running text the likeliest next tokens."""
        top = self.leader.ticket.request.top_logprobs or 0
        return [DrawRow(row_of[one], num_logprobs=max(top, self.search.num_candidates)) for one in self.order]

    def take(self, ranked: Sequence[Ranked], pages: Pages) -> bool:
        """What the rows of ``draws`` gave. Returns whether the search has ended; else each sequence has its next text.
        The first one that goes on with a sequence's text keeps its pages, others take the place of those that end."""
        answer = self.leader.answer
        answer.last = time.perf_counter()
        if answer.first == 0.0:
            answer.first = answer.last
        parents = self.search.advance([likeliest[1:] for likeliest in ranked])  # without the drawn token
        if self.search.is_done:
            return True
        old, heir = self.order, {parent: child for child, parent in reversed(list(enumerate(parents)))}
        idle = [one for parent, one in enumerate(old) if parent not in heir]
        for one in idle:
            pages.drop(one)  # first: each has a page of its own, which is enough for another one's copy
        self.order = []
        for child, parent in enumerate(parents):
            one = old[parent] if heir[parent] == child else idle.pop()
            if one is not old[parent]:
                pages.fork(old[parent], one)
                one.ids = list(old[parent].ids)
            self.order.append(one)
        for one, beam in zip(self.order, self.search.running, strict=True):
            one.ids.append(beam.token_ids[-1])
        return False


def check_beams(
    request: TokenRequest, num_ends: int, vocab_size: int, context: int, num_pages: int, max_sequences: int
) -> None:
    """Raises ``ConfigError`` or ``MemoryBudgetError`` for a search that never has room. ``num_ends``: tokens that end
    a text."""
    count, length = request.num_beams, len(request.prompt_ids)
    if num_candidates(count, num_ends) > vocab_size:
        most = vocab_size // num_candidates(1, num_ends)
        raise ConfigError(f"num_beams: found {count}, expected {most} or fewer with {vocab_size} tokens")

    def pages_for(num_new: int) -> int:
        whole = -(-(length + num_new) // PAGE_SIZE)
        return whole + (count - 1) * (whole - (length - 1) // PAGE_SIZE)  # the prompt's whole pages are shared

    max_new = min(request.params.max_tokens, context - length)
    check_fits("num_beams", count, max_sequences, num_pages, max_new, pages_for)
