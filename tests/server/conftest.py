from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def running():
    """One server of the bundled model for all tests that change nothing of it."""
    with RunningServer() as server:
        yield server
