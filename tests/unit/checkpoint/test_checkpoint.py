"""Opening and reading valid checkpoints, and writing files that the reference library reads."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import exl.checkpoint.source
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.writer import write_safetensors
from exl.errors import CheckpointError

STORIES = Path(__file__).parents[2] / "data" / "stories2M"
TYPES = {
    **{"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16},
    **{"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8},
    **{"u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64, "bool": torch.bool, "c64": torch.complex64},
}


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every type, with 0 to 3 dimensions, some without elements."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (5,), (3, 4), (2, 3, 4), (0,), (3, 0), (1, 1)]
    tensors = {}
    for i, (name, dtype) in enumerate(TYPES.items()):
        for j, shape in enumerate(shapes):
            values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator)
            tensors[f"{name}.{i}.{j}"] = values.to(dtype)
    return tensors


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def shard(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int, index_name="model.safetensors.index.json"):
    """Writes shards and an index as transformers does."""
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::num_shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(index, indent=2))


def assert_same_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = checkpoint.read(name)
        assert checkpoint.tensors[name].shape == array.shape == tuple(tensor.shape)
        assert array.tobytes() == bits_of(tensor), name
        assert array.flags.writeable


# --- what the reference library writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "häl": '\u2028 \U0001f600 "\\\n'}])
def test_every_type_and_shape_of_the_reference_library(tmp_path, metadata):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same_tensors(checkpoint, tensors)
        for name, dtype in TYPES.items():
            found = {i.dtype for i in checkpoint.tensors.values() if i.name.startswith(f"{name}.")}
            assert found == {name}, dtype


@pytest.mark.parametrize("folder", ["stories260K", "stories2M"])
def test_real_models(folder):
    path = STORIES.parent / folder
    with Checkpoint.open(path) as checkpoint:
        assert_same_tensors(checkpoint, load_file(path / "model.safetensors"))
        assert checkpoint.files == {"model.safetensors": (path / "model.safetensors").stat().st_size}


def test_names_in_any_script(tmp_path):
    tensors = {name: torch.ones(2) for name in ("a b", "ключ", "\U0001f600", 'x\n\t"\\y', "__metadata", "")}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same_tensors(checkpoint, tensors)


def test_types_without_a_numpy_type_can_be_copied_but_not_read(tmp_path):
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].dtype == "f8_e4m3"
        buffer = bytearray(4)
        checkpoint.read_into("a", buffer)
        assert buffer == b"\x38" * 4
        with pytest.raises(CheckpointError, match=r"tensor 'a' is f8_e4m3, expected one of"):
            checkpoint.read("a")


# --- where the files are ---------------------------------------------------------------------------------------------


def test_shards_with_an_index(tmp_path):
    tensors = random_tensors(1)
    shard(tmp_path, tensors, 3)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same_tensors(checkpoint, tensors)
        assert len(checkpoint.files) == 3


def test_a_single_file_wins_over_an_index(tmp_path):
    shard(tmp_path, random_tensors(1), 2)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["only"]


def test_an_index_of_another_name(tmp_path):
    tensors = random_tensors(1)
    shard(tmp_path, tensors, 2, "gptq_model-4bit-128g.safetensors.index.json")
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert_same_tensors(checkpoint, tensors)


def test_one_file_of_another_name_and_a_file_by_its_path(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    (tmp_path / "old.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "gptq_model-4bit-128g.safetensors"):
        with Checkpoint.open(path) as checkpoint:
            assert list(checkpoint.tensors) == ["a"]
            assert (checkpoint.path, checkpoint.folder) == (path, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_hub_cache_of_links_out_of_the_folder(tmp_path):
    """snapshots/<revision>/ holds links to ../../blobs/<digest>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = random_tensors(2)
    shard(snapshot, tensors, 2)
    for file in list(snapshot.iterdir()):
        blob = shutil.move(file, blobs / str(hash(file.name)))
        file.symlink_to(os.path.relpath(blob, snapshot))
    with Checkpoint.open(snapshot) as checkpoint:
        assert_same_tensors(checkpoint, tensors)


# --- reading parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    tensors = random_tensors(3) | {"big": torch.arange(7 * 11 * 3, dtype=torch.int32).reshape(7, 11, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        yield checkpoint, tensors


def test_rows(opened):
    checkpoint, tensors = opened
    for start, stop in ((0, 7), (0, 0), (7, 7), (2, 5), (6, 7)):
        np.testing.assert_array_equal(checkpoint.read_rows("big", start, stop), tensors["big"][start:stop].numpy())
    assert checkpoint.read_rows("f32.1.5", 1, 3).shape == (2, 0)
    assert checkpoint.read_rows("f32.1.4", 0, 0).shape == (0,)


