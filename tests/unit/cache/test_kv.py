"""Pages of the slab are copied, zeroed, read and written as a whole, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.cache.kv import KVCache
from tests.host.recording import TorchCalls, on_device

from .slabs import LAYOUTS, NUM_LAYERS, SMALL, filled, page_bytes

NUM_PAGES = 5


def contents(kv: KVCache) -> list[bytes]:
    return [b"".join(part.tobytes() for part in page_bytes(kv, page)) for page in range(kv.num_pages)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_copied_and_the_others_are_not_touched(layout):
    kv = filled(layout, NUM_PAGES)
    before = contents(kv)
    kv.copy_pages([0, 4, 0], [3, 1, 2])
    assert contents(kv) == [before[0], before[4], before[0], before[0], before[4]]
    for src, dst in (([0, 1], [1, 2]), ([0, 1], [2]), ([0, 1], [2, 2])):
        with pytest.raises(ValueError, match="expected as many others"):
            kv.copy_pages(src, dst)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_zeroed_and_the_others_are_not_touched(layout):
    kv = filled(layout, NUM_PAGES)
    before = contents(kv)
    kv.zero_pages([3, 1])
    zeros = bytes(len(before[0]))
    assert contents(kv) == [before[0], zeros, before[2], zeros, before[4]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_read_and_written_between_slabs_of_different_sizes(layout):
    kv, other = filled(layout, NUM_PAGES), filled(layout, 2, seed=1)
    before = contents(other)
    data = torch.zeros(kv.page_bytes, dtype=torch.uint8)
    kv.read_page(4, data)
    # Array by array, in each layer by layer: the kernels' views in that order.
    parts = page_bytes(kv, 4)
    num_arrays = len(parts) // NUM_LAYERS
    expected = [parts[layer * num_arrays + i] for i in range(num_arrays) for layer in range(NUM_LAYERS)]
    assert np.array_equal(data.numpy(), np.concatenate(expected))
    other.write_page(0, data)
    assert contents(other) == [contents(kv)[4], before[1]]
    assert kv.page_bytes * NUM_PAGES <= kv.slab.numel() < kv.page_bytes * NUM_PAGES + 64 * 4 * NUM_LAYERS


def test_a_buffer_of_another_size_is_refused():
    kv = filled(SMALL, 2)
    for wrong in (torch.zeros(kv.page_bytes - 8, dtype=torch.uint8), torch.zeros(kv.page_bytes)):
        with pytest.raises(ValueError, match=f"expected uint8 \\[{kv.page_bytes}\\]"):
            kv.read_page(0, wrong)


@pytest.mark.parametrize("layout", LAYOUTS[-1:])
def test_a_page_is_one_operation_and_no_index(layout):
    """On a GPU an index would be copied there, which the host waits for, and what it gathers would take memory."""
    kv = filled(layout, NUM_PAGES)
    with TorchCalls() as calls:
        kv.copy_pages([0, 1], [3, 2])
        kv.zero_pages([4])
    assert on_device(calls.names) == ["copy_", "copy_", "zero_"]
