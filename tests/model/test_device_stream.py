"""The stream to a GPU, on a simulated device: two queues whose work runs late and in random order, and graphs of them
by CUDA's rules for captures.

Queued work runs only when it must or at random. So a copy that does not wait for the arithmetic before it, or
arithmetic that does not wait for its copy, sees wrong bytes.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl.engine.step_graph import StepGraphs
from exl.errors import CheckpointError, ExlError
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target
from exl.memory.host import HostBuffer
from exl.ops.base import LayerWeights
from exl.weights.device_stream import DeviceStream, DiskLayers, PinnedLayers
from exl.weights.packed import PackedFile, PackedWriter
from exl.weights.reader import BufferReader, StreamedLayer
from tests.host.captures import Captures

pytestmark = pytest.mark.usefixtures("no_thread_stays")

TINY = layer_layout(
    BlobSpec(
        (NormSpec("attn_norm", 8), NormSpec("mlp_norm", 8)),
        tuple((name, (LinearSpec((MatrixSpec(name, 8, 8, 32, "f32"),)),)) for name in ("qkv", "o", "gate_up", "down")),
    ),
    Target("cpu"),
)


class Work:
    """Queued work or a node of a graph; also the event of its completion."""

    def __init__(self, device: Device, run: Callable[[], None], after: list[Work], capture: object | None) -> None:
        self.device, self.run, self.after, self.done, self.capture = device, run, after, False, capture

    def query(self) -> bool:
        self.device.captures.ask(self)
        self.device.chance()
        return self.done

    def synchronize(self) -> None:
        self.device.captures.ask(self)
        self.happen()

    def happen(self) -> None:
        stack = [self]
        while stack:
            waiting = [work for work in stack[-1].after if not work.done]
            if waiting:
                stack += waiting
            else:
                work = stack.pop()
                if not work.done:
                    work.run()
                    work.done, work.after = True, []


class Device:
    """Two in-order streams that wait for each other only by events."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tails: dict[str, Work | None] = {"copies": None, "arithmetic": None}
        self.queued: list[Work] = []
        self.awaited: list[Work] = []
        self.captures = Captures()
        self.graph: list[Work] = []  # the graph that is being captured

    def queue(self, stream: str, run: Callable[[], None], after: list[Work]) -> Work:
        self.captures.work(stream)
        tail = self.tails[stream]
        work = Work(self, run, after + ([tail] if tail else []), self.captures.capture_of(stream))
        self.tails[stream] = work
        if self.captures.active:
            self.graph.append(work)
            return self.captures.note(stream, work)
        self.queued.append(work)
        self.chance()
        return work

    def chance(self) -> None:
        """Runs some of the queued work, at random."""
        for _ in range(self.random.choice([0, 0, 1, 3])):
            if self.queued:
                self.random.choice(self.queued).happen()
        self.queued = [work for work in self.queued if not work.done]

    def finish(self) -> None:
        for work in self.queued:
            work.happen()

    # graphs

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        before = self.tails, self.awaited, self.graph
        self.tails, self.awaited, self.graph = dict.fromkeys(self.tails), [], []
        graph = self.graph
        self.captures.begin()
        try:
            run()
        finally:
            self.tails, self.awaited, self.graph = before
            self.captures.end()
        return lambda: self.arithmetic(lambda: self.run_graph(graph))

    def run_graph(self, graph: list[Work]) -> None:
        """Runs a graph's nodes in a random order that its edges allow."""
        pending, done = list(graph), set()
        while pending:
            ready = [work for work in pending if all(id(before) in done for before in work.after)]
            work = self.random.choice(ready)
            work.run()
            pending.remove(work)
            done.add(id(work))

    # the engine of copies

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Work | None) -> Work:
        if after is not None:
            self.captures.wait("copies", after)
        dst_seen = lambda: dst.copy_(src)  # noqa: E731
        return self.queue("copies", dst_seen, [after] if after else [])

    def record(self) -> Work:
        return self.arithmetic(lambda: None)

    def wait(self, event: Work) -> None:
        self.captures.wait("arithmetic", event)
        self.awaited.append(event)

    def arithmetic(self, run: Callable[[], None]) -> Work:
        after, self.awaited = self.awaited, []
        return self.queue("arithmetic", run, after)


