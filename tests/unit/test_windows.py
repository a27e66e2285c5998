"""What Windows does otherwise, played on Linux: files that are open keep their names, and much of POSIX is missing."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from exl import cli
from exl.errors import ExlError
from exl.kernels.compiler import write_file
from exl.memory.host import HostBuffer
from exl.weights import packed
from exl.weights.packed import PART_SUFFIX, PackedFile, PackedWriter, remove_dead_parts
from exl.weights.packed_store import clear_packed, list_packed, packed_path
from tests.host.fake_windows import play_windows_files

if not Path("/proc/self/fd").is_dir():
    pytest.skip("open files are seen in /proc", allow_module_level=True)

KEY, SIZES = bytes(range(32)), (4096, 8192)


@pytest.fixture
def windows(monkeypatch) -> None:
    play_windows_files(monkeypatch)


def write(path: Path, value: int = 7) -> Path:
    """-> where it is."""
    with PackedWriter(path, KEY, "/models/a", SIZES) as writer:
        for size in SIZES:
            blob = HostBuffer(size, "test").array
            blob[:] = value
            writer.write(blob)
        writer.commit()
    return writer.path


def first_byte(file: PackedFile) -> int:
    out = HostBuffer(SIZES[0], "test").array
    assert file.read_blob(0, out)
    assert np.all(out == out[0])
    return int(out[0])


def test_a_packed_file_is_written_and_gets_its_name(windows, tmp_path):
    path = tmp_path / "model.exlpacked"
    assert write(path) == path
    file = PackedFile.open(path, KEY, SIZES)
    assert first_byte(file) == 7
    file.close()
    assert write(path, 8) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.exlpacked"]


def test_an_interrupted_writer_leaves_nothing(windows, tmp_path):
    with pytest.raises(KeyboardInterrupt), PackedWriter(tmp_path / "model", KEY, "", SIZES):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_that_another_has_open_is_kept(windows, tmp_path):
    path = write(tmp_path / "model.exlpacked")
    file = PackedFile.open(path, KEY, SIZES)
    assert write(path) == path
    assert first_byte(file) == 7
    file.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.exlpacked"]


def test_beside_another_file_that_is_open_packed_weights_get_another_name(windows, tmp_path, caplog):
    """It is damaged, say, and an older process still reads it: what was packed for minutes is not lost."""
    path = packed_path(tmp_path, Path("/models/a"), KEY)
    write(path, 1)
    file = PackedFile.open(path, KEY, SIZES)
    spare = write(path, 2)
    assert spare != path
    assert spare.name in caplog.text
    other = PackedFile.open(spare, KEY, SIZES)
    assert (first_byte(file), first_byte(other)) == (1, 2)
    other.close()
    assert {info.path for info in list_packed(tmp_path)} == {path, spare}
    with pytest.raises(ExlError, match="cannot be removed"):
        clear_packed(tmp_path)
    assert not spare.exists()  # the one in use does not keep the others
    file.close()
    assert [info.path for info in clear_packed(tmp_path)] == [path]


def test_parts_of_the_living_stay_without_locks(windows, tmp_path):
    """Between its last byte and its name a part is closed: only what is older than a minute has lost its writer."""
    young, old = tmp_path / f".a{PART_SUFFIX}", tmp_path / f".b{PART_SUFFIX}"
    for path in (young, old):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * packed._YOUNG_SECONDS,) * 2)
    assert remove_dead_parts(tmp_path) == [old]
    assert young.exists()
    os.utime(young, (1, 1))
    with open(young, "rb"):
        assert remove_dead_parts(tmp_path) == []


def test_the_kernel_cache_keeps_an_entry_that_is_open(windows, tmp_path, caplog):
    path = tmp_path / "kernel.bin"
    assert write_file(path, b"code")
    with open(path, "rb"):
        assert write_file(path, b"code")
        assert not caplog.records
        assert not write_file(path, b"other")
        assert "kernel cache: cannot write" in caplog.text
    assert path.read_bytes() == b"code"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernel.bin"]


def test_a_name_is_asked_for_again(windows, tmp_path, monkeypatch):
    """A scanner for viruses has it open for a moment."""
    replace, refusals = os.replace, [1]

    def busy(*paths):
        if refusals:
            refusals.pop()
            raise PermissionError(13, "in use")
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    assert write_file(tmp_path / "kernel.bin", b"code")
    monkeypatch.setattr(sys, "platform", "linux")
    refusals.append(1)
    assert not write_file(tmp_path / "kernel.bin", b"new")


def test_what_a_model_writes_gets_through_a_pipe(monkeypatch):
    """A pipe's code page has neither."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\u6f22".encode()), encoding="cp1252"))
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    monkeypatch.setattr(cli, "app", lambda **_: print(sys.stdin.read(), "\U0001f642", end="", flush=True))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert raw.getvalue().decode() == "\u6f22 \U0001f642"
