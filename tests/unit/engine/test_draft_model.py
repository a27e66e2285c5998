"""``DraftModel``: its drafts are those of a model that runs each sequence afresh, whatever happened to it before."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.engine import draft_model
from exl.engine.draft_model import DraftJob, DraftModel
from tests.unit.engine.one_by_one import OneByOne
from tests.unit.engine.toy_decoding import Request, Toy, ToySequence, V
from tests.unit.engine.toy_draft_model import ToyCached

TOY = Toy(order=1000)  # every id that was run counts
CONTEXT = 60


def drafter(num_pages: int = 100, context: int = CONTEXT, vocab_size: int = V) -> tuple[DraftModel, ToyCached]:
    model = ToyCached(TOY, num_pages)
    return DraftModel(OneByOne(model, ToyCached.draw, context), context, vocab_size), model


def afresh(sequence: ToySequence, most: int) -> tuple[int, ...]:
    ids = list(sequence.ids)
    for _ in range(min(most, CONTEXT + 1 - len(sequence.ids))):
        ids.append(sequence.request.draw(TOY.logits(ids), len(ids) - sequence.num_prompt))
    return tuple(ids[len(sequence.ids) :])


def sequence_of(ids, seed=None) -> ToySequence:
    return ToySequence(Request(tuple(ids), 1000, seed))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(["keep", "drop", "skip", "cut", "release"]), max_size=30))
def test_drafts_are_those_of_a_model_without_a_cache(seed, changes):
    rng = random.Random(seed)
    model, _ = drafter()
    sequences = [sequence_of([1, 2, 3], seed=5), sequence_of([4], seed=None), sequence_of([5] * 40, seed=6)]
    for change in [*changes, "keep"]:
        asked = [(sequence, rng.randint(0, 5)) for sequence in sequences if rng.random() < 0.8]
        drafts = model.propose(asked)
        for (sequence, most), found in zip(asked, drafts, strict=True):
            assert found == afresh(sequence, most)
        for (sequence, _), found in zip(asked, drafts, strict=True):
            if change == "drop":
                continue
            kept = rng.randint(0, len(found))
            new = [*found[:kept], rng.randrange(V)]
            if rng.random() < 0.5:  # told before or after
                sequence.ids += new
                model.commit(sequence, kept)
            else:
                model.commit(sequence, kept)
                sequence.ids += new
        victim = rng.choice(sequences)
        if change == "skip":  # steps without drafts
            victim.ids += [rng.randrange(V) for _ in range(3)]
        elif change == "cut":
            keep = rng.randint(victim.num_prompt, len(victim.ids))
            del victim.ids[keep:]
            model.truncate(victim, keep)
            victim.ids += [rng.randrange(V) for _ in range(rng.randint(0, 4))]
        elif change == "release":
            model.release(victim)


def test_a_round_runs_what_is_new_and_no_more():
    model, toy = drafter()
    sequence = sequence_of([1, 2, 3, 4])
    (drafts,) = model.propose([(sequence, 3)])
    assert toy.num_run == [4, 1, 1]  # the last draft is not run
    toy.num_run.clear()
    sequence.ids += [*drafts, 9]
    model.commit(sequence, 3)
    model.propose([(sequence, 2)])
    assert toy.num_run == [2, 1]  # the last draft, which was kept, and the token after it
    toy.num_run.clear()
    sequence.ids += [8]
    model.commit(sequence, 0)
    model.propose([(sequence, 1)])
    assert toy.num_run == [1]


def test_prompts_are_caught_up_with_in_parts(monkeypatch):
    monkeypatch.setattr(draft_model, "_CAUGHT_UP_A_CALL", 40)
    monkeypatch.setattr(draft_model, "_FEW", 5)
    model, toy = drafter()
    first, second, short = sequence_of([1] * 50), sequence_of([2] * 35), sequence_of([3] * 5)
    asked = [(first, 2), (second, 2), (short, 2)]
    assert model.propose(asked) == [(), (), afresh(short, 2)]
    assert toy.num_run == [40, 5, 1]
    assert model.propose(asked) == [afresh(first, 2), (), afresh(short, 2)]
    assert model.propose(asked) == [afresh(sequence, 2) for sequence, _ in asked]


def test_no_drafts_beyond_its_context():
    model, _ = drafter()
    sequence = sequence_of([1] * (CONTEXT - 1))
    assert [len(found) for found in model.propose([(sequence, 5)])] == [2]
    sequence.ids += [1, 1]
    assert model.propose([(sequence, 5)]) == [()]


def test_a_sequence_without_pages_gets_no_drafts_until_there_are_some():
    model, toy = drafter(num_pages=1)
    first, second = sequence_of([1]), sequence_of([2])
    assert model.propose([(first, 1), (second, 1)]) == [afresh(first, 1), ()]
    model.release(second)
    model.release(first)
    assert toy.num_free == 1
    assert model.propose([(second, 1), (first, 1)]) == [afresh(second, 1), ()]


def test_ids_that_the_target_does_not_have_end_the_drafts():
    sequence = sequence_of([1, 2])
    wanted = afresh(sequence, 8)
    model, _ = drafter(vocab_size=max(wanted))
    cut = wanted.index(max(wanted))
    assert cut > 0
    assert model.propose([(sequence, 8)]) == [wanted[:cut]]
    sequence.ids += [*wanted[:cut], 0]
    model.commit(sequence, cut)
    assert model.propose([(sequence, 1)]) == [afresh(sequence, 1)]


def test_a_row_without_a_distribution_ends_the_drafts():
    def draw(logits: torch.Tensor, sequence, drafts) -> int:
        return -1 if len(drafts) == 2 else ToyCached.draw(logits, sequence, drafts)

    sequence = sequence_of([1, 2])
    model = DraftModel(OneByOne(ToyCached(TOY), draw, CONTEXT), CONTEXT, V)
    assert model.propose([(sequence, 5)]) == [afresh(sequence, 2)]


def test_a_batched_runner_may_be_put_in_its_place():
    """What it is asked for, job by job."""
    asked: list[DraftJob] = []

    class Runner:
        def draft(self, jobs):
            asked.extend(jobs)
            return [(7,) * job.length for job in jobs]

        def release(self, sequence):
            pass

    first, second = sequence_of([1, 2]), sequence_of([3])
    model = DraftModel(Runner(), 100, V)
    assert model.propose([(first, 3), (second, 0), (second, 1)]) == [(7, 7, 7), (), (7,)]
    first.ids += [7, 7, 5]
    model.commit(first, 2)
    model.propose([(first, 1)])
    assert asked == [DraftJob(first, 0, [1, 2], 3), DraftJob(second, 0, [3], 1), DraftJob(first, 4, [5], 1)]


def test_nothing_is_run_for_nobody():
    model, toy = drafter()
    assert model.propose([]) == []
    assert model.propose([(sequence_of([1] * (CONTEXT + 1)), 4), (sequence_of([1]), 0)]) == [(), ()]
    assert toy.num_run == []
