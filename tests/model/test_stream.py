"""Streamed layers give the same bits as resident ones, and every fault is an error, never a wrong result."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from exl.checkpoint import block_file
from exl.errors import ExlError
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target
from exl.memory.host import HostBuffer
from exl.ops.base import LayerWeights
from exl.sampling_params import SamplingParams
from exl.weights import placement
from exl.weights.packed import PackedFile, PackedWriter
from exl.weights.reader import BufferReader, StreamedLayer
from exl.weights.stream import LayerStream, ResidentWeights
from tests.model import test_quantized
from tests.model.hf_models import CASES, build, save
from tests.model.placed_model import IDS, NUM_LAYERS, PlacedModel, reader_threads

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module", params=["4-bit", "3-bit, own orders", "dense", "dense, tied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    if "dense" in request.param:
        case = next(case for case in CASES if case.name == ("qwen3-tied" if "tied" in request.param else "qwen2"))
        return save(build(replace(case, options={**case.options, "num_hidden_layers": NUM_LAYERS})), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_quantized, "LAYERS", NUM_LAYERS)
        order = "own" if "own" in request.param else "none"
        test_quantized.make(path, int(request.param[0]), 32, order=order)
    return path


# --- the same results ------------------------------------------------------------------------------------------------


def test_every_placement_gives_the_same_bits(folder, tmp_path):
    with PlacedModel(folder, None, resident=range(NUM_LAYERS)) as model:
        assert isinstance(model.source, ResidentWeights)
        expected = model.outputs()
    for count in range(NUM_LAYERS):
        for resident in itertools.combinations(range(NUM_LAYERS), count):
            for num_buffers in (2, 3) if count else (1, 2, 3):
                with PlacedModel(folder, tmp_path, resident, num_buffers) as model:
                    assert isinstance(model.source, LayerStream)
                    assert model.outputs() == expected, (resident, num_buffers)
    assert len(list(tmp_path.iterdir())) == 1
    with PlacedModel(folder, tmp_path, resident=range(NUM_LAYERS)) as model:  # now from the packed file
        assert model.outputs() == expected


def test_layers_do_differ(four_bit, tmp_path):
    """Otherwise the test above could not detect exchanged layers."""
    with PlacedModel(four_bit, tmp_path) as model:
        right = model.logits()
        layers = model.source._reader._layers
        layers[1], layers[2] = layers[2], layers[1]
        model.source.wait_until_idle()
        for buffer in model.source._reader.buffers:
            buffer.layer_idx = None
        assert not torch.equal(model.logits(), right)


def test_blobs_are_the_same_bytes_everywhere(four_bit, tmp_path, monkeypatch):
    """Between fields, too, whatever was in the buffer through which a layer went to the file."""

    class UsedBuffer(HostBuffer):
        def __init__(self, num_bytes, purpose):
            super().__init__(num_bytes, purpose)
            if purpose == "stream buffers":
                self.array[:] = 255

    monkeypatch.setattr(placement, "HostBuffer", UsedBuffer)
    packed_folder = tmp_path / "packed"
    with PlacedModel(four_bit, packed_folder, resident=(1,)) as model:
        first = {i: bytes_of(model, i) for i in range(NUM_LAYERS)}
    with PlacedModel(four_bit, None, resident=range(NUM_LAYERS)) as model:
        assert {i: bytes_of(model, i) for i in range(NUM_LAYERS)} == first


def bytes_of(model: PlacedModel, layer_idx: int) -> bytes:
    layer = model.source.acquire(layer_idx)
    norm = layer.norms["attn_norm"]
    fields = [norm, *(t for part in (*layer["qkv"], *layer["down"]) for t in part.fields.values())]
    assert all(field.untyped_storage().data_ptr() == norm.untyped_storage().data_ptr() for field in fields)
    start = norm.storage_offset() * norm.itemsize  # offset of the blob's first field
    memory = torch.empty(0, dtype=torch.uint8).set_(norm.untyped_storage())
    whole = memory[start : start + model.sizes[layer_idx]].numpy().tobytes()
    model.source.release(layer_idx)
    return whole


def test_a_pass_reads_each_streamed_layer_once(four_bit, tmp_path):
    """At most, counted by the operating system: what a slow reader finds still in a buffer it need not read. The next
    pass's first layers count for this one's."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("no /proc/self/io")

    def bytes_read() -> int:
        assert model.source.wait_until_idle(10)
        return int(counters.read_text().split()[1])

    with PlacedModel(four_bit, tmp_path, resident=(2,)) as model:
        streamed = sum(model.sizes) - model.sizes[2]
        model.logits()
        for run, num_passes in ((model.logits, 2), (lambda: model.tokens(5), 5)):
            before = bytes_read()
            run()
            found = bytes_read() - before
            assert num_passes * streamed / 3 <= found < num_passes * streamed + 4096  # for reading the counter itself


