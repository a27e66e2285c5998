"""The embedding in VRAM, in pinned RAM and on the disk, through the kernels on the host shim: the same bits, the memory
that the plan says, and rows that are read in time."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl.engine.build import load_engine
from exl.errors import CheckpointError, KernelError, MemoryBudgetError
from exl.kernels.embed import embed
from exl.memory import host as host_memory
from exl.memory import mapped as mapped_memory
from exl.memory.host import HostBuffer
from exl.ops import cuda_batch, cuda_sampling
from exl.planning.devices import HOST
from exl.planning.options import EngineOptions
from exl.planning.plan import Tier
from exl.sampling_params import SamplingParams
from exl.weights import placement
from exl.weights.packed import PackedFile, PackedRows
from tests.host.address_spaces import SeparateMemory
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend
from tests.model.batches import batch_of
from tests.model.cuda_engines import GREEDY, all_logits, load, some_ids, step_logits, tokens
from tests.model.placed_model import packed_file

PLACES = ("device", "auto", "disk")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TABLE = "model.embed_tokens.weight"
IDS = [*some_ids(50), *some_ids(20)]  # some tokens more than once
# Two chunks to a window, three windows to the prompt.
SMALL = {"prefill_chunk": 16, "prefill_window": 32}


@pytest.fixture(scope="module")
def model(four_bit, tmp_path_factory):
    """A function: dtype of the embedding -> a folder, each written once."""
    made = {}

    def make(dtype: str):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp(dtype) / "model"
            shutil.copytree(four_bit, made[dtype])
            path = made[dtype] / "model.safetensors"
            tensors = load_file(path)
            tensors[TABLE] = tensors[TABLE].to(DTYPES[dtype])
            save_file(tensors, path)
        return made[dtype]

    return make


def embedded(engine, ids) -> torch.Tensor:
    """What the layers begin with, f32 [T, C]."""
    runner = engine.generator.runner
    ops = runner.decoder.ops
    ops.stage([batch_of([(ids, 0, [0, 1])])], *([] if runner._embed_rows is None else [runner._embed_rows]))
    h = runner._residual[: len(ids)]
    runner.decoder.embed(runner._embed, h)
    ops.launch()
    found = h.to("cpu", copy=True)
    ops.stage(())
    return found


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_gives_the_same_bits(model, backend, tmp_path, dtype):
    """Prompts in windows, steps one by one, answers that run ahead where that is possible. The GPU's table has 16 bits:
    bf16 stays, f32 is rounded to f16."""
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=12)
    found = {}
    for place in PLACES:
        engine = load(model(dtype), backend, embed=place, packed_folder=tmp_path, **SMALL)
        try:
            found[place] = all_logits(engine, IDS), step_logits(engine, IDS[:8]), tokens(engine, params)
        finally:
            engine.close()
    logits, steps, answer = found.pop("device")
    assert torch.isfinite(logits).all()
    assert len(set(answer)) > 5
    for place, (some_logits, some_steps, some_answer) in found.items():
        assert torch.equal(some_logits, logits), place
        assert torch.equal(some_steps, steps), place
        assert some_answer == answer, place


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rows_are_those_of_the_file_as_on_the_cpu(model, backend, tmp_path, dtype):
    """Bit for bit, in whatever place: no row is computed with."""
    expected = load_file(model(dtype) / "model.safetensors")[TABLE][IDS].float()
    cpu = load_engine(model(dtype), EngineOptions(device="cpu", context=128))
    assert torch.equal(embedded(cpu, IDS), expected)
    for place in PLACES:
        engine = load(model(dtype), backend, embed=place, packed_folder=tmp_path)
        assert torch.equal(embedded(engine, IDS), expected), place
        engine.close()


@pytest.mark.parametrize("place", PLACES)
def test_steps_are_replayed_as_graphs_with_the_table_at_one_address(model, tmp_path, place):
    """Also with rows from the disk: they are copied before a step, to the same place each time."""
    recorder = RecordingBackend(make_backend("plain", 90))
    engine = load(model("f16"), recorder, embed=place, packed_folder=tmp_path)
    params = replace(GREEDY, max_tokens=8)
    expected = tokens(load(model("f16"), recorder.inner, embed="device"), params)
    assert tokens(engine, params) == expected
    assert engine.decode_steps == "replayed as graphs"
    tables = {launch.args[0].address for launch in recorder.launches if launch.entry == "embed"}
    assert len(tables) == 1
    engine.close()


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("place", ["auto", "disk"])
def test_a_pass_under_the_sanitizers(model, tmp_path, mode, place):
    engine = load(model("bf16"), make_backend(mode, 90), embed=place, packed_folder=tmp_path)
    assert len(tokens(engine, replace(GREEDY, max_tokens=3))) == 3
    engine.close()


# ---- what the device sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"resident_layers": 0}])
def test_kernels_read_only_what_is_mapped_at_the_devices_address(model, monkeypatch, options):
    params = replace(GREEDY, max_tokens=8)
    expected = tokens(load(model("f16"), make_backend("plain"), embed="device"), params)
    device = SeparateMemory(make_backend("plain"), monkeypatch)
    engine = load(model("f16"), device, **options)
    assert engine.plan.placement.embed is Tier.PINNED
    assert tokens(engine, params) == expected
    start, stop = device.mapped["embedding"]
    launches = [launch for launch in device.launches if launch.entry == "embed"]
    assert launches
    assert all(start <= launch.args[0].address < stop for launch in launches)
    engine.close()


def test_a_table_in_memory_that_is_not_mapped_is_found(monkeypatch):
    """The test above can fail: a table at the host's address, and one in pageable memory."""
    device = SeparateMemory(make_backend("plain"), monkeypatch)
    ids, h, sumsq = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 64), torch.zeros(1, 4)
    host, on_device = device.map(96 * 64 * 2, "embedding", device.device, None)
    pageable = torch.from_numpy(placement.HostBuffer(96 * 64 * 2, "embedding").array)
    embed(device, on_device.view(torch.float16).view(96, 64), ids, h, sumsq)
    for memory in (host, pageable):
        with pytest.raises(KernelError, match="embed: argument 0 is memory of the host that the device does not see"):
            embed(device, memory.view(torch.float16).view(96, 64), ids, h, sumsq)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def buffers(monkeypatch):
    """Bytes of each buffer that is made on the host, by its purpose; the shim's device memory is among them."""
    made: dict[str, int] = {}

    class Counted(HostBuffer):
        def __init__(self, num_bytes, purpose):
            super().__init__(num_bytes, purpose)
            made[purpose] = made.get(purpose, 0) + num_bytes

    for module in (host_memory, mapped_memory, placement, cuda_batch, cuda_sampling):
        monkeypatch.setattr(module, "HostBuffer", Counted)
    return made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("streamed", [{}, {"resident_layers": 1}, {"resident_layers": 0, "ram": "3MB"}])