def blob(layer_idx: int) -> np.ndarray:
    return np.full(TINY.num_bytes, layer_idx + 1, np.uint8)


def marks(weights: LayerWeights) -> set[int]:
    """All byte values that occur in a layer's views."""
    tensors = [weights.norms["attn_norm"], weights.norms["mlp_norm"]]
    tensors += [w.fields["weight"] for w in (*weights["qkv"], *weights["o"], *weights["gate_up"], *weights["down"])]
    return {int(b) for t in tensors for b in t.contiguous().view(torch.uint8).unique()}


class Model:
    """Layers ``resident`` are on the device, ``on_disk`` come through a reader thread, the others are pinned."""

    def __init__(self, folder: Path, num_layers: int, num_buffers: int, resident=(), on_disk=(), seed: int = 0) -> None:
        self.device = Device(seed)
        streamed = [i for i in range(num_layers) if i not in resident]
        host = [
            (pinned := [i for i in streamed if i not in on_disk], PinnedLayers({i: tensor(blob(i)) for i in pinned}))
        ]
        self.reader = self.packed = None
        if on_disk:
            host.append((on_disk, self._disk(folder, num_layers, on_disk)))
        views = {i: LayerWeights.view(TINY, tensor(blob(i))) for i in resident}
        buffers = [tensor(np.zeros(TINY.num_bytes, np.uint8)) for _ in range(num_buffers)]
        self.stream = DeviceStream([TINY] * num_layers, views, host, buffers, self.device)
        self.num_layers = num_layers
        self.seen: list[tuple[int, set[int]]] = []

    def _disk(self, folder: Path, num_layers: int, on_disk) -> DiskLayers:
        sizes = [TINY.num_bytes] * num_layers
        buffer = HostBuffer(TINY.num_bytes, "test")
        with PackedWriter(folder / "packed", bytes(32), "", sizes) as writer:
            for i in range(num_layers):
                buffer.array[:] = blob(i)
                writer.write(buffer.array)
            writer.commit()
        self.packed = PackedFile.open(folder / "packed", bytes(32), sizes)
        self.memory = [HostBuffer(TINY.num_bytes, "read buffer") for _ in range(2)]
        owned = ExitStack()
        for thing in (self.packed, *self.memory):
            owned.callback(thing.close)
        self.reader = BufferReader(
            self.packed, {i: StreamedLayer(i, TINY.num_bytes) for i in on_disk}, [m.array for m in self.memory], owned
        )
        return DiskLayers(self.reader)

    def run_layer(self, layer_idx: int) -> None:
        weights = self.stream.acquire(layer_idx)
        self.device.arithmetic(lambda: self.seen.append((layer_idx, marks(weights))))
        self.stream.release(layer_idx)

    def run_pass(self, length: int | None = None) -> None:
        self.stream.begin(range(self.num_layers))
        for layer_idx in range(self.num_layers if length is None else length):
            self.run_layer(layer_idx)

    def check(self) -> None:
        self.device.finish()
        assert all(found == {layer_idx + 1} for layer_idx, found in self.seen), self.seen

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


