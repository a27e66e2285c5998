"""The same tokens with any drafts as with none; what is kept of drafts, and what rejection sampling would keep."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl.engine.draft_length import DraftLength, StepCosts, share_rows
from exl.engine.draft_model import DraftModel
from exl.engine.prompt_lookup import PromptLookup
from exl.engine.speculation import Drafter, accepted, rejection_acceptance
from exl.errors import ConfigError
from tests.unit.engine.one_by_one import OneByOne
from tests.unit.engine.toy_decoding import Request, Toy, ToySequence, V, plain, with_drafts
from tests.unit.engine.toy_draft_model import ToyCached


class Guesses:
    """Any tokens, of which none may be a token at all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def propose(self, want):
        return [tuple(self.random.randrange(V) for _ in range(self.random.randint(0, most))) for _, most in want]

    def commit(self, sequence, num_accepted):
        pass

    def truncate(self, sequence, num_tokens):
        pass

    def release(self, sequence):
        pass


class KnowsAndLies(Guesses):
    """Drafts what will come, and from a random place on something else, which is a stop wherever there is one."""

    def __init__(self, seed: int, model: Toy, request: Request) -> None:
        super().__init__(seed)
        self.text, self.stops = plain(model, request), sorted(request.stops) or [0]

    def propose(self, want):
        (sequence, most) = want[0]
        right = self.text[len(sequence.ids) : len(sequence.ids) + self.random.randint(0, most)]
        lies = [self.random.choice(self.stops) for _ in range(most - len(right))]
        return [tuple(right + lies)]


def drafter(kind: str, seed: int, model: Toy, request: Request) -> Drafter:
    if kind == "guesses":
        return Guesses(seed)
    if kind == "lies":
        return KnowsAndLies(seed, model, request)
    if kind == "lookup":
        return PromptLookup((3, 2, 1))
    return DraftModel(OneByOne(ToyCached(Toy(noise=0.5)), ToyCached.draw, 200), 200, V)


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=20).map(tuple),
    max_tokens=st.integers(0, 40),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stops=st.frozensets(st.integers(0, V - 1), max_size=1),
    stop_pairs=st.frozensets(st.tuples(st.integers(0, V - 1), st.integers(0, V - 1)), max_size=3),
)


@pytest.mark.parametrize("kind", ["guesses", "lies", "lookup", "model"])
@settings(max_examples=60, deadline=None)
@given(request=requests, seed=st.integers(0, 2**32), order=st.integers(1, 3))
def test_any_drafts_give_the_tokens_of_none(kind, request, seed, order):
    model, rng = Toy(order), random.Random(seed)
    ids, _ = with_drafts(
        model, request, drafter(kind, seed, model, request), lambda: rng.randint(0, 9), lambda: rng.random() < 0.2
    )
    assert ids == plain(model, request)


@pytest.mark.parametrize(("kind", "request_seed"), [("lookup", None), ("model", None), ("model", 7)])
def test_drafts_are_kept_and_save_steps(kind, request_seed):
    model, request = Toy(2), Request((1, 2, 3), 150, request_seed)
    ids, steps = with_drafts(model, request, drafter(kind, 0, model, request), lambda: 4)
    assert ids == plain(model, request)
    assert len(steps) < 0.6 * 150
    assert sum(kept + 1 for _, kept in steps) == 150


def test_a_draft_model_that_agrees_is_kept_whole_under_a_seed_too():
    """Coupled draws: the same uniform number, the same distribution, the same token."""
    request = Request((4,), 41, seed=3)
    same = DraftModel(OneByOne(ToyCached(Toy()), ToyCached.draw, 200), 200, V)
    _, steps = with_drafts(Toy(), request, same, lambda: 4)
    assert steps == [(4, 4)] * 8 + [(0, 0)]


def test_adaptive_length_changes_no_token():
    model, request = Toy(2), Request((1, 2, 3), 300)
    length, granted = DraftLength(), [0]
    costs = StepCosts(rows=lambda rows: 1 + 0.1 * rows)

    def next_length():
        (granted[0],) = share_rows([length.ask(7)], costs, max_rows=8)
        return granted[0]

    class Watched(PromptLookup):
        def propose(self, want):
            self.drafted = super().propose(want)
            return self.drafted

        def commit(self, sequence, num_accepted):
            length.advance(granted[0], len(self.drafted[0]), num_accepted)

    ids, steps = with_drafts(model, request, Watched((3, 2)), next_length)
    assert ids == plain(model, request)
    assert len(steps) < 150


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=9))
@example([1, 2, 3], [1, 2, 3, 0])
@example([1, 2], [2, 2, 0])
def test_accepted_is_the_length_of_the_common_beginning(drafts, drawn):
    n = accepted(drafts, drawn)
    assert drafts[:n] == drawn[:n]
    assert n == min(len(drafts), len(drawn)) or drafts[n] != drawn[n]


def test_rejection_acceptance_of_drawn_drafts_adds_up_to_the_overlap():
    """Leviathan et al., 2023, theorem 3.5: the mean over drafts of q is 1 - TV(p, q), the sum of min(p, q)."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(9))
    mean = sum(q[i] * rejection_acceptance(p, i, q) for i in range(9))
    assert mean == pytest.approx(1 - 0.5 * np.abs(p - q).sum())
    assert rejection_acceptance(p, 4) == p[4]
    assert rejection_acceptance(np.array([0.75, 0.25]), 0, np.array([0.5, 0.5])) == 1.0
    assert rejection_acceptance(np.array([0.25, 0.75]), 0, np.array([0.5, 0.5])) == 0.5
    with pytest.raises(
        ConfigError, match=r"draft: found token id 1 of probability 0.0, expected one that can be drawn"
    ):
        rejection_acceptance(p, 1, np.array([1.0, 0.0]))


def test_matching_keeps_deterministic_drafts_as_often_as_rejection_would():
    model, ids = Toy(), [1, 2]
    weights = np.exp(model.logits(ids))
    request = Request((1, 2), 1, seed=5)
    drawn = [request.draw(model.logits(ids), step) for step in range(1000)]
    for draft in range(V):
        wanted = rejection_acceptance(weights / weights.sum(), draft)
        kept = sum(accepted((draft,), (token_id,)) for token_id in drawn) / len(drawn)
        assert kept == pytest.approx(wanted, abs=4 * np.sqrt(wanted * (1 - wanted) / len(drawn)))


def test_sequences_are_told_apart_by_what_they_are():
    first, second = ToySequence(Request((1, 2, 1), 5)), ToySequence(Request((1, 2, 1), 5))
    lookup = PromptLookup((1,))
    second.ids.append(2)
    assert lookup.propose([(first, 2), (second, 2)]) == [(2, 1), (1, 2)]
