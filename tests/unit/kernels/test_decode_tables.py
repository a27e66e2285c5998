"""What is decided on the host before decode attention runs: its items, its scratch, its checks of tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exl.errors import KernelError
from exl.kernels.attention_decode import check_tables, first_parts
from exl.layout.attention import items_of, most_items, num_items


def test_items_of_many_are_those_of_each():
    lengths = np.array([*range(0, 600), *range(4000, 4200), 5119, 5120, 5121, 131_072, 2**30], np.int32)
    assert items_of(lengths).tolist() == [num_items(length) for length in lengths.tolist()]
    assert items_of(lengths).dtype == np.int32


def test_no_sequences_have_more_items_than_there_is_scratch_for():
    """Three sequences of all lengths at which an item begins, ends or is full. For one sequence, and where each has a
    whole context, the bound is reached."""
    edges = [0, 1, 256, 257, 512, 4095, 4096, 4097, 5120, 5121, 6144, 9000]
    for lengths in itertools.combinations_with_replacement(edges, 3):
        items, total = sum(map(num_items, lengths)), sum(lengths)
        assert items <= most_items(3, total, 9000)
        assert items <= most_items(3, total, max(lengths, default=1))
    for context in edges[1:]:
        assert most_items(1, context, context) == num_items(context)
        assert most_items(64, 64 * context, context) == 64 * num_items(context)
    assert most_items(64, 131_072, 131_072) == 64 + 131_072 // 256


def test_parts_of_a_launch_lie_side_by_side():
    lengths = np.array([300, 0, 20, 5000, 1], np.int32)
    assert items_of(lengths).tolist() == [2, 0, 1, 17, 1]
    assert first_parts(lengths, 5).tolist() == [0, 2, 2, 3, 20]
    assert first_parts(lengths, 2).tolist() == [0, 2, 0, 1, 0]
    assert first_parts(lengths[:0], 5).tolist() == []


def is_right(query_start, context_len, page_table, slots, num_pages) -> bool:
    """``check_tables`` one number at a time."""
    for b, length in enumerate(context_len):
        new = query_start[b + 1] - query_start[b]
        if not 0 <= new <= 8 or not new <= length <= 64 * len(page_table[b]):
            return False
        if any(not 0 <= page < num_pages for page in page_table[b][: -(-length // 64)]):
            return False
        for i in range(new):
            place, slot = length - new + i, slots[query_start[b] + i]
            if slot not in (-1, page_table[b][place // 64] * 64 + place % 64):
                return False
    return True


def test_tables_with_one_wrong_number_are_refused():
    """One number of right tables is changed, each in turn, by one, to an edge, or to something large."""
    rng = np.random.default_rng(0)
    new, lengths = [1, 3, 0, 8, 1], [70, 3, 0, 128, 64]
    table = rng.permutation(20)[:10].reshape(5, 2)
    table[0, 1], table[1, 1] = 19, 10**6  # the second is beyond the sequence
    start = np.cumsum([0, *new])
    places = [np.arange(length - count, length) for length, count in zip(lengths, new, strict=True)]
    slots = np.concatenate([table[b, at // 64] * 64 + at % 64 for b, at in enumerate(places)])
    slots[2] = -1
    good = [np.array(x, np.int32) for x in (start, lengths, table, slots)]
    check_tables(*good, 20)
    outcomes = []
    for which, tensor in enumerate(good):
        for at, value in itertools.product(range(tensor.size), (-2, -1, 0, 1, 19, 20, 129, 2**30)):
            if which == 0 and at in (0, tensor.size - 1):  # the batch's own rows, which are all there are
                continue
            tables = [x.copy() for x in good]
            tables[which].reshape(-1)[at] = value
            right = is_right(*(x.tolist() for x in tables), 20) if which or 0 <= value < len(slots) else False
            outcomes.append(right)
            if right:
                check_tables(*tables, 20)
            else:
                with pytest.raises(KernelError):
                    check_tables(*tables, 20)
    assert 10 < sum(outcomes) < len(outcomes) - 100
