from __future__ import annotations

import pytest

from exl.weights import placement
from tests.host.backends import CUPY, make_backend
from tests.host.recording import RecordedCopies, RecordingBackend
from tests.model.placed_model import NUM_LAYERS, reader_threads


@pytest.fixture(scope="session")
def quantized():
    """The module that writes random checkpoints, which needs transformers."""
    pytest.importorskip("transformers")
    from tests.model import test_quantized

    return test_quantized


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory, quantized):
    """Folder of a small 4-bit model."""
    path = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "LAYERS", NUM_LAYERS)
        quantized.make(path, 4, 32)
    return path


@pytest.fixture
def no_thread_stays():
    yield
    assert reader_threads() == []


@pytest.fixture(scope="module", params=["plain", CUPY])
def backend(request):
    return make_backend(request.param)


@pytest.fixture
def recorder(monkeypatch):
    """A recording backend, which also records copies of streamed layers; during a capture none happens."""
    recorder = RecordingBackend(make_backend("plain"))
    monkeypatch.setattr(placement, "HostCopyEngine", lambda: RecordedCopies(recorder))
    return recorder


@pytest.fixture(scope="module")
def folder_and_model(tmp_path_factory, quantized):
    """A 4-bit model's folder, with a separate act-order per linear, and transformers' twin."""
    path = tmp_path_factory.mktemp("own-order")
    return path, quantized.make(path, 4, 32, order="own")


@pytest.fixture(scope="module")
def folder(folder_and_model):
    return folder_and_model[0]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory, quantized):
    """Folder of a 4-bit model without act-order."""
    path = tmp_path_factory.mktemp("no-order")
    quantized.make(path, 4, 32)
    return path
