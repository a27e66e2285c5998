from __future__ import annotations

import importlib.util

import pytest

# Where the extra "server" and the clients are not installed, there is nothing here to be tested.
MISSING = [name for name in ("fastapi", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


# Not of the whole session: the threads of a server would run on beside other folders' tests, which count theirs.
@pytest.fixture(scope="package")
def running():
    """One server of the bundled model for all tests that change nothing of it."""
    from tests.server.running import RunningServer

    with RunningServer() as server:
        yield server


@pytest.fixture(scope="package")
def chatting(tmp_path_factory):
    """One server of the bundled model with ChatML, for all tests that change nothing of it."""
    from tests.server.chat_models import CHATML, loader
    from tests.server.running import RunningServer

    folder = tmp_path_factory.mktemp("models") / "chat"
    with RunningServer(loader(folder, CHATML, context=1024), "chat") as server:
        yield server
