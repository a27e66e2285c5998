"""Fixtures of the kernel tests; ``tests.host.backends`` has what they are made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exl.kernels.launch import Backend
from tests.host.backends import MODES, make_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for the reference twins

backend_or_skip = make_backend


@pytest.fixture(params=MODES)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """exl's own kernels, on each backend in turn; tensors belong on ``backend.device``."""
    yield make_backend(request.param)
    if request.param == "cupy":
        torch.cuda.synchronize()