def test_layers_that_all_fit_into_the_buffers_are_read_once(four_bit, tmp_path):
    with PlacedModel(four_bit, tmp_path, resident=(0, 3), num_buffers=2) as model:
        model.tokens()
        model.logits()
        assert model.source.stats.num_reads == 2


# --- order and buffers -----------------------------------------------------------------------------------------------

_TINY = layer_layout(
    BlobSpec(
        (NormSpec("attn_norm", 1024), NormSpec("mlp_norm", 8)),
        tuple((name, (LinearSpec((MatrixSpec(name, 8, 8, 32, "f32"),)),)) for name in ("qkv", "o", "gate_up", "down")),
    ),
    Target("cpu"),
)


def tiny_stream(folder: Path, num_layers: int, num_buffers: int, resident=()) -> tuple[LayerStream, list[bytes]]:
    """A stream over blobs of random bytes."""
    rng = np.random.default_rng(num_layers)
    contents = [rng.integers(0, 256, _TINY.num_bytes, dtype=np.uint8) for _ in range(num_layers)]
    sizes = [_TINY.num_bytes] * num_layers
    path = folder / f"{num_layers}"
    buffer = HostBuffer(_TINY.num_bytes, "test")
    with PackedWriter(path, bytes(32), "", sizes) as writer:
        for blob in contents:
            buffer.array[:] = blob
            writer.write(buffer.array)
        writer.commit()
    views = {i: LayerWeights.view(_TINY, torch.from_numpy(contents[i])) for i in resident}
    streamed = {i: i for i in range(num_layers) if i not in resident}
    buffers = [HostBuffer(_TINY.num_bytes, "stream buffer") for _ in range(num_buffers)]
    packed = PackedFile.open(path, bytes(32), sizes)
    owned = ExitStack()
    for thing in (packed, *buffers):
        owned.callback(thing.close)
    arrays = [buffer.array for buffer in buffers]
    reader = BufferReader(packed, {i: StreamedLayer(b, _TINY.num_bytes) for i, b in streamed.items()}, arrays, owned)
    stream = LayerStream([_TINY] * num_layers, views, reader)
    return stream, [blob[:4096].tobytes() for blob in contents]


class Schedule(RuleBasedStateMachine):
    """Passes in any order, cut short anywhere, with a reader that is slow at random: an acquired layer is the requested
    one, and stays intact until it is released."""

    @initialize(
        num_layers=st.integers(2, 6),
        num_buffers=st.integers(1, 3),
        resident=st.sets(st.integers(1, 5)),
        seed=st.integers(),
    )
    def start(self, num_layers, num_buffers, resident, seed):
        self.patch = pytest.MonkeyPatch()
        plain, rng = PackedFile.read_blob, np.random.default_rng(abs(seed))

        def slow(file, blob_idx, out, go_on):
            out[:] = 255  # what a reader in the wrong buffer would show
            time.sleep(rng.choice([0, 0, 0.0005]))
            return plain(file, blob_idx, out, go_on) if go_on() else False

        self.patch.setattr(PackedFile, "read_blob", slow)
        self.resident = {i for i in resident if i < num_layers}
        self.stream, self.expected = tiny_stream(TEMPORARY, num_layers, num_buffers, self.resident)
        self.num_buffers, self.num_layers = num_buffers, num_layers
        self.order, self.at = list(range(num_layers)), 0
        self.held: list[tuple[int, torch.Tensor]] = []

    @rule(data=st.data())
    def begin(self, data):
        self.order = data.draw(st.permutations(range(self.num_layers)))
        self.stream.begin(self.order)
        self.at, self.held = 0, []

    @precondition(lambda self: sum(i not in self.resident for i, _ in self.held) < self.num_buffers)
    @rule(skip=st.integers(0, 2))
    def acquire(self, skip):
        self.at = (self.at + skip) % self.num_layers
        layer_idx = self.order[self.at]
        self.at = (self.at + 1) % self.num_layers
        self.held.append((layer_idx, self.stream.acquire(layer_idx).norms["attn_norm"]))
        self.check()

    @precondition(lambda self: self.held)
    @rule(last=st.booleans())
    def release(self, last):
        self.check()
        layer_idx, _ = self.held.pop(-1 if last else 0)
        self.stream.release(layer_idx)

    def check(self):
        for layer_idx, norm in self.held:
            assert norm.numpy().tobytes() == self.expected[layer_idx]

    def teardown(self):
        if hasattr(self, "stream"):
            self.check()
            self.stream.close()
            self.patch.undo()


