"""How many drafts are worth their rows: by how many were kept of late, and by what a pass with more rows costs.

Costs are measured, so lengths may differ from run to run. No output depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What is remembered of earlier steps decays by this factor at each step with drafts, and never weighs more than this
# many drafts: a run of drafts that were kept is forgotten after some failures, failures after one draft kept whole.
_DECAY = 7 / 8
_MOST_EVIDENCE = 16.0
_PRIOR_KEPT, _PRIOR_TRIED = 1.4, 2.0
_FOUND_RATE = 1 / 16  # of the moving average over steps that asked for drafts

PROBE_LENGTH = 4
FIRST_PROBE, LAST_PROBE = 16, 256  # tokens without drafts before a probe; doubled after each that failed
_EMPTY_PROBES = 8  # steps that a probe waits for its drafter to find anything


def _free(_: int) -> float:
    return 0.0


@dataclass(frozen=True)
class StepCosts:
    """Measured when a model is loaded, all in the same unit."""

    rows: Callable[[int], float]  # a pass of this many decode rows
    draft: Callable[[int], float] = _free  # proposing up to this many tokens for each sequence of a step
    sync: float = 0.0  # reading a step's tokens before the next is launched


@dataclass(frozen=True)
class Ask:
    """What one sequence could use."""

    most: int  # drafts that it can take in this step: kernels, context and max_tokens
    acceptance: float  # estimated probability that a draft is kept, if those before it are
    found: float = 1.0  # share of the steps that asked for drafts in which there were any
    probe: bool = False  # a few drafts are wanted even if they do not pay now


class DraftLength:
    """One sequence's experience with its drafts."""

    def __init__(self) -> None:
        self._kept, self._tried = _PRIOR_KEPT, _PRIOR_TRIED  # decayed counts
        self._found = 1.0
        self._waited, self._wait = 0, FIRST_PROBE
        self._empty = 0

    @property
    def acceptance(self) -> float:
        """Drafts kept, of those that were tried: drafts kept, and the first after them that was not."""
        return self._kept / self._tried

    @property
    def probes(self) -> bool:
        return self._waited >= self._wait

    def ask(self, most: int) -> Ask:
        return Ask(most, self.acceptance, self._found, self.probes and most > 0)

    def advance(self, granted: int, num_drafted: int, num_accepted: int) -> None:
        """After each step. ``granted``: what ``share_rows`` gave; the drafter may have found fewer drafts, or none."""
        if granted == 0:
            self._waited += 1
            return
        probed = self.probes
        self._found += ((num_drafted > 0) - self._found) * _FOUND_RATE
        if num_drafted > 0:
            self._learn(num_accepted + (num_accepted < num_drafted), num_accepted)
        if not probed:
            self._waited, self._wait = 0, FIRST_PROBE
        elif num_drafted == 0 and self._empty + 1 < _EMPTY_PROBES:
            self._empty += 1  # asked again at the next step
        elif num_drafted == 0 or num_accepted < num_drafted:
            self._waited, self._wait, self._empty = 0, min(2 * self._wait, LAST_PROBE), 0
        else:  # kept whole: drafts may pay now; if they still do not, it is probed again after one token
            self._wait, self._empty = FIRST_PROBE, 0
            self._waited = self._wait - 1

    def _learn(self, tried: int, kept: int) -> None:
        tried_now, kept_now = _DECAY * self._tried + tried, _DECAY * self._kept + kept
        scale = min(1.0, _MOST_EVIDENCE / tried_now)
        self._tried, self._kept = scale * tried_now, scale * kept_now


# One draft that a step may have: tokens expected of it, if the drafter finds it, negated; its place in the sequence's
# drafts, from 1; the sequence; ``Ask.found``. A tuple, for a step has hundreds.
_Draft = tuple[float, int, int, float]


def share_rows(asks: Sequence[Ask], costs: StepCosts, max_rows: int, num_rows: int | None = None) -> list[int]:
    """How many drafts each sequence gets in a step: those that give most tokens a second, in at most ``max_rows`` rows.

    ``num_rows``: rows of the step without drafts, those of sequences that asked for nothing included; None: one for
    each of ``asks``. Probes are served first. With an acceptance of a, the j-th draft of a sequence gives a^j tokens
    (their sum is Leviathan et al., 2023, equation 1), so that the drafts that give most are every sequence's first.
    """
    if not asks:
        return []
    num_rows = len(asks) if num_rows is None else num_rows
    budget = max(0, max_rows - num_rows)
    lengths = [0] * len(asks)
    for i, ask in enumerate(asks):
        if ask.probe and _can_pay(min(ask.most, budget), num_rows, costs):
            lengths[i] = min(PROBE_LENGTH, ask.most, budget)
            budget -= lengths[i]
    drafts = [
        (-(ask.acceptance**j), j, i, ask.found)
        for i, ask in enumerate(asks)
        if not ask.probe
        for j in range(1, min(ask.most, budget) + 1)
    ]
    drafts.sort()
    for _, _, i, _ in drafts[: _num_worth(drafts[:budget], costs, num_rows, lengths)]:
        lengths[i] += 1
    return lengths


def _can_pay(most: int, num_rows: int, costs: StepCosts) -> bool:
    """Whether any number of drafts would pay if all of them were kept."""
    return _num_worth([(-1.0, j, 0, 1.0) for j in range(1, most + 1)], costs, num_rows, ()) > 0


def _num_worth(drafts: Sequence[_Draft], costs: StepCosts, num_rows: int, probes: Sequence[int]) -> int:
    """How many of the drafts, in this order, make the most tokens a second of a step that has the probes anyway."""
    rows, longest = num_rows + sum(probes), max(probes, default=0)
    alone = costs.rows(rows) + costs.draft(longest)
    plain, sync = (alone + costs.sync, 0.0) if longest else (alone, costs.sync)
    best, num_best = num_rows / plain, 0
    tokens, found = float(num_rows), 0.0
    for n, (negated, place, _, share) in enumerate(drafts, start=1):
        tokens -= share * negated
        found += share
        longest = max(longest, place)
        # Where nothing is found, the step has no more rows than without drafts, and was only waited for.
        more = costs.rows(rows + n) + costs.draft(longest) - alone
        rate = tokens / (plain + sync + found / n * more)
        if rate > best:
            best, num_best = rate, n
    return num_best
