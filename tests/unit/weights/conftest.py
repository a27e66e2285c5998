"""A packed file with three blobs of random bytes."""

from __future__ import annotations

import numpy as np
import pytest

from exl.memory.host import HostBuffer
from tests.unit.weights.packed_files import SIZES, write


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    buffers = [HostBuffer(size, "test") for size in SIZES]
    for buffer in buffers:
        buffer.array[:] = rng.integers(0, 256, buffer.num_bytes, dtype=np.uint8)
    return [buffer.array for buffer in buffers]


@pytest.fixture
def path(tmp_path, blobs):
    return write(tmp_path / "model.exlpacked", blobs)
