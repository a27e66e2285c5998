"""The bundled model without POSIX: in a child process that removes it before exl is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import exl

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="Windows is played on Linux")
def test_exl_runs_without_posix(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.windows_child", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with exl.load(device="cpu", context=256) as llm:
        expected = llm.generate("Once upon a time", max_tokens=24, temperature=0).token_ids
    assert found["modules"] > 80
    assert found["resident"] == found["streamed"] == found["packed"] == list(expected)
    assert [Path(name).suffix for name in found["files"]] == [".exlpacked"]
    assert "damaged" not in done.stderr