@given(
    num_layers=st.integers(1, 7),
    num_buffers=st.integers(1, 4),
    resident=st.sets(st.integers(0, 6)),
    on_disk=st.sets(st.integers(0, 6)),
    lengths=st.lists(st.one_of(st.none(), st.integers(0, 7)), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=80, deadline=None)
def test_arithmetic_sees_its_own_layer(tmp_path_factory, num_layers, num_buffers, resident, on_disk, lengths, seed):
    """Passes, some of them cut short, from both tiers, whatever happens when."""
    resident = {i for i in resident if i < num_layers}
    if len(resident) == num_layers:
        resident.pop()
    on_disk = sorted(i for i in on_disk if i < num_layers and i not in resident)
    model = Model(tmp_path_factory.mktemp("m"), num_layers, num_buffers, resident, on_disk, seed)
    try:
        for length in lengths:
            model.run_pass(None if length is None else min(length, num_layers))
        model.check()
        assert len(model.seen) == sum(num_layers if n is None else min(n, num_layers) for n in lengths)
    finally:
        model.close()


def test_a_device_without_events_is_caught(tmp_path):
    """The test above can fail: it detects copies that do not wait for arithmetic."""
    found = []
    for seed in range(20):
        model = Model(tmp_path, 5, 2, seed=seed)
        copy = model.device.copy
        model.device.copy = lambda dst, src, after, copy=copy: copy(dst, src, None)
        for _ in range(3):
            model.run_pass()
        model.device.finish()
        found.append(any(seen != {layer_idx + 1} for layer_idx, seen in model.seen))
    assert any(found)


def test_copies_run_ahead_of_the_arithmetic(tmp_path):
    """While a layer is computed, copies of the next layers are queued, also across the end of a pass."""
    model = Model(tmp_path, 6, 2)
    copies = []
    copy = model.device.copy
    model.device.copy = lambda dst, src, after: copies.append(int(src[0]) - 1) or copy(dst, src, after)
    model.stream.begin(range(6))
    for layer_idx in range(6):
        model.stream.acquire(layer_idx)
        assert copies == [*range(2, min(6, layer_idx + 2)), *([0] if layer_idx == 5 else [])]  # 0, 1: before
        model.stream.release(layer_idx)
    assert copies == [2, 3, 4, 5, 0, 1]


def test_a_layers_address_never_changes(tmp_path):
    """So that a step can be a graph: the i-th streamed layer has buffer i mod S, whatever ran before."""
    model = Model(tmp_path, 5, 2, resident={1})
    addresses = {}
    for length in (None, 3, None, 1, None):
        model.stream.begin(range(5))
        for layer_idx in range(5 if length is None else length):
            address = model.stream.acquire(layer_idx).norms["attn_norm"].data_ptr()
            assert addresses.setdefault(layer_idx, address) == address
            model.stream.release(layer_idx)
    assert addresses[0] == addresses[3] != addresses[2] == addresses[4]


def test_a_settled_stream_waits_for_nothing_before(tmp_path):
    """A graph must not wait for work that was queued before its capture, and must join its copies before it ends."""
    model = Model(tmp_path, 4, 2)
    model.run_pass()
    model.stream.settle()
    assert not any(work for work in model.device.queued if not work.done)
    waits, device = [], model.device
    device.wait = waits.append
    model.stream.begin(range(4))
    model.stream.acquire(0)
    assert waits == []
    model.stream.release(0)
    model.stream.join()
    assert [work.done or work in device.queued for work in waits] == [True]


@given(
    num_layers=st.integers(2, 7),
    num_buffers=st.integers(1, 4),
    given_up=st.one_of(st.none(), st.integers(0, 7)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_what_is_replayed_finds_the_first_layers(tmp_path_factory, num_layers, num_buffers, given_up, seed):
    """Arithmetic of a graph waits for nothing by itself: after ``rest`` it reads the first layers, though a pass before
    it has only just queued their copies, or was given up in its middle. A pass after it overwrites none too soon."""
    model = Model(tmp_path_factory.getbasetemp(), num_layers, num_buffers, seed=seed)
    model.run_pass(None if given_up is None else min(given_up, num_layers))
    for _ in range(2):
        model.stream.rest()
        for layer_idx in range(min(num_layers, num_buffers)):
            weights = model.stream._views[layer_idx]
            model.device.arithmetic(lambda i=layer_idx, w=weights: model.seen.append((i, marks(w))))
        model.stream.replayed()
        model.run_pass()
    model.check()


@given(
    num_layers=st.integers(1, 7),
    num_buffers=st.integers(1, 4),
    resident=st.sets(st.integers(0, 6)),
    work=st.lists(st.one_of(st.sampled_from("abab"), st.integers(0, 7), st.just(None)), min_size=4, max_size=12),
    held=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@example(num_layers=5, num_buffers=2, resident=set(), work=["a", "a", "a"], held=False, seed=0)
@settings(max_examples=100, deadline=None)
def test_steps_as_graphs_see_their_own_layers(tmp_path_factory, num_layers, num_buffers, resident, work, held, seed):
    """Steps of two shapes, plain, captured and replayed, between passes that are run to their end or given up, with a
    layer in use (``held``) or not. No event of a capture is waited for outside of it, nor the other way round, and
    inside of a graph its own edges keep copies and arithmetic apart."""
    resident = {i for i in resident if i < num_layers}
    if len(resident) == num_layers:
        resident.pop()
    model = Model(tmp_path_factory.getbasetemp(), num_layers, num_buffers, resident, seed=seed)
    ops = SimpleNamespace(capture=model.device.capture, backend=SimpleNamespace(arch=86), dependent=True)
    graphs = StepGraphs(ops, model.stream)
    expected = 0
    for item in work:
        length = num_layers if item is None or isinstance(item, str) else min(item, num_layers)
        if isinstance(item, str):
            graphs.run(item, model.run_pass)
        else:
            model.run_pass(length)
            if held and length < num_layers:
                model.stream.acquire(length)
        expected += length
    assert graphs.reason is None
    model.check()
    assert len(model.seen) == expected


def test_errors_of_the_disk_come_out_where_the_layer_is_asked_for(tmp_path, monkeypatch):
    def broken(*args):
        raise CheckpointError("packed: layer 2 is damaged")

    model = Model(tmp_path, 6, 2, resident={0}, on_disk=[1, 2, 3, 4, 5])
    try:
        model.run_pass()
        model.check()
        monkeypatch.setattr(PackedFile, "read_blob", broken)
        model.run_layer(0)
        with pytest.raises(CheckpointError, match="damaged"):
            model.run_pass()
    finally:
        model.close()


def test_misuse_is_refused(tmp_path):
    model = Model(tmp_path, 4, 2, resident={0})
    with pytest.raises(ValueError, match="layer 1 is not acquired"):
        model.stream.release(1)
    model.stream.acquire(1)
    with pytest.raises(ValueError, match="its buffer is acquired, by layer 1"):
        model.stream.acquire(3)
    with pytest.raises(ValueError, match="layer 7 is not in the order"):
        model.stream.acquire(7)
    with pytest.raises(ValueError, match="either resident or streamed"):
        DeviceStream([TINY] * 3, {}, [([0, 1], PinnedLayers({}))], [tensor(blob(0))], model.device)


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_closing_waits_for_copies_before_host_memory_goes(tmp_path, how):
    """Page-locked memory that a copy still reads must not be unlocked."""
    model = Model(tmp_path, 5, 2, resident={0}, on_disk=[3, 4])
    model.device.chance = lambda: None  # nothing happens before it is waited for
    stream, buffers = model.stream, model.stream._buffers
    in_flight: list[bool] = []

    def watch(close: Callable[[], None]) -> Callable[[], None]:
        def watched() -> None:
            in_flight.append(any(buffer.loaded is not None and not buffer.loaded.done for buffer in buffers))
            close()

        return watched

    for _, tier in stream._host:
        tier.close = watch(tier.close)
    stream.begin(range(5))
    assert not all(buffer.loaded.done for buffer in buffers)
    if how == "close":
        stream.close()
        stream.close()
        with pytest.raises(ExlError, match="closed"):
            stream.acquire(0)
        with pytest.raises(ExlError, match="closed"):
            stream.begin(range(5))
    else:
        del stream, model.stream
        gc.collect()
    assert in_flight == [False, False]
