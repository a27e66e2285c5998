from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from tests.server.chat_models import load_chat_model, write_chat_model
from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def running():
    """One server of the bundled model for all tests that change nothing of it."""
    with RunningServer() as server:
        yield server


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """The bundled model with a chat template."""
    return write_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def chatting(chat_folder):
    """One server of it, for all tests that change nothing of it."""
    with RunningServer(load_chat_model(chat_folder), "chat") as server:
        yield server
