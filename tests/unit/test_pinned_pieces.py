"""Each layer is page-locked by itself, and what the driver refuses is one error that says how far it came."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from exl import device_memory
from exl.device_memory import pinned_pieces
from exl.errors import MemoryBudgetError
from exl.host_memory import HostBuffer

PAGE = 4096


@pytest.fixture
def driver(monkeypatch):
    """The driver's ranges, in order: locked ones as (offset, bytes); it refuses to lock more than ``limit`` at all."""
    calls, held = [], []
    limit = [1 << 40]

    @contextmanager
    def pinned(piece, *_):
        if sum(size for _, size in held) + piece.num_bytes > limit[0]:
            raise MemoryBudgetError(f"pinned memory: the driver does not lock {piece.num_bytes} bytes (out of memory)")
        item = (piece.array.ctypes.data, piece.num_bytes)
        held.append(item)
        calls.append(item)
        try:
            yield piece
        finally:
            held.remove(item)

    monkeypatch.setattr(device_memory, "pinned", pinned)
    monkeypatch.setattr(device_memory.mmap, "PAGESIZE", PAGE)
    return calls, held, limit


def test_every_piece_is_locked_by_itself(driver):
    calls, held, _ = driver
    sizes = [3 * PAGE, PAGE, 5 * PAGE]
    buffer = HostBuffer(sum(sizes), "test")
    start = buffer.array.ctypes.data
    with pinned_pieces(buffer, sizes) as locked:
        assert locked is buffer
        assert [(address - start, size) for address, size in calls] == [
            (0, 3 * PAGE), (3 * PAGE, PAGE), (4 * PAGE, 5 * PAGE)
        ]  # fmt: skip
        assert held == calls
    assert held == []


def test_pieces_that_share_a_page_of_the_system_are_locked_as_one(driver, monkeypatch):
    monkeypatch.setattr(device_memory.mmap, "PAGESIZE", 16 * PAGE)
    buffer = HostBuffer(4 * PAGE, "test")
    with pinned_pieces(buffer, [PAGE, 3 * PAGE]):
        assert [size for _, size in driver[0]] == [4 * PAGE]


def test_a_refusal_says_how_far_it_came_and_unlocks(driver):
    _, held, limit = driver
    limit[0] = 5 * PAGE
    buffer = HostBuffer(9 * PAGE, "test")
    with (
        pytest.raises(
            MemoryBudgetError, match=rf"lock {4 * PAGE} bytes .*, after {5 * PAGE} of {9 * PAGE}: a smaller ram="
        ),
        pinned_pieces(buffer, [2 * PAGE, 3 * PAGE, 4 * PAGE]),
    ):
        raise AssertionError("not reached")
    assert held == []
