"""Each layer is page-locked by itself; if the driver refuses, one error says how much was locked."""

from __future__ import annotations

import pytest

from exl.errors import MemoryBudgetError
from exl.memory import device
from exl.memory.device import pinned
from exl.memory.host import HostBuffer

PAGE = 4096


class Driver:
    """Locked ranges as address -> bytes; it refuses to lock more than ``limit`` bytes in total."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.calls: list[tuple[int, int]] = []
        self.held: dict[int, int] = {}

    def register(self, address: int, num_bytes: int) -> int:
        if sum(self.held.values()) + num_bytes > self.limit:
            return 2
        self.calls.append((address, num_bytes))
        self.held[address] = num_bytes
        return 0

    def unregister(self, address: int) -> int:
        del self.held[address]
        return 0

    def text(self, error: int) -> str:
        return "out of memory"

    def clear(self) -> None:
        pass


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(device.mmap, "PAGESIZE", PAGE)
    return Driver()


def test_every_piece_is_locked_by_itself(driver):
    sizes = [3 * PAGE, PAGE, 5 * PAGE]
    buffer = HostBuffer(sum(sizes), "test")
    start = buffer.array.ctypes.data
    with pinned(buffer, runtime=driver, pieces=sizes) as locked:
        assert locked is buffer
        assert [(address - start, size) for address, size in driver.calls] == [
            (0, 3 * PAGE), (3 * PAGE, PAGE), (4 * PAGE, 5 * PAGE)
        ]  # fmt: skip
        assert driver.held == dict(driver.calls)
    assert driver.held == {}


def test_pieces_that_share_a_page_of_the_system_are_locked_as_one(driver, monkeypatch):
    monkeypatch.setattr(device.mmap, "PAGESIZE", 16 * PAGE)
    buffer = HostBuffer(4 * PAGE, "test")
    with pinned(buffer, runtime=driver, pieces=[PAGE, 3 * PAGE]):
        assert [size for _, size in driver.calls] == [4 * PAGE]


def test_a_refusal_says_how_far_it_came_and_unlocks(driver):
    driver.limit = 5 * PAGE
    buffer = HostBuffer(9 * PAGE, "test")
    with (
        pytest.raises(
            MemoryBudgetError, match=rf"lock {4 * PAGE} bytes .*, after {5 * PAGE} of {9 * PAGE}: a smaller ram="
        ),
        pinned(buffer, runtime=driver, pieces=[2 * PAGE, 3 * PAGE, 4 * PAGE]),
    ):
        raise AssertionError("not reached")
    assert driver.held == {}
