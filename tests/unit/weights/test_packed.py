"""Packed files: complete or absent, never silently wrong."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import FileIO

import numpy as np
import pytest

from exl.checkpoint import block_file
from exl.checkpoint.block_file import BlockFile
from exl.errors import CheckpointError, ExlError
from exl.memory.host import HostBuffer
from exl.weights import packed
from exl.weights.packed import (
    CHECKED_BYTES,
    PackedFile,
    PackedHeader,
    PackedWriter,
    checksum,
    remove_dead_parts,
)
from exl.weights.packed_store import (
    clear_packed,
)
from tests.unit.weights.packed_files import KEY, SIZES, flip, read, write


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
    monkeypatch.setattr(packed, "FORMAT_VERSION", packed.FORMAT_VERSION + 1)
    assert PackedFile.open(path, KEY, SIZES) is None


def test_a_version_from_the_future_is_told_from_damage(path, monkeypatch):
    raw = path.read_bytes()[:4096]
    monkeypatch.setattr(packed, "FORMAT_VERSION", 7)
    with pytest.raises(ValueError, match="format version 3, expected 7"):
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
    monkeypatch.setattr(packed, "checksum", lambda *args: calls.append(1) or checksum(*args))
    file = PackedFile.open(path, KEY, SIZES)
    out = HostBuffer(SIZES[1], "test").array
    calls.clear()
    for _ in range(3):
        file.read_blob(1, out)
    assert len(calls) == 1


@pytest.mark.parametrize("num_words", [1, 2, 3])
def test_a_checksum_shows_every_change_of_few_words(num_words):
    """Also where sums over the whole would not change: what one word gains another loses."""
    rng = np.random.default_rng(num_words)
    words = rng.integers(0, 2**64, (4, 512), dtype=np.uint64)
    before = checksum(words.view(np.uint8).reshape(-1))
    for _ in range(50):
        changed = words.copy()
        places = rng.choice(changed.size, num_words, replace=False)
        if rng.integers(2) and num_words > 1:  # in one page, or at one place of several
            places = places % 512 if rng.integers(2) else places // 512 * 512 + places[0] % 512
        gains = rng.integers(1, 2**64, num_words, dtype=np.uint64)
        if num_words > 1:
            gains[-1:] = -gains[:-1].sum(keepdims=True)
        np.add.at(changed.reshape(-1), places, gains)
        if not np.array_equal(changed, words):
            assert checksum(changed.view(np.uint8).reshape(-1)) != before


def test_a_checksum_shows_pages_in_another_order():
    pages = np.random.default_rng(1).integers(0, 256, (3 * CHECKED_BYTES // 4096, 4096), dtype=np.uint8)
    before = checksum(pages.reshape(-1))
    for one, other in ((0, 1), (5, 1030), (1023, 1024), (7, 2500)):
        swapped = pages.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert checksum(swapped.reshape(-1)) != before


def test_a_checksum_can_be_taken_in_pieces():
    blob = np.random.default_rng(2).integers(0, 256, CHECKED_BYTES + 12288, dtype=np.uint8)
    assert checksum(blob[CHECKED_BYTES:], checksum(blob[:CHECKED_BYTES])) == checksum(blob)


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
