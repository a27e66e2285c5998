"""Packed files: complete or absent, never used for another model, never silently wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import FileIO

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from exl.checkpoint import block_file
from exl.checkpoint.block_file import BlockFile
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import CheckpointError, ExlError
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.kernels.blob import pack_linear as pack_tiles
from exl.layout.layers import layer_layout, linear_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, Target
from exl.memory.host import HostBuffer
from exl.ops.torch_linear import pack_linear
from exl.weights import packed, packed_store
from exl.weights.packed import PackedFile, PackedHeader, PackedWriter, remove_dead_parts
from exl.weights.packed_store import (
    clear_packed,
    default_packed_folder,
    list_packed,
    packed_key,
    packed_path,
    source_name,
)

KEY = bytes(range(32))
SIZES = (4096, 12288, block_file.BLOCK_BYTES + 4096)


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    buffers = [HostBuffer(size, "test") for size in SIZES]
    for buffer in buffers:
        buffer.array[:] = rng.integers(0, 256, buffer.num_bytes, dtype=np.uint8)
    return [buffer.array for buffer in buffers]


def write(path, blobs, key=KEY):
    with PackedWriter(path, key, "/models/some model", [len(blob) for blob in blobs]) as writer:
        for blob in blobs:
            writer.write(blob)
        writer.commit()
    return path


def read(path, blob_idx=None):
    """Reads one blob, or all, one after another."""
    file = PackedFile.open(path, KEY, SIZES)
    out = HostBuffer(max(SIZES), "test").array
    try:
        found = []
        for i, size in enumerate(SIZES):
            if blob_idx in (None, i):
                assert file.read_blob(i, out[:size])
                found.append(out[:size].copy())
        return found
    finally:
        file.close()


@pytest.fixture
def path(tmp_path, blobs):
    return write(tmp_path / "model.exlpacked", blobs)


def flip(path, offset, mask=1):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def test_what_is_read_is_what_was_written(path, blobs):
    for found, blob in zip(read(path), blobs, strict=True):
        assert np.array_equal(found, blob)
    header = PackedFile.open(path, KEY, SIZES).header
    assert all(offset % 4096 == 0 for offset in header.offsets)
    assert path.stat().st_size == header.file_bytes == header.offsets[-1] + SIZES[-1]
    raw = path.read_bytes()
    for offset, blob in zip(header.offsets, blobs, strict=True):
        assert raw[offset : offset + len(blob)] == blob.tobytes()


def test_every_flipped_bit_of_the_header_is_noticed(path):
    raw = bytearray(path.read_bytes()[:4096])
    file_bytes = path.stat().st_size
    PackedHeader.from_bytes(bytes(raw), file_bytes)
    for offset in range(len(raw)):
        raw[offset] ^= 1 << (offset % 8)
        with pytest.raises(ValueError, match=r"header|version|packed file|bytes"):
            PackedHeader.from_bytes(bytes(raw), file_bytes)
        raw[offset] ^= 1 << (offset % 8)


@pytest.mark.parametrize("keep", [0, 5, 100, 4095, 4096, 9000, -1])
def test_a_file_that_was_cut_off_is_not_opened(path, keep):
    os.truncate(path, keep % path.stat().st_size)
    assert PackedFile.open(path, KEY, SIZES) is None


def test_other_files_are_not_opened(path, tmp_path, monkeypatch):
    assert PackedFile.open(path, bytes(32), SIZES) is None
    assert PackedFile.open(path, KEY, (*SIZES[:-1], 4096)) is None
    assert PackedFile.open(tmp_path / "absent", KEY, SIZES) is None
    assert PackedFile.open(tmp_path, KEY, SIZES) is None
    (tmp_path / "foreign").write_bytes(os.urandom(9000))
    assert PackedFile.open(tmp_path / "foreign", KEY, SIZES) is None
    monkeypatch.setattr(packed, "FORMAT_VERSION", 2)
    assert PackedFile.open(path, KEY, SIZES) is None


def test_a_version_from_the_future_is_told_from_damage(path, monkeypatch):
    raw = path.read_bytes()[:4096]
    monkeypatch.setattr(packed, "FORMAT_VERSION", 7)
    with pytest.raises(ValueError, match="format version 1, expected 7"):
        PackedHeader.from_bytes(raw, path.stat().st_size)


def test_more_blobs_than_a_page_of_header(tmp_path):
    sizes = [4096] * 300
    blob = HostBuffer(4096, "test").array
    with PackedWriter(tmp_path / "many", KEY, "x" * 3000, sizes) as writer:
        for i in range(len(sizes)):
            blob[:] = i % 251
            writer.write(blob)
        writer.commit()
    file = PackedFile.open(tmp_path / "many", KEY, sizes)
    assert file.header.num_bytes > 8192
    file.read_blob(299, blob)
    assert (blob == 299 % 251).all()


@pytest.mark.parametrize("blob_idx", range(len(SIZES)))
def test_a_flipped_bit_of_a_blob_is_an_error_at_its_first_use(path, blob_idx):
    header = PackedFile.open(path, KEY, SIZES).header
    flip(path, header.offsets[blob_idx] + SIZES[blob_idx] - 1, 0x80)
    with pytest.raises(CheckpointError, match=rf"{path}.*blob {blob_idx} .*that file is gone"):
        read(path, blob_idx)
    assert not path.exists()


def test_the_file_that_took_a_damaged_ones_place_stays(path, blobs):
    file = PackedFile.open(path, KEY, SIZES)
    flip(path, file.header.offsets[0])
    os.replace(write(path.with_name("rebuilt"), blobs), path)
    with pytest.raises(CheckpointError, match=r"that file is gone"):
        file.read_blob(0, HostBuffer(SIZES[0], "test").array)
    assert np.array_equal(read(path, 1)[0], blobs[1])


def test_a_checksum_is_compared_once(path, monkeypatch):
    calls = []
    crc32 = packed.zlib.crc32
    monkeypatch.setattr(packed.zlib, "crc32", lambda *args: calls.append(1) or crc32(*args))
    file = PackedFile.open(path, KEY, SIZES)
    out = HostBuffer(SIZES[1], "test").array
    calls.clear()
    for _ in range(3):
        file.read_blob(1, out)
    assert len(calls) == 1


def test_a_file_cut_off_while_it_is_open_is_an_error_that_names_it(path):
    file = PackedFile.open(path, KEY, SIZES)
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match=f"{path}.*ended at byte"):
        file.read_blob(2, HostBuffer(SIZES[2], "test").array)


def test_reading_can_be_given_up(path):
    file = PackedFile.open(path, KEY, SIZES)
    out = HostBuffer(SIZES[2], "test").array
    assert not file.read_blob(2, out, lambda: False)
    assert not out[block_file.BLOCK_BYTES :].any()


# --- past the page cache -----------------------------------------------------------------------------------------


def _refuse_direct(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    plain = fcntl.fcntl

    class Refusing:
        def __getattr__(self, name):
            return getattr(fcntl, name)

        @staticmethod
        def fcntl(descriptor, command, argument=0):
            if command == fcntl.F_SETFL and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return plain(descriptor, command, argument)

    monkeypatch.setattr(block_file, "fcntl", Refusing())


def test_without_o_direct_files_are_read_and_written_through_the_cache(tmp_path, blobs, monkeypatch):
    _refuse_direct(monkeypatch)
    path = write(tmp_path / "buffered", blobs)
    assert not PackedFile.open(path, KEY, SIZES).direct
    assert all(np.array_equal(found, blob) for found, blob in zip(read(path), blobs, strict=True))


def test_without_positional_reads(tmp_path, blobs, monkeypatch):
    _refuse_direct(monkeypatch)
    monkeypatch.setattr(block_file, "_POSITIONAL", False)
    path = write(tmp_path / "plain", blobs)
    assert all(np.array_equal(found, blob) for found, blob in zip(read(path), blobs, strict=True))


def test_without_positional_reads_threads_take_turns(path, blobs, monkeypatch):
    """Threads share the file's position: a thread that ran between another's seek and read would shift that read."""

    class Slow(FileIO):
        def seek(self, *where):
            position = super().seek(*where)
            time.sleep(0.001)
            return position

    _refuse_direct(monkeypatch)
    monkeypatch.setattr(block_file, "_POSITIONAL", False)
    monkeypatch.setattr(block_file, "FileIO", Slow, raising=False)
    lseek = os.lseek
    monkeypatch.setattr(os, "lseek", lambda *where: (lseek(*where), time.sleep(0.001))[0])
    file = PackedFile.open(path, KEY, SIZES)

    def work(i: int) -> bool:
        out = HostBuffer(SIZES[i % 2], "test").array
        return all(file.read_blob(i % 2, out) and np.array_equal(out, blobs[i % 2]) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    file.close()


def test_o_direct_refused_in_the_middle(path, blobs):
    """If the buffer is not aligned, the read itself fails with EINVAL."""
    file = BlockFile.open(path)
    direct = file.try_direct()
    memory = HostBuffer(SIZES[2] + 4096, "test").array[8:]
    offset = path.stat().st_size - SIZES[2]
    assert file.read_into(memoryview(memory)[: SIZES[2]], offset)
    assert np.array_equal(memory[: SIZES[2]], blobs[2])
    assert not file.direct or not direct
    file.close()


# --- writing -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_interrupted_writer(tmp_path, blobs):
    def interrupted():
        with PackedWriter(tmp_path / "model", KEY, "", SIZES) as writer:
            writer.write(blobs[0])
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_is_not_committed(tmp_path, blobs):
    with PackedWriter(tmp_path / "model", KEY, "", SIZES) as writer:
        writer.write(blobs[0])
        with pytest.raises(ValueError, match="1 blobs written, expected 3"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_known_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: usage._replace(free=12345))
    needed = PackedHeader(KEY, "", SIZES, (0, 0, 0)).file_bytes
    with pytest.raises(ExlError, match=rf"{tmp_path}: .*needs {needed} bytes.* 12345 bytes are free"):
        PackedWriter(tmp_path / "model", KEY, "", SIZES)
    assert list(tmp_path.iterdir()) == []


def test_the_system_stops_a_file_from_growing(tmp_path, blobs):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (block_file.BLOCK_BYTES, hard))
    try:
        with pytest.raises(ExlError, match=rf"{tmp_path}: .*needs \d+ bytes.*\d+ bytes are free.*too large"):
            write(tmp_path / "model", blobs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_disk_fills_up_in_the_middle(tmp_path, blobs, monkeypatch):
    written = 0
    plain = BlockFile._write_some

    def write_some(self, view, offset):
        nonlocal written
        if written + len(view) > SIZES[0] + SIZES[1] + 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(view)
        return plain(self, view, offset)

    monkeypatch.setattr(BlockFile, "_write_some", write_some)
    with pytest.raises(ExlError, match=rf"{tmp_path}: .*bytes are free \(No space left on device\)"):
        write(tmp_path / "model", blobs)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, blobs):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExlError, match=f"{tmp_path}/file/packed: packed weights cannot be written there"):
        write(tmp_path / "file" / "packed" / "model", blobs)


def test_dead_parts_go_and_living_ones_stay(tmp_path, blobs):
    pytest.importorskip("fcntl")
    dead = tmp_path / f".model-x{packed.PART_SUFFIX}"
    dead.write_bytes(b"half a file")
    with PackedWriter(tmp_path / "model", KEY, "", SIZES) as writer:
        assert not dead.exists()
        for blob in blobs:
            writer.write(blob)
        assert remove_dead_parts(tmp_path) == []
        assert clear_packed(tmp_path) == []
        writer.commit()
    assert all(np.array_equal(found, blob) for found, blob in zip(read(tmp_path / "model"), blobs, strict=True))


def test_many_writers_of_one_file(tmp_path, blobs):
    errors = []

    def work():
        try:
            for _ in range(5):
                write(tmp_path / "model", blobs)
                read(tmp_path / "model")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


# --- which file belongs to a model -------------------------------------------------------------------------------

_SPEC = BlobSpec((("attn_norm", 8),), (("o", (LinearSpec((MatrixSpec("o", 64, 32, 4, "u8", 32),)),)),))
_CPU = Target("cpu", "split64")
_QUANT = {"bits": 4, "group_size": 32}


def _key(folder, quant=_QUANT, spec=_SPEC, target=_CPU, packer="torch 1"):
    with Checkpoint.open(folder) as checkpoint:
        config = parse_quant_config(quant, "test")
        return packed_key(checkpoint, config, [layer_layout(spec, target)], target, packer)


def _save(folder, changes=()):
    folder.mkdir(exist_ok=True)
    weight = np.zeros((100, 100), np.float32)
    for at in changes:
        weight.reshape(-1)[at] = 1.0
    save_file({"a": weight, "b": np.ones(3, np.float32)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_007))
    return folder


def test_the_key_follows_all_that_the_bytes_depend_on(tmp_path):
    folder = _save(tmp_path / "a")
    key = _key(folder)
    assert len(key) == 32
    for_one_module = _QUANT | {"dynamic": {"o": {"sym": False}}}  # all of the model's modules
    assert _key(folder, quant=for_one_module) == _key(folder, quant=_QUANT | {"sym": False})
    others = [
        _key(folder, quant=_QUANT | {"sym": False}),
        _key(folder, quant=_QUANT | {"checkpoint_format": "gptq_v2"}),
        _key(folder, spec=BlobSpec((("attn_norm", 16),), _SPEC.linears)),
        _key(folder, target=Target("cpu", "split32")),
        _key(folder, target=Target("cpu", None)),
        _key(folder, packer="torch 2"),
    ]
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_008))
    others.append(_key(folder))
    save_file({"a": np.zeros((100, 99), np.float32), "b": np.ones(103, np.float32)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_007))
    others.append(_key(folder))
    assert len({key, *others}) == 1 + len(others)


def test_a_copy_has_the_same_key(tmp_path):
    folder = _save(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    assert _key(folder) == _key(tmp_path / "b")


def test_equal_times_do_not_hide_other_weights(tmp_path):
    assert _key(_save(tmp_path / "a")) != _key(_save(tmp_path / "b", changes=[5000]))


def test_changed_packing_needs_a_new_layout_version():
    """Files of an older packing must not be read as the present one. If this fails, increase LAYOUT_VERSION too."""
    rng = np.random.default_rng(1)
    digest = hashlib.sha256()

    def update(layout, out):
        digest.update(repr([(name, field) for name, field in layout.fields.items()]).encode())
        digest.update(out.tobytes())

    for bits, order in ((2, None), (3, None), (4, None), (8, None), (4, "split64"), (4, "split32"), (4, "pairs32")):
        spec = LinearSpec((MatrixSpec("m", 64, 96, bits, "u8", 32, True, "order"),))
        codes = rng.integers(0, 2**bits, (64, 96), dtype=np.uint8)
        matrix = QuantizedMatrix(
            bits,
            32,
            64,
            96,
            rng.random((2, 96)).astype(np.float16),
            rng.integers(0, 2**bits, (2, 96), dtype=np.uint8),
            rng.permutation(64).astype(np.int32),
            rng.random(96).astype(np.float16),
            lambda start, stop, codes=codes: codes[:, start:stop],
        )
        target = Target("cpu", order)
        layout = linear_layout(spec, target)
        out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        pack_linear([matrix], layout, target, out)
        update(layout, out.numpy())
        layout = linear_layout(spec, Target("cuda", arch=86))
        out = np.zeros(layout.num_bytes, np.uint8)
        pack_tiles([matrix], layout, out)
        update(layout, out)
    weight = rng.integers(0, 2**16, (8, 16), dtype=np.uint16)
    dense = DenseMatrix("bf16", 16, 8, None, None, lambda start, stop: weight[start:stop])
    layout = linear_layout(LinearSpec((MatrixSpec("m", 16, 8, 16, "bf16"),)), _CPU)
    out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_linear([dense], layout, _CPU, out)
    update(layout, out.numpy())
    assert (packed_store.LAYOUT_VERSION, digest.hexdigest()[:16]) == (3, "0976054a0eb4aca4")


@pytest.mark.parametrize("target", [_CPU, Target("cuda", arch=86)], ids=["cpu", "cuda"])
def test_a_file_of_another_layout_version_is_not_opened(tmp_path, blobs, monkeypatch, target):
    """It is not found under the new key, and is refused if it has the new key's name."""
    folder = _save(tmp_path / "model")
    monkeypatch.setattr(packed_store, "LAYOUT_VERSION", packed_store.LAYOUT_VERSION - 1)
    old = _key(folder, target=target)
    monkeypatch.undo()
    new = _key(folder, target=target)
    assert packed_path(tmp_path, folder, old) != packed_path(tmp_path, folder, new)
    path = write(packed_path(tmp_path, folder, new), blobs, old)
    assert PackedFile.open(path, new, SIZES) is None
    PackedFile.open(path, old, SIZES).close()  # it is complete