@pytest.mark.parametrize(("name", "start", "stop"), [("big", -1, 2), ("big", 3, 2), ("big", 0, 8), ("f32.1.0", 0, 1)])
def test_rows_out_of_range(opened, name, start, stop):
    with pytest.raises(ValueError, match=rf"rows {start}:{stop} of {name}, which has shape"):
        opened[0].read_rows(name, start, stop)


def test_block_by_block_into_a_buffer(opened):
    checkpoint, tensors = opened
    whole = bits_of(tensors["big"])
    buffer = np.zeros(100, np.uint8)
    for start in range(0, len(whole), 100):
        block = buffer[: min(100, len(whole) - start)]
        checkpoint.read_into("big", block, start)
        assert block.tobytes() == whole[start : start + 100]
    words = np.zeros((3, 5), np.int32)
    checkpoint.read_into("big", words, 4)
    np.testing.assert_array_equal(words.ravel(), np.arange(1, 16))
    checkpoint.read_into("big", bytearray(), len(whole))


@pytest.mark.parametrize(
    ("buffer", "start", "message"),
    [
        (bytearray(10), -1, "bytes -1:9 of big, which has 924"),
        (bytearray(10), 915, "bytes 915:925 of big"),
        (b"0123", 0, "needs a writable, contiguous buffer"),
        (np.zeros(8, np.uint8)[::2], 0, "needs a writable, contiguous buffer"),
    ],
)
def test_buffers_that_do_not_fit(opened, buffer, start, message):
    with pytest.raises(ValueError, match=message):
        opened[0].read_into("big", buffer, start)


def test_a_name_that_is_not_there(opened):
    with pytest.raises(CheckpointError, match=r"no tensor 'nothing' among the 99 found there"):
        opened[0].read("nothing")


@pytest.mark.parametrize("positional", [True, False], ids=["preadv", "seek"])
def test_threads_read_one_file_at_once(opened, monkeypatch, positional):
    """Without a positional read (Windows), threads share the file's position and must wait for each other."""
    if positional and not hasattr(os, "preadv"):
        pytest.skip("no preadv here")

    class Handle(FileIO):
        def seek(self, *where):
            position = super().seek(*where)
            time.sleep(0.0005)  # gives another thread time to move the position
            return position

    monkeypatch.setattr(exl.checkpoint.source, "_HAS_PREADV", positional)
    monkeypatch.setattr(exl.checkpoint.source, "FileIO", Handle)
    tensors = opened[1]
    names = [name for name in tensors if tensors[name].numel()]
    with Checkpoint.open(opened[0].path) as checkpoint, ThreadPoolExecutor(4) as threads:
        for name, array in zip(names, threads.map(checkpoint.read, names), strict=True):
            assert array.tobytes() == bits_of(tensors[name]), name


def test_short_reads_are_continued(opened, monkeypatch):
    """A read may return fewer bytes than requested: Linux never returns more than 2 GB at once."""
    if not hasattr(os, "preadv"):
        pytest.skip("no preadv here")
    checkpoint, tensors = opened
    preadv, sizes = os.preadv, []

    def short_preadv(descriptor, views, offset):
        sizes.append(min(len(views[0]), 13))
        return preadv(descriptor, [views[0][:13]], offset)

    monkeypatch.setattr(os, "preadv", short_preadv)
    assert checkpoint.read("big").tobytes() == bits_of(tensors["big"])
    assert len(sizes) == -(-924 // 13)


def test_a_file_cut_off_after_opening(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 2000)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: ended at byte 2000 while reading tensor 'a'; it had \d+ bytes"
        ):
            checkpoint.read("a")


