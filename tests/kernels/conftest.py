"""Fixtures of the kernel tests, built on ``tests.host.backends``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exl.kernels.launch import Backend
from tests.host.backends import MODES, make_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for the references

backend_or_skip = make_backend


@pytest.fixture(params=MODES)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, with exl's own kernels; tensors must be on ``backend.device``."""
    yield make_backend(request.param)
    if request.param == "cupy":
        torch.cuda.synchronize()
