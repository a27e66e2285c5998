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


@pytest.fixture(scope="module")
def plain(running):
    """Plain requests to ``running``."""
    with _client(running) as client:
        yield client


@pytest.fixture(scope="module")
def plain_chatting(chatting):
    """Plain requests to ``chatting``."""
    with _client(chatting) as client:
        yield client


def _client(server):
    import httpx

    from tests.server.running import SECONDS

    return httpx.Client(base_url=server.url, timeout=SECONDS)


@pytest.fixture(scope="module")
def library(running):
    """The tokenizers library's own reading of ``running``'s tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(running.llm.folder / "tokenizer.json"))
