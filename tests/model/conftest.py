from __future__ import annotations

import pytest

from tests.model import test_quantized
from tests.model.placed_model import NUM_LAYERS, reader_threads


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A small 4-bit model's folder."""
    path = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_quantized, "LAYERS", NUM_LAYERS)
        test_quantized.make(path, 4, 32)
    return path


@pytest.fixture
def no_thread_stays():
    yield
    assert reader_threads() == []
