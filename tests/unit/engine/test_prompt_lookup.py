"""``PromptLookup`` against a search through all of the text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.engine import prompt_lookup
from exl.engine.prompt_lookup import PromptLookup
from exl.errors import ConfigError
from tests.unit.engine.toy_decoding import Request, ToySequence


def searched(ids: list[int], lengths, most: int) -> tuple[int, ...]:
    for n in sorted(lengths, reverse=True):
        for end in range(len(ids) - 1, n - 1, -1):  # where an occurrence before the suffix's own ends, latest first
            if n <= len(ids) and ids[end - n : end] == ids[-n:]:
                text = list(ids)
                for _ in range(most):
                    text.append(text[end + len(text) - len(ids)])
                return tuple(text[len(ids) :])
    return ()


def sequence_of(ids) -> ToySequence:
    sequence = ToySequence(Request((0,), 1))
    sequence.ids = list(ids)
    return sequence


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
        st.tuples(st.just("cut"), st.integers(0, 10)),
        st.tuples(st.just("cut and go on"), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
        st.tuples(st.just("propose"), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sets(st.integers(1, 5), min_size=1, max_size=3), steps)
def test_it_finds_what_a_search_finds_after_any_changes(prompt, lengths, changes):
    sequence, lookup = sequence_of(prompt), PromptLookup(sorted(lengths))
    for change, value in [*changes, ("propose", 4)]:
        if change == "append":
            sequence.ids += value
        elif change == "propose":
            assert lookup.propose([(sequence, value)]) == [searched(sequence.ids, lengths, value)]
        else:
            keep = max(1, len(sequence.ids) - (value if change == "cut" else len(value)))
            del sequence.ids[keep:]
            lookup.truncate(sequence, keep)
            if change == "cut and go on":  # to the same length: only ``truncate`` told
                sequence.ids += value


def test_taking_back_leaves_no_trace():
    rng = random.Random(0)
    ids = [rng.randrange(3) for _ in range(60)]
    once, twice = prompt_lookup._SuffixIndex((4, 2, 1)), prompt_lookup._SuffixIndex((4, 2, 1))
    once.extend(ids[:25])
    twice.extend(ids)
    twice.truncate(25)
    assert vars(once) == vars(twice)


def test_the_longest_suffix_wins_and_there_the_latest_occurrence():
    #           1 2 3 -> 4 is the longest, twice; 2 3 -> 9 and 3 -> 8 are later
    sequence = sequence_of([1, 2, 3, 5, 1, 2, 3, 4, 7, 2, 3, 9, 3, 8, 1, 2, 3])
    assert PromptLookup((3, 2, 1)).propose([(sequence, 2)]) == [(4, 7)]
    assert PromptLookup((2, 1)).propose([(sequence, 2)]) == [(9, 3)]
    assert PromptLookup((1,)).propose([(sequence, 2)]) == [(8, 1)]
    assert PromptLookup((4,)).propose([(sequence, 2)]) == [()]


def test_text_with_a_period_is_drafted_at_full_length():
    assert PromptLookup((2,)).propose([(sequence_of([5, 1, 2, 1, 2]), 5)]) == [(1, 2, 1, 2, 1)]
    assert PromptLookup((1,)).propose([(sequence_of([7, 7]), 4)]) == [(7, 7, 7, 7)]


def test_a_long_prompt_is_indexed_over_several_calls(monkeypatch):
    monkeypatch.setattr(prompt_lookup, "_INDEXED_A_CALL", 8)
    long, short, lookup = sequence_of([1, 2, 3, 4] * 5), sequence_of([1, 2, 1]), PromptLookup((2, 1))
    assert lookup.propose([(long, 2), (short, 2)]) == [(), ()]  # 8 of 20 tokens, and 1 of 3
    assert lookup.propose([(short, 2), (long, 2)]) == [(2, 1), ()]  # 2 and 6
    assert lookup.propose([(long, 2)]) == [(1, 2)]


def test_a_step_does_not_look_at_the_whole_text():
    """Counted, not timed: reads of the sequence's ids after the prompt has been indexed."""

    class Counted(list):
        num_read = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            Counted.num_read += len(found) if isinstance(key, slice) else 1
            return found

    rng = random.Random(1)
    sequence, lookup = sequence_of([]), PromptLookup((3, 2))
    sequence.ids = Counted(rng.randrange(50) for _ in range(5000))
    while not lookup.propose([(sequence, 3)])[0]:
        if Counted.num_read > 5000:
            break
        if Counted.num_read == 5000:
            sequence.ids.append(rng.randrange(50))
    read = Counted.num_read
    for _ in range(10):
        sequence.ids.append(rng.randrange(50))
        lookup.propose([(sequence, 3)])
    assert Counted.num_read - read <= 11


def test_what_has_ended_is_forgotten():
    sequence, lookup = sequence_of([1, 2, 1]), PromptLookup((1,))
    lookup.propose([(sequence, 2)])
    assert lookup._indices
    lookup.release(sequence)
    lookup.release(sequence)
    assert not lookup._indices
    lookup.truncate(sequence, 1)
    assert lookup.propose([(sequence, 2)]) == [(2, 1)]


@pytest.mark.parametrize("lengths", [(), (0,), (65,), (1, -1), tuple(range(1, 10))])
def test_bad_lengths_are_refused(lengths):
    with pytest.raises(ConfigError, match=r"prompt lookup: found suffix lengths \[.*\], expected 1 to 8 of them"):
        PromptLookup(lengths)
