"""Memory comes from the system and is returned to it by close, on Windows and on Linux."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from exl.errors import MemoryBudgetError
from exl.memory import host
from exl.memory.host import HostBuffer, pinned_limit
from tests.host.fake_windows import FakeKernel32

LARGE = 64 << 20


@pytest.fixture
def windows(monkeypatch) -> FakeKernel32:
    kernel32 = FakeKernel32()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel32, raising=False)
    return kernel32


@pytest.fixture(params=["as it is", "windows"])
def system(request):
    return request.getfixturevalue("windows") if request.param == "windows" else None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_closing_gives_the_memory_back_while_views_live(system):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    buffer = HostBuffer(LARGE, "test")
    view = buffer.array[1 << 20 :]
    assert buffer.array.ctypes.data % 4096 == 0
    assert not view.any()
    view[:] = 7
    before = resident_bytes()
    buffer.close()
    buffer.close()
    assert before - resident_bytes() > LARGE // 2
    assert not view[:: 1 << 12].any()  # valid, zero
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.array


def test_windows_pages_go_with_their_last_view(windows):
    buffer = HostBuffer(LARGE, "test")
    view = buffer.array[:10].view(np.int16)
    buffer.close()
    del buffer
    gc.collect()
    assert list(windows.sizes.values()) == [LARGE]
    assert not view.any()
    del view
    gc.collect()
    assert windows.sizes == {}


def test_a_system_that_refuses(windows):
    with pytest.raises(MemoryBudgetError, match="weights: the system does not give"):
        HostBuffer(1 << 60, "weights")


def test_half_of_ram_may_be_pinned_on_windows(windows):
    windows.total_ram = 32 << 30
    assert pinned_limit() == 16 << 30


def test_wsl_is_windows(monkeypatch):
    monkeypatch.setattr(host.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert pinned_limit() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    monkeypatch.setattr(host.platform, "release", lambda: "6.8.0-generic")
    assert pinned_limit() is None
