"""Single rows of a table in a packed file: the bytes of the blob, in any order, through the page cache."""

from __future__ import annotations

import os

import numpy as np
import pytest

from exl.checkpoint.block_file import BlockFile
from exl.errors import CheckpointError
from exl.weights.packed import PackedFile
from tests.unit.weights.packed_files import KEY, SIZES, write


@pytest.fixture
def packed(path):
    packed = PackedFile.open(path, KEY, SIZES)
    yield packed
    packed.close()


@pytest.fixture
def table(packed):
    """Rows of 24 bytes, which no block ends with, from byte 128 of the second blob on."""
    rows = packed.rows(1, 128, 24, 500)
    yield rows
    rows.close()


def test_rows_are_those_of_the_blob(table, blobs):
    expected = blobs[1][128 : 128 + 500 * 24].reshape(500, 24)
    for rows in ([0], [499], [7, 3, 3, 480], [], list(range(0, 500, 7))):
        out = np.zeros(len(rows) * 24, np.uint8)
        table.read(np.array(rows, np.int32), out)
        np.testing.assert_array_equal(out.reshape(-1, 24), expected[rows])


def test_rows_stay_in_the_page_cache(packed, table, monkeypatch):
    """Common tokens come again and again. Layers do not: they go past the cache or are dropped from it."""
    dropped = []
    monkeypatch.setattr(BlockFile, "_drop_cached", lambda self, offset, num_bytes: dropped.append(num_bytes))
    table.read(np.array([5], np.int32), np.zeros(24, np.uint8))
    assert dropped == []
    packed._file.direct = False
    with BlockFile.open(packed.path) as file:
        file.read_into(memoryview(bytearray(4096)), 0)
    assert dropped == [4096]


def test_the_file_may_be_closed_before_its_rows(path, blobs):
    packed = PackedFile.open(path, KEY, SIZES)
    rows = packed.rows(0, 0, 64, 64)
    packed.close()
    out = np.zeros(64, np.uint8)
    rows.read(np.array([63], np.int32), out)
    np.testing.assert_array_equal(out, blobs[0][63 * 64 :])
    rows.close()


def test_another_file_of_that_name_is_not_read(packed, path, blobs, tmp_path):
    os.replace(write(tmp_path / "other", blobs), path)
    with pytest.raises(CheckpointError, match=r"model\.exlpacked: .*another file has its name now"):
        packed.rows(1, 0, 24, 10)


@pytest.mark.parametrize(
    ("rows", "size", "words"),
    [([500], 24, "rows 500 to 500 of a table of 500"), ([-1], 24, "rows -1"), ([0], 48, "48 bytes for 1 rows of 24")],
)
def test_misuse_is_refused(table, rows, size, words):
    with pytest.raises(ValueError, match=words):
        table.read(np.array(rows, np.int32), np.zeros(size, np.uint8))


def test_a_table_beyond_its_blob_is_refused(packed):
    with pytest.raises(ValueError, match="are not in blob 1"):
        packed.rows(1, 128, 24, 507)


def test_what_is_cut_off_is_named(table, path):
    os.truncate(path, 8192 + 4096)
    out = np.zeros(24, np.uint8)
    table.read(np.array([0], np.int32), out)
    with pytest.raises(CheckpointError, match=r"model\.exlpacked: rows of the embedding cannot be read: ended at byte"):
        table.read(np.array([499], np.int32), out)