# --- the folder --------------------------------------------------------------------------------------------------


def test_the_default_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_packed_folder() == tmp_path / "exl" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_packed_folder() == tmp_path / ".cache" / "exl" / "packed"


def test_listing_and_clearing_touch_only_ours(tmp_path, blobs):
    folder = tmp_path / "packed"
    assert list_packed(folder) == clear_packed(folder) == []
    model, other = tmp_path / "my model", tmp_path / "other"
    ours = packed_path(folder, model, KEY)
    with PackedWriter(ours, KEY, source_name(model), SIZES) as writer:
        for blob in blobs:
            writer.write(blob)
        writer.commit()
    second = packed_path(folder, other, bytes(32))
    shutil.copy(ours, second)
    flip(second, 20)
    os.utime(second, (1, 1))
    kept = [folder / "notes.txt", folder / "x.exlpacked", folder / ("link-" + "0" * 32 + ".exlpacked")]
    for path in kept[:2]:
        path.write_text("mine")
    kept[2].symlink_to(kept[0])
    (folder / ("folder-" + "0" * 32 + ".exlpacked")).mkdir()
    found = list_packed(folder)
    assert [(info.path, info.source) for info in found] == [(ours, str(model)), (second, None)]
    assert found[0].num_bytes == ours.stat().st_size
    assert found[1].last_used == 1
    assert clear_packed(folder, model=other) == []
    assert [info.path for info in clear_packed(folder, model=model)] == [ours]
    assert [info.path for info in clear_packed(folder)] == [second]
    assert all(path.exists() for path in kept)
    assert len(list(folder.iterdir())) == 4


def test_opening_marks_a_file_as_used(path):
    os.utime(path, (1, 1))
    PackedFile.open(path, KEY, SIZES).close()
    assert path.stat().st_mtime > 1e9


@pytest.mark.parametrize("name", ["..", "a/b", "", "model: größe?", "x" * 300])
def test_names_of_models_are_no_paths(tmp_path, name):
    path = packed_path(tmp_path, tmp_path / name if name else type(tmp_path)(), KEY)
    assert path.parent == tmp_path
    assert path.name.endswith(f"-{KEY.hex()[:32]}.exlpacked")
    assert len(path.name) < 200
