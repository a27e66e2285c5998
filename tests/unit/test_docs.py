"""What the README shows is what happens: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import memory_table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # on a busy machine a second thread waits at every barrier
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=env)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_python_to_run():
    assert "exl.load()" in "".join(blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:^    |\| )exl (\w+)", text, re.MULTILINE))
    assert {"generate", "quantize", "info"} <= commands
    told = subprocess.run(
        [sys.executable, "-m", "exl.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert [command for command in commands if command not in told] == []
    targets = set(re.findall(r"^    make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_the_memory_table_is_what_the_plan_says():
    assert memory_table.table() in (ROOT / "README.md").read_text(encoding="utf-8")
