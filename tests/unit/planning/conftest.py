from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def machine_without_a_limit(monkeypatch):
    """What a plan says must not depend on the RAM of the machine that runs the tests."""
    monkeypatch.setattr("exl.planning.notes.system_ram", lambda: (None, None))
