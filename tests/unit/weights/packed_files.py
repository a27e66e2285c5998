"""Writes, reads and damages a packed file of three blobs."""

from __future__ import annotations

from exl.checkpoint import block_file
from exl.memory.host import HostBuffer
from exl.weights.packed import PackedFile, PackedWriter

KEY = bytes(range(32))
SIZES = (4096, 12288, block_file.BLOCK_BYTES + 4096)


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


def flip(path, offset, mask=1):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))