def test_errors_of_the_system_are_checkpoint_errors(opened, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(exl.checkpoint.source.OpenFile, "_read_some", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read tensor 'big': Input/output error"):
        opened[0].read("big")


def test_a_file_without_permission(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(exl.checkpoint.source, "FileIO", refused)  # chmod would not stop root
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened in .*: Permission denied"):
        Checkpoint.open(tmp_path)


def test_opening_reads_headers_only(tmp_path):
    save_file({f"a{i}": torch.zeros(1 << 18) for i in range(8)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
        for name in checkpoint.tensors:
            checkpoint.read_rows(name, 5, 6)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_handles_are_closed(tmp_path, monkeypatch):
    handles = []

    def recorded(*args):
        handles.append(FileIO(*args))
        return handles[-1]

    monkeypatch.setattr(exl.checkpoint.source, "FileIO", recorded)
    shard(tmp_path, random_tensors(), 3)
    with Checkpoint.open(tmp_path):
        assert sum(not handle.closed for handle in handles) == 3
    assert all(handle.closed for handle in handles)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)
    assert len(handles) == 8, "the index and three shards, twice"
    assert all(handle.closed for handle in handles)


# --- not a safetensors checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"found nothing, expected model\.safetensors or model\.safetensors\.index\.json with its shards$"),
        (["config.json"], r"found no weights among 1 file, expected model\.safetensors"),
        (["config.json", "pytorch_model.bin"], r"found only \.bin weights.*exl reads safetensors: .*save_pretrained"),
        (["model.pt"], r"found only \.pt weights.*torch\.load\(.*weights_only=True\)"),
        (["model-q4_0.gguf"], r"found only \.gguf weights.*llama\.cpp's format"),
        (
            ["a.safetensors", "b.safetensors"],
            r"2 safetensors files \(a.*, b.*\) but no model\.safetensors\.index\.json",
        ),
    ],
)
def test_folders_without_a_checkpoint(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: No such file or directory"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf: expected a folder or a \.safetensors file\. .*llama\.cpp"):
        Checkpoint.open(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"null"):
        Checkpoint.open("a\0null")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_named_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a file nor a folder"):
        Checkpoint.open(tmp_path / "model.safetensors")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_reference_library_reads_what_is_written(tmp_path):
    tensors = random_tensors(4)
    path = tmp_path / "model.safetensors"
    entries = [(name, name.split(".")[0], tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(path, entries, (bits_of(tensor) for tensor in tensors.values()), {"format": "pt", "ä": "ö"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert bits_of(read[name]) == bits_of(tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "ä": "ö"}
    with Checkpoint.open(path) as checkpoint:
        assert_same_tensors(checkpoint, tensors)
        assert next(iter(checkpoint.tensors.values())).start % 8 == 0
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_writing_arrays_and_nothing_at_all(tmp_path):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    write_safetensors(tmp_path / "a.safetensors", [("a", "f16", (3, 4))], [array])
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["a"].numpy(), array)
    write_safetensors(tmp_path / "b.safetensors", [], [])
    assert load_file(tmp_path / "b.safetensors") == {}


def test_tensors_are_written_one_at_a_time(tmp_path):
    def pieces():
        for i in range(16):
            yield np.full(1 << 18, i, np.uint8)

    tracemalloc.start()
    write_safetensors(tmp_path / "a.safetensors", [(f"t{i}", "u8", (1 << 18,)) for i in range(16)], pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 18
    with Checkpoint.open(tmp_path) as checkpoint:
        assert all((checkpoint.read(f"t{i}") == i).all() for i in range(16))


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ([("a", "f16", (2,))], [b"12345"], r"tensor 'a': found 5 bytes, expected 4"),
        ([("a", "f16", (2,))], [], r"tensor 'a': no data left for it"),
        ([("a", "f16", (2,))], [b"1234", b"5"], r"data for more than the 1 tensors announced"),
        ([("a", "f16", (4,))], [np.zeros(8, np.float16)[::2]], r"tensor 'a': its buffer is not contiguous"),
        ([("a", "F16", (2,))], [b"1234"], r"tensor 'a': found dtype 'F16', expected one such as 'f16'"),
        ([("a", "f4", (2,))], [b"1"], r"tensor 'a': found dtype 'f4'"),
        ([("a", "u8", (1,)), ("a", "u8", (1,))], [b"1", b"2"], r"tensor 'a': duplicate or reserved name"),
        ([("__metadata__", "u8", (1,))], [b"1"], r"tensor '__metadata__': duplicate or reserved name"),
    ],
)
def test_entries_and_data_that_do_not_agree(tmp_path, entries, data, message):
    (tmp_path / "a.safetensors").write_bytes(b"what was there")
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a.safetensors", entries, data)
    assert (tmp_path / "a.safetensors").read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_generator_that_fails_leaves_nothing(tmp_path):
    def pieces():
        yield b"12"
        raise KeyError("calibration failed")

    with pytest.raises(KeyError, match="calibration failed"):
        write_safetensors(tmp_path / "a.safetensors", [("a", "u8", (2,)), ("b", "u8", (2,))], pieces())
    assert os.listdir(tmp_path) == []


def test_metadata_must_be_strings(tmp_path):
    with pytest.raises(ValueError, match=r"metadata \{'bits': 4\}, expected strings for strings"):
        write_safetensors(tmp_path / "a.safetensors", [], [], {"bits": 4})


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "gone" / "a.safetensors", [], [])