TEMPORARY = Path()


def test_any_schedule(tmp_path):
    global TEMPORARY
    TEMPORARY = tmp_path
    run_state_machine_as_test(
        Schedule, settings=settings(max_examples=60, stateful_step_count=30, deadline=None, database=None)
    )


def test_wrong_use_is_an_error_not_a_hang(tmp_path):
    stream, _ = tiny_stream(tmp_path, 4, 2)
    stream.acquire(0)
    stream.acquire(1)
    with pytest.raises(ValueError, match="all 2 buffers are acquired"):
        stream.acquire(2)
    with pytest.raises(ValueError, match="layer 3 is not acquired"):
        stream.release(3)
    with pytest.raises(ValueError, match="layer 4 of a model of 4"):
        stream.begin([0, 4])
    stream.begin([1, 2])
    with pytest.raises(ValueError, match="layer 0 is not in the order"):
        stream.acquire(0)
    stream.close()
    stream.close()
    for use in (lambda: stream.acquire(1), lambda: stream.begin([0])):
        with pytest.raises(ExlError, match="closed"):
            use()


# --- the thread ------------------------------------------------------------------------------------------------------


def test_closing_does_not_wait_for_the_end_of_a_read(tmp_path, monkeypatch):
    started, plain = threading.Event(), block_file.BlockFile._read_some
    calls = []

    def slow(self, view, offset):
        calls.append(offset)
        started.set()
        time.sleep(0.05)
        return min(4, plain(self, view, offset))  # 4 bytes at a time: 400 ms and more for each layer

    stream, _ = tiny_stream(tmp_path, 4, 2)
    for i in range(4):  # the next time, without checksums, blocks may be of any size
        stream.acquire(i)
        stream.release(i)
    stream.wait_until_idle()
    monkeypatch.setattr(block_file, "BLOCK_BYTES", 4)
    monkeypatch.setattr(block_file.BlockFile, "_read_some", slow)
    stream.begin([3, 2])
    assert started.wait(10)
    stream.close()
    assert reader_threads() == []
    assert len(calls) < 20


def test_a_stream_that_nobody_closes_ends_with_its_last_reference(four_bit, tmp_path):
    model = PlacedModel(four_bit, tmp_path)
    model.tokens(2)
    assert set(reader_threads()) == {"exl layer reader"}
    del model
    gc.collect()
    assert reader_threads() == []


def test_a_waiting_caller_hears_that_the_stream_was_closed(tmp_path, monkeypatch):
    release = threading.Event()
    stream, _ = tiny_stream(tmp_path, 4, 2)
    stream.wait_until_idle()
    monkeypatch.setattr(block_file.BlockFile, "_read_some", lambda self, view, offset: release.wait(10) and 0)
    stream.begin([3])
    closing = threading.Timer(0.1, stream.close)
    closing.start()
    threading.Timer(0.3, release.set).start()
    with pytest.raises(ExlError, match=r"closed|ended at byte"):
        stream.acquire(3)
    closing.join()


def test_a_new_pass_forgets_what_failed_before(tmp_path, monkeypatch):
    stream, expected = tiny_stream(tmp_path, 4, 2)
    stream.wait_until_idle()
    with monkeypatch.context() as patch:
        patch.setattr(PackedFile, "read_blob", lambda *args: 1 // 0)
        stream.begin([2, 3])
        assert stream.wait_until_idle()
    stream.begin([2, 3])
    assert stream.acquire(2).norms["attn_norm"].numpy().tobytes() == expected[2]
    stream.close()


# --- interrupted passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_calls", [1, 2, 3, 7])
def test_an_interrupted_pass_leaves_the_stream_usable(four_bit, tmp_path, num_calls):
    with PlacedModel(four_bit, tmp_path) as model:
        expected = model.outputs()
        ops = model.generator.runner.decoder.ops
        calls = itertools.count(1)

        def gated_mlp(*args):
            if next(calls) == num_calls:
                raise KeyboardInterrupt
            type(ops).gated_mlp(ops, *args)

        ops.gated_mlp = gated_mlp
        with pytest.raises(KeyboardInterrupt):
            model.logits()
        del ops.gated_mlp
        assert model.outputs() == expected


def test_a_generator_closed_early(four_bit, tmp_path):
    with PlacedModel(four_bit, tmp_path, resident=(1,), num_buffers=3) as model:
        expected = model.outputs()
        for _ in range(3):
            chunks = model.generator.logits(IDS)
            next(chunks)
            chunks.close()
            tokens = model.generator.stream(IDS[:20], SamplingParams(max_tokens=9, temperature=0.0))
            next(tokens)
            tokens.close()
        assert model.outputs() == expected
