from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from tests.server.chat_models import CHATML, loader
from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def running():
    """One server of the bundled model for all tests that change nothing of it."""
    with RunningServer() as server:
        yield server


@pytest.fixture(scope="session")
def chatting(tmp_path_factory):
    """One server of the bundled model with ChatML, for all tests that change nothing of it."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    with RunningServer(loader(folder, CHATML, context=1024), "chat") as server:
        yield server