def test_exact_lines_are_what_is_allocated(model, backend, tmp_path, buffers, place, streamed):
    if backend.device.type != "cpu":
        pytest.skip("counts the buffers of the host")
    options = {"embed": place, "packed_folder": tmp_path, **SMALL, **streamed}
    if place != "disk":
        options.pop("ram", None)
    engine = load(model("f16"), backend, **options)
    lines = [line for line in engine.plan.lines if line.exact and line.purpose != "rounding to segments"]
    on_device = ("weights", "stream buffers", "buffers of a step", "KV cache")
    found = {
        purpose: count for purpose, count in buffers.items() if purpose not in ("staging", "header of the packed file")
    }
    assert sum(found.get(purpose, 0) for purpose in on_device) == sum(
        line.num_bytes for line in lines if line.device != HOST
    )
    in_ram = {purpose: count for purpose, count in found.items() if purpose not in on_device}
    assert sum(in_ram.values()) == sum(line.num_bytes for line in lines if line.device == HOST), (in_ram, lines)
    assert in_ram.get("embedding", 0) == (96 * 64 * 2 if place == "auto" else 0)
    assert in_ram.get("rows of the embedding", 0) == (2 * (32 + 64) * 64 * 2 if place == "disk" else 0)
    engine.close()


def test_a_table_that_cannot_be_locked_names_the_other_places(model, backend, monkeypatch):
    def refused(*args):
        raise MemoryBudgetError("pinned memory: the driver does not lock 12288 bytes")

    monkeypatch.setattr(placement, "mapped", refused)
    with pytest.raises(MemoryBudgetError, match=r"does not lock .*: embed='device' puts .* embed='disk' reads"):
        load(model("f16"), backend)
    load(model("f16"), backend, embed="device").close()


