"""Reading ahead: every tensor as the file has it, whatever is in the ring, and errors that name what was read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl.checkpoint import page_reader
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.page_reader import PAGE, PageReader
from exl.errors import CheckpointError
from exl.memory.host import HostBuffer
from exl.models.packing_order import PackingOrder, TensorPart
from exl.weights import read_ahead
from exl.weights.read_ahead import ReadAhead

LAYERS = [["0.a", "0.b"], ["1.a", "1.b"], ["2.b", "2.a"], [], ["3.a"]]


@pytest.fixture
def checkpoint(tmp_path):
    """Layers of very different sizes, whose tensors lie apart in the file, and two tables."""
    rng = np.random.default_rng(1)
    sizes = {"0.a": 9000, "0.b": 5, "1.a": 30001, "1.b": 70000, "2.a": 1, "2.b": 4096, "3.a": 20000}
    sizes |= {"embed": 150_003, "head": 90_000, "other": 12_345}
    tensors = {name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        yield checkpoint


@pytest.fixture(params=[1, 8], ids=["small ring", "roomy ring"])
def small_steps(request, monkeypatch):
    """Reads of two pages, in a ring that has hardly room for two layers, or for more."""
    monkeypatch.setattr(read_ahead, "_STEP_BYTES", 2 * PAGE)
    monkeypatch.setattr(read_ahead, "read_ahead_bytes", lambda layer, table: request.param * max(layer, 2 * PAGE))


def in_order(
    checkpoint: Checkpoint, layers: Sequence[Sequence[str]], experts: Sequence[Sequence[TensorPart]] = ()
) -> PackingOrder:
    """Whole tensors of layers, by their names."""
    parts = [[TensorPart(name, 0, checkpoint.info(name).num_bytes) for name in names] for names in layers]
    return PackingOrder(tuple(map(tuple, parts)), tuple(map(tuple, experts)))


def whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return np.fromfile(checkpoint.folder / "model.safetensors", np.uint8)[
        checkpoint.info(name).start : checkpoint.info(name).stop
    ]


def test_everything_is_as_in_the_file(checkpoint, small_steps):
    with ReadAhead(checkpoint, "embed", in_order(checkpoint, LAYERS), "head") as ahead:
        table = np.zeros(150_003, np.uint8)
        ahead.tables().read_into("embed", table)
        np.testing.assert_array_equal(table, whole(checkpoint, "embed"))
        for i, names in enumerate(LAYERS):
            layer = ahead.layer(i)
            for name in [*names, "other"]:  # one that was not read ahead comes from the file
                np.testing.assert_array_equal(layer.read(name), whole(checkpoint, name))
        table = np.zeros(90_000, np.uint8)
        ahead.tables().read_into("head", table)
        np.testing.assert_array_equal(table, whole(checkpoint, "head"))
        again = np.zeros(150_003, np.uint8)
        ahead.tables().read_into("embed", again)  # a tied head: from the file
        np.testing.assert_array_equal(again, whole(checkpoint, "embed"))


def test_experts_come_last_and_may_be_parts_of_tensors(checkpoint, small_steps):
    """Two parts of one tensor, the second with another tensor; bytes outside of a part come from the file."""
    parts = [[TensorPart("3.a", 0, 7000)], [TensorPart("3.a", 7000, 20000), TensorPart("other", 0, 12_345)]]
    layers, tensor = LAYERS[:2], whole(checkpoint, "3.a")
    with ReadAhead(checkpoint, "embed", in_order(checkpoint, layers, parts), "head") as ahead:
        for i in range(len(layers)):
            ahead.layer(i)
        ahead.tables().read_into("head", np.zeros(90_000, np.uint8))
        first = ahead.expert(0)
        np.testing.assert_array_equal(first.read_bytes("3.a", 10, 6990), tensor[10:7000])
        np.testing.assert_array_equal(first.read_bytes("3.a", 6990, 20), tensor[6990:7010])
        second = ahead.expert(1)
        np.testing.assert_array_equal(second.read_bytes("3.a", 7001, 12_999), tensor[7001:])
        np.testing.assert_array_equal(second.read_bytes("3.a", 6999, 5), tensor[6999:7004])
        np.testing.assert_array_equal(second.read("other"), whole(checkpoint, "other"))


def test_what_nobody_asks_for_is_passed_over(checkpoint, small_steps):
    with ReadAhead(checkpoint, "embed", in_order(checkpoint, LAYERS), None) as ahead:
        for i in (1, 4):
            for name in LAYERS[i]:
                np.testing.assert_array_equal(ahead.layer(i).read(name), whole(checkpoint, name))


def test_a_file_that_was_cut_off_is_an_error_that_names_the_tensor(checkpoint):
    names = sorted(checkpoint.tensors, key=lambda name: checkpoint.info(name).start)
    os.truncate(checkpoint.folder / "model.safetensors", checkpoint.info(names[-1]).start)
    with (
        ReadAhead(checkpoint, None, in_order(checkpoint, [[names[-1]]]), None) as ahead,
        pytest.raises(CheckpointError, match=f"model.safetensors: ended at byte .* tensor '{names[-1]}'"),
    ):
        ahead.layer(0)


@pytest.mark.parametrize("way", ["direct", "slow disk", "cached", "another file has its name"])
def test_pages_are_the_same_by_every_way(checkpoint, monkeypatch, way):
    path = checkpoint.folder / "model.safetensors"
    expected = path.read_bytes()
    cached = way == "cached"
    monkeypatch.setattr(Checkpoint, "is_cached", lambda self, file, offset: cached)
    monkeypatch.setattr(page_reader, "_TIMED_BYTES", 0)
    monkeypatch.setattr(page_reader, "_FAST", 1e18 if way == "slow disk" else 0.0)
    if way == "another file has its name":
        path.rename(path.with_name("before"))
        path.write_bytes(bytes(len(expected)))
    reader = PageReader(checkpoint)
    buffer = HostBuffer(len(expected), "test")
    try:
        for start in range(0, len(expected), 5 * PAGE):
            view = memoryview(buffer.array)[start : start + 5 * PAGE]
            reader.read_into("model.safetensors", view, start, "a page")
        assert buffer.array.tobytes() == expected
    finally:
        reader.close()
        buffer.close()
