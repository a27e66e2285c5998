from __future__ import annotations

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from exl.checkpoint.hub import BUNDLED_MODEL
from tests.unit.checkpoint.hub_server import ORG, Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves the bundled model as ``somebody/stories``; huggingface_hub connects only to this server."""
    with Hub({f"{ORG}/stories": BUNDLED_MODEL}) as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield hub
        close_session()
