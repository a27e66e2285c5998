"""Disk measurements for benchmarks: plain reads, page-cache content, the system's counters."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.processor import processor_name
from exl.checkpoint.block_file import BlockFile
from exl.memory.host import HostBuffer, proc_bytes
from exl.weights.packed import read_header


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache, from ``mincore``."""
    num_bytes = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with open(path, "rb") as file:
        address = libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))
    return sum(page & 1 for page in bytes(pages)) / len(pages)


def drop_cached(path: Path) -> None:
    """Drops a file from the page cache. Raises ``RuntimeError`` if ``mincore`` still finds some of it there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = cached_share(path)
    if share > 0.001:
        raise RuntimeError(f"{path}: {share:.1%} of it stays in the page cache, expected none")


PLAIN_BLOCK_BYTES = 8 << 20  # the block size at which a plain read is fastest


def plain_read_seconds(
    path: Path, ranges: Sequence[tuple[int, int]], *, direct: bool, buffer_bytes: int = PLAIN_BLOCK_BYTES
) -> float:
    """Seconds for one thread to read ranges ``(offset, bytes)`` in turn, 8 MiB at a time, into a buffer that is filled
    again and again. One of 8 MiB stays in the processor's cache, which a stream's buffers do not."""
    buffer = HostBuffer(buffer_bytes, "read buffer")
    buffer.array[:] = 0
    view = memoryview(buffer.array)
    with BlockFile.open(path) as file:
        if direct and not file.try_direct():
            raise RuntimeError(f"{path}: its file system has no O_DIRECT")
        began, place = time.perf_counter(), 0
        for offset, num_bytes in ranges:
            for start in range(0, num_bytes, PLAIN_BLOCK_BYTES):
                count = min(PLAIN_BLOCK_BYTES, num_bytes - start)
                place = place if place + count <= buffer_bytes else 0
                file.read_into(view[place : place + count], offset + start)
                place += count
        return time.perf_counter() - began


def read_into_memory_seconds(path: Path, threads: int, *, direct: bool) -> float:
    """Seconds for ``threads`` threads to read all of a file, 8 MiB at a time, into new memory as large as the file."""
    num_bytes = path.stat().st_size
    starts = range(0, num_bytes, PLAIN_BLOCK_BYTES)
    began = time.perf_counter()
    buffer = HostBuffer(num_bytes, "read buffer")
    view = memoryview(buffer.array)
    with BlockFile.open(path, keeps_cached=True) as file, BlockFile.open(path, keeps_cached=True) as last:
        if direct and not file.try_direct():
            raise RuntimeError(f"{path}: its file system has no O_DIRECT")

        def read(start: int) -> None:
            block = view[start : start + PLAIN_BLOCK_BYTES]
            (last if len(block) % mmap.PAGESIZE else file).read_into(block, start)

        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(read, starts))
    seconds = time.perf_counter() - began
    buffer.close()
    return seconds


def touch_memory(num_bytes: int) -> None:
    """Takes memory and gives it back: where a hypervisor takes what is free from the machine, the first use of it
    afterwards takes several times as long, and one measurement would pay for all."""
    buffer = HostBuffer(num_bytes, "memory")
    buffer.array[:: mmap.PAGESIZE] = 1
    buffer.close()


def layer_ranges(packed: Path) -> list[tuple[int, int]]:
    """Offset and bytes of each layer in a packed file, which has the embedding before them and the head behind."""
    with BlockFile.open(packed) as file:
        header = read_header(file)
    return list(zip(header.offsets, header.sizes, strict=True))[1:-1]


def cold_read_seconds(path: Path, ranges: Sequence[tuple[int, int]], buffer_bytes: int = PLAIN_BLOCK_BYTES) -> float:
    """A plain read past the page cache: directly, or after the file was dropped from it."""
    direct = has_direct(path)
    if not direct:
        drop_cached(path)
    return plain_read_seconds(path, ranges, direct=direct, buffer_bytes=buffer_bytes)


def has_direct(path: Path) -> bool:
    with BlockFile.open(path) as file:
        return file.try_direct()


def disk_bytes_read() -> int:
    """Bytes fetched from disks for this process, as the system counts."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def status_bytes(field: str) -> int:
    """``VmRSS``, or ``VmHWM``: the peak since ``reset_peak``."""
    found = proc_bytes("self/status", field)
    if found is None:
        raise ValueError(field)
    return found


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{processor_name()}, {os.cpu_count()} processors, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, load average {load}"
    )
