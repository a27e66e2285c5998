"""A read that hangs still writes to its buffer: neither that memory nor its file may go before the read returns."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter

import pytest
import torch

from exl.checkpoint import block_file
from exl.engine import build
from exl.memory.host import HostBuffer
from exl.planning.options import EngineOptions
from exl.weights import loader, placement, reader
from exl.weights.packed import PackedFile
from tests.model.placed_model import PlacedModel, reader_threads

pytestmark = pytest.mark.usefixtures("no_thread_stays")


class Hang:
    """Reads of the reader thread block until ``let_go``; counts what is closed, and when."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.closed: Counter[str] = Counter()
        self._began, self._go_on = threading.Event(), threading.Event()
        hang, plain_read, plain_close = self, block_file.BlockFile._read_some, PackedFile.close

        def read(file, view, offset):
            if threading.current_thread().name == "exl layer reader":
                hang._began.set()
                assert hang._go_on.wait(30)
                view[:1] = b"x"  # the buffer is still there
            return plain_read(file, view, offset)

        def close(file):
            hang.closed["file"] += 1
            plain_close(file)

        class CountedBuffer(HostBuffer):
            def __init__(self, num_bytes, purpose):
                super().__init__(num_bytes, purpose)
                self.purpose = purpose

            def close(self):
                if self._array is not None or self.purpose in ("stream buffers", "pinned read buffers"):
                    hang.closed[self.purpose] += 1
                super().close()

        patch.setattr(block_file.BlockFile, "_read_some", read)
        patch.setattr(PackedFile, "close", close)
        patch.setattr(placement, "HostBuffer", CountedBuffer)
        patch.setattr(reader, "_CLOSE_SECONDS", 0.05)

    def wait(self) -> None:
        assert self._began.wait(30)

    def let_go(self) -> None:
        self._go_on.set()
        deadline = time.monotonic() + 30
        while reader_threads() and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def hang(monkeypatch):
    hang = Hang(monkeypatch)
    yield hang
    hang.let_go()


@pytest.fixture(params=["stream buffers", "pinned read buffers"])
def purpose(request, monkeypatch):
    """Where a CPU reads to, and a GPU, which this machine's memory stands in for."""
    if request.param == "pinned read buffers":

        def on_device(layouts, resident, num_buffers, stack):
            return placement.DeviceWeights(layouts.blobs, resident, (1,), num_buffers, torch.device("cpu"), stack)

        monkeypatch.setattr(loader, "HostWeights", on_device)
    return request.param


def check(hang: Hang, purpose: str) -> None:
    """What the reader uses is there until its read returns, and is closed once."""
    assert (hang.closed["file"], hang.closed[purpose]) == (0, 0)
    hang.let_go()
    assert reader_threads() == []
    assert (hang.closed["file"], hang.closed[purpose]) == (1, 1)


@pytest.mark.parametrize("how", ["close", "garbage", "close, then garbage", "close twice"])
def test_a_hanging_read_keeps_its_buffer_and_its_file(hang, purpose, four_bit, tmp_path, how):
    model = PlacedModel(four_bit, tmp_path)
    hang.wait()
    if "close" in how:
        model.weights.close()
    if how == "close twice":
        model.source.close()
        model.weights.close()
    if "garbage" in how:
        del model
        gc.collect()
    check(hang, purpose)


@pytest.mark.parametrize("place", ["stream", "runner"])
def test_a_load_that_fails_while_a_read_hangs(hang, purpose, four_bit, tmp_path, monkeypatch, place):
    def broken(*args, **kwargs):
        if place == "stream":
            host = args[2] if purpose == "stream buffers" else args[2][-1][1]
            host.begin((0,))
        hang.wait()
        raise RuntimeError("half way")

    if place == "runner":
        monkeypatch.setattr(build, "Runner", broken)
    else:
        for name in ("LayerStream", "DeviceStream"):
            monkeypatch.setattr(placement, name, broken)
    options = EngineOptions(device="cpu", resident_layers=0, context=64, packed_folder=tmp_path)
    with pytest.raises(RuntimeError, match="half way"):
        build.load_engine(four_bit, options)
    check(hang, purpose)


def test_what_a_finished_reader_used_is_closed_once(purpose, four_bit, tmp_path, monkeypatch):
    hang = Hang(monkeypatch)
    hang._go_on.set()
    model = PlacedModel(four_bit, tmp_path)
    model.tokens()
    model.weights.close()
    assert (hang.closed["file"], hang.closed[purpose]) == (1, 1)
    model.weights.close()
    del model
    gc.collect()
    assert (hang.closed["file"], hang.closed[purpose]) == (1, 1)
