"""The number of threads: what a process may use, what is refused, and what follows the time."""

from __future__ import annotations

import os

import pytest
import torch

from exl import threads
from exl.errors import ConfigError
from exl.planning.options import EngineOptions
from exl.threads import ThreadChoice, Threads, thread_limit, usable_processors, using


class Work:
    """Units of work on a machine of the test's own: ``cost[n]`` is seconds per unit with n threads."""

    def __init__(self, limit: int, cost: dict[int, float]) -> None:
        self.now = 0.0
        self.cost = cost
        self.choice = ThreadChoice(limit, lambda: self.now)
        self.used: list[int] = []

    def run(self, seconds: float) -> float:
        """Units done in that time."""
        stop, units = self.now + seconds, 0
        self.used = []
        while self.now < stop:
            count = self.choice.now
            self.now += self.cost[count]
            self.choice.took(1, self.cost[count])
            self.used.append(count)
            units += 1
        return units


def test_all_threads_stay_in_use_where_they_are_fastest():
    work = Work(4, {1: 0.004, 2: 0.002, 3: 0.0014, 4: 0.001})
    work.run(1.0)
    done = work.run(10.0)
    assert work.choice.settled == 4
    assert done > 0.97 * 10.0 / 0.001  # trials of other numbers cost next to nothing


def test_fewer_threads_are_used_as_soon_as_others_take_the_processors_and_all_again_afterwards():
    idle, shared = {1: 0.0018, 2: 0.001}, {1: 0.0036, 2: 0.07}
    work = Work(2, idle)
    work.run(5.0)
    work.cost = shared
    work.run(1.0)
    assert work.choice.settled == 1
    done = work.run(20.0)
    assert done > 0.9 * 20.0 / 0.0036
    work.cost = idle
    work.run(2.0)
    assert work.choice.settled == 2


def test_a_number_between_is_found():
    work = Work(8, {8: 0.02, 6: 0.001, 4: 0.0013, 2: 0.0025, 1: 0.005})
    work.run(1.0)
    assert work.choice.settled == 6


def test_operations_too_small_to_be_split_use_one_thread():
    work = Work(16, {n: 1e-4 * n**0.5 for n in (1, 2, 4, 8, 12, 16)})
    work.run(2.0)
    assert work.choice.settled == 1


def test_one_thread_leaves_nothing_to_choose():
    work = Work(1, {1: 0.001})
    work.run(0.5)
    assert set(work.used) == {1}


def test_threads_are_set_inside_the_block_only_even_if_it_fails():
    before = torch.get_num_threads()
    many = Threads(before + 1)
    seen = []

    def fail() -> None:
        with many.measured("work", 1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    with using(before + 2), many.all():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, 10**6])
def test_other_numbers_are_refused(value):
    with pytest.raises(ConfigError, match=r"threads: found .*, expected a whole number from 1 to \d+"):
        EngineOptions(threads=value)


def test_threads_that_are_asked_for_are_the_limit():
    assert thread_limit(1) == 1
    assert EngineOptions(threads=usable_processors()).threads == usable_processors()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_the_default():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_processors() == thread_limit() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_quota_of_the_control_group_limits_the_default(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr("exl.control_groups._ROOT", tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_processors() == expected
    with using(8):
        assert thread_limit() == expected
