"""Steps and the few shapes that they are padded to."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from exl.batch import ForwardBatch, is_step, padded_step, step_bucket


def step(*new: int) -> ForwardBatch:
    """Sequences with so many new tokens each, after 5 cached ones."""
    array = lambda values: np.asarray(values, np.int32)  # noqa: E731
    count, sequences = sum(new), np.arange(len(new))
    offset = np.concatenate([np.arange(n) for n in new])
    return ForwardBatch(
        token_ids=array(np.arange(count) + 10),
        positions=array(5 + offset),
        slots=array(np.repeat(sequences, new) * 64 + 5 + offset),
        query_start=array([0, *np.cumsum(new)]),
        context_len=array(np.asarray(new) + 5),
        rope_len=array(np.asarray(new) + 5),
        page_table=array(sequences[:, None]),
        logit_rows=array(np.arange(count)),
        num_decode_rows=count,
        window_slots=array(np.repeat(sequences + 3, new) * 64 + 5 + offset),
        window_table=array(np.repeat(sequences[:, None] + 3, 2, axis=1)),
    )


@pytest.mark.parametrize(
    ("new", "rows", "sequences"),
    [
        ((1,), 1, 1),
        ((1,) * 3, 4, 4),
        ((1,) * 16, 16, 16),
        ((1,) * 33, 48, 48),  # what there is room for
        ((2,), 8, 1),
        ((8,), 8, 1),
        ((3, 1, 1), 8, 4),
        ((8, 1), 16, 2),
        ((1,) * 32 + (2,), 60, 48),
        ((8,) * 7, 60, 8),
    ],
)
def test_buckets(new, rows, sequences):
    """Buffers for 60 rows and 48 sequences."""
    batch = replace(step(*new), lora_idx=np.arange(len(new), dtype=np.int32) - 1)
    padded = step_bucket(batch, 60, 48)
    assert (padded.num_rows, padded.num_sequences, padded.num_decode_rows) == (rows, sequences, rows)
    assert padded.logit_rows.tolist() == list(range(rows))
    T, B = batch.num_rows, batch.num_sequences
    for field in fields(batch):
        if field.name not in ("num_decode_rows", "logit_rows"):
            own = getattr(batch, field.name)
            np.testing.assert_array_equal(getattr(padded, field.name)[: len(own)], own)
            assert getattr(padded, field.name).dtype == np.int32
    assert {*padded.slots[T:].tolist(), *padded.window_slots[T:].tolist()} <= {-1}
    assert set(padded.query_start[B:].tolist()) == {T}
    assert set(padded.context_len[B:].tolist()) <= {0}


def test_places_of_layers_with_pages_of_their_own():
    batch = step(1, 1)
    assert [array.tolist() for array in batch.places(False)] == [[5, 69], [[0], [1]]]
    assert [array.tolist() for array in batch.places(True)] == [[197, 261], [[3, 3], [4, 4]]]
    plain = padded_step(replace(batch, window_slots=None, window_table=None), 4)
    assert plain.window_slots is plain.window_table is None
    with pytest.raises(ValueError, match="without pages for layers"):
        plain.places(True)


def test_a_step_that_is_its_bucket_is_not_copied():
    assert step_bucket(batch := step(1, 1), 64, 64) is batch
    assert step_bucket(batch := step(4, 4), 64, 64) is batch
    assert step_bucket(batch := step(2, 1), 64, 2, fewest_rows=1).num_rows == 4
    assert step_bucket(batch, 2, 1).num_rows == 3  # larger than there is room for: who runs it says so


def test_padded_with_as_many_sequences_as_rows():
    padded = padded_step(step(1, 1, 1), 8)
    assert (padded.num_rows, padded.num_sequences) == (8, 8)
    assert padded.query_start.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]


def test_steps():
    assert all(map(is_step, (step(1), step(1, 1), step(8, 1), step(2, 3))))
    assert not is_step(step(9))
    assert not is_step(padded_step(step(2, 1), 8))


def test_runs_of_adapters():
    """Rows of neighbouring sequences with one adapter; sequences without rows and padding are in none."""
    found = replace(step(2, 1, 3, 1, 1, 1), lora_idx=np.array([1, 1, -1, 0, 1, 1], np.int32))
    assert found.lora_runs == ((0, 3, 1), (6, 7, 0), (7, 9, 1))
    padded = padded_step(found, 16, 8)
    assert padded.lora_runs == found.lora_runs
    assert padded.lora_idx.tolist() == [1, 1, -1, 0, 1, 1, -1, -1]
    empty = replace(step(2, 1), query_start=np.array([0, 2, 2], np.int32), lora_idx=np.array([-1, 3], np.int32))
    assert empty.lora_runs == ()
    assert step(1, 2).lora_runs == ()
    assert padded_step(step(1, 2), 8).lora_idx is None