# ---- rows from the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The rows of each read."""
    found, read = [], PackedRows.read

    def watched(self, rows, out):
        found.append(rows.tolist())
        read(self, rows, out)

    monkeypatch.setattr(PackedRows, "read", watched)
    return found


def test_each_row_of_a_window_is_read_once_and_a_step_reads_one(model, backend, tmp_path, reads):
    engine = load(model("f16"), backend, embed="disk", packed_folder=tmp_path, **SMALL)
    all_logits(engine, IDS)
    size = engine.generator.runner.rules.chunk
    assert size > 1
    assert reads == [sorted(set(IDS[i : i + size])) for i in range(0, len(IDS), size)]
    reads.clear()
    answer = tokens(engine, replace(GREEDY, max_tokens=6))
    assert reads[-5:] == [[token] for token in answer[:5]]
    engine.close()


def test_the_host_waits_for_ids_only_if_it_reads_rows(model, backend, tmp_path):
    """Ids that are still on the device cannot be looked up on the disk: such a batch is refused."""
    ahead = batch_of([([-1], 3, [0])], decode=True)
    for place, runs_ahead in (("device", True), ("auto", True), ("disk", False)):
        engine = load(model("f16"), backend, embed=place, packed_folder=tmp_path)
        runner = engine.generator.runner
        ops = runner.decoder.ops
        assert ops.runs_ahead is runs_ahead
        if runs_ahead:
            ops.stage([ahead])
            with pytest.raises(KernelError, match=r"rows: found some, but .* embedding that is in memory"):
                ops.stage([ahead], object())
        else:
            with pytest.raises(KernelError, match="token id -1 at row 0: expected 0 to 95"):
                ops.stage([ahead], runner._embed_rows)
            with pytest.raises(KernelError, match=r"rows: found none, but .* embedding that is on the disk"):
                ops.stage([ahead])
        ops.stage(())
        engine.close()


def test_several_sequences_have_their_own_rows(model, backend, tmp_path):
    """In a step padded to a power of two, with duplicates."""
    found = []
    for place in ("device", "disk"):
        engine = load(model("f16"), backend, embed=place, packed_folder=tmp_path, cache_tokens=512)
        batch = batch_of([([7], 0, [0]), ([50], 0, [1]), ([7], 0, [2])], decode=True)
        found += [logits.to("cpu", copy=True) for logits in engine.generator.runner.forward([batch])]
        engine.close()
    assert torch.equal(*found)
    assert torch.equal(found[0][0], found[0][2])
    assert not torch.equal(found[0][0], found[0][1])


def test_a_file_that_is_cut_off_is_named(model, backend, tmp_path):
    engine = load(model("f16"), backend, embed="disk", packed_folder=tmp_path)
    path = packed_file(tmp_path)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match=rf"{path.name}: rows of the embedding cannot be read"):
        tokens(engine)
    engine.close()


def test_a_damaged_table_is_packed_again_when_it_is_loaded(model, backend, tmp_path, caplog):
    """Rows have no checksum of their own: the whole table is compared once, at the start."""
    engine = load(model("f16"), backend, embed="disk", packed_folder=tmp_path)
    expected = embedded(engine, IDS)
    engine.close()
    path = packed_file(tmp_path)
    with open(path, "r+b") as file:
        file.seek(4096 + 64 * 2 * IDS[0])
        file.write(b"\x55\x55\x55\x55")
    engine = load(model("f16"), backend, embed="disk", packed_folder=tmp_path)
    assert "blob 0 does not have its checksum" in caplog.text
    assert torch.equal(embedded(engine, IDS), expected)
    engine.close()


def test_closing_closes_the_file(model, backend, tmp_path):
    engine = load(model("f16"), backend, embed="disk", packed_folder=tmp_path)
    rows = engine.weights.embed_rows
    descriptor = rows._file.descriptor
    os.fstat(descriptor)
    engine.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_load_that_fails_closes_the_file(model, backend, tmp_path, monkeypatch):
    opened, rows = [], PackedFile.rows

    def watched(self, *args):
        opened.append(rows(self, *args))
        return opened[-1]

    def broken(self, packed):
        raise RuntimeError("half way")

    monkeypatch.setattr(PackedFile, "rows", watched)
    monkeypatch.setattr(placement.DeviceWeights, "source", broken)
    with pytest.raises(RuntimeError, match="half way"):
        load(model("f16"), backend, embed="disk", packed_folder=tmp_path)
    assert [one._file.descriptor for one in opened] == [-1]
