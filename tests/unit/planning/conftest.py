from __future__ import annotations

import pytest

from benchmarks.synthetic import write_headers
from exl.layout.specs import Target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.shapes import SHAPES


@pytest.fixture(autouse=True)
def machine_without_a_limit(monkeypatch):
    """What a plan says must not depend on the RAM of the machine that runs the tests."""
    monkeypatch.setattr("exl.planning.notes.system_ram", lambda: (None, None))


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory):
    """The headers of a 7B model."""
    path = tmp_path_factory.mktemp("headers") / "7b"
    write_headers(path, SHAPES["llama-2-7b"])
    return path


@pytest.fixture(scope="module")
def seven(folder_7b):
    """A function: options -> the plan of a 7B model."""
    with open_model(folder_7b) as files:
        yield lambda **options: plan_model(files, EngineOptions(**options), Target("cuda", arch=86))[0]
