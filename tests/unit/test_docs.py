"""What the pages show is what happens: every block of code runs, commands exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from scripts import memory_table
from tests.unit.checkpoint.hub_server import Hub

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a block is stands behind its fence. python: a page's blocks are run as one script. sh: run by bash where the
# placeholders below are real. cpp: a file named in its first line, which the page's python has beside it. text: a
# picture, a formula, a layout; an installation that downloads gigabytes (test_gpu_environment.py has it).
LANGUAGES = ("python", "sh", "cpp", "text")
PLACEHOLDERS = {
    "path/to/model": BUNDLED_MODEL,
    "path/to/quantized": BUNDLED_MODEL,
    "path/to/original": DATA / "stories260K",
    "path/to/dense-model": DATA / "stories2M",
    "path/to/adapter": DATA / "adapter",
}
REPOSITORY = "owner/name"


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def code_of(page: Path, language: str) -> list[str]:
    return [block.code for block in blocks(page) if block.language == language]


def pages_with(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if code_of(page, language)]


def run(command: list[str], cwd: Path, **env: str) -> None:
    # One thread: on a busy machine a second one waits at every barrier.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def make_placeholders(folder: Path) -> None:
    for name, target in PLACEHOLDERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert [f"{page.name}:{block.line}" for block in blocks(page) if block.language not in LANGUAGES] == []
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "```" not in outside, "a fence that does not end"
    # Markdown's other kind of code block has no place for a language.
    assert re.findall(r"(?:\A|\n\n)( {4}.*)", outside) == []


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, tmp_path):
    sources = code_of(page, "cpp")
    if sources and shutil.which("g++") is None:
        pytest.skip("g++ is not installed, which the kernels' shim needs")
    if "nvdisasm" in page.read_text(encoding="utf-8"):
        from tests.compile.nvrtc import nvrtc
        from tests.compile.sass import nvdisasm_path

        if nvrtc() is None or nvdisasm_path() is None:
            pytest.skip("NVRTC or nvdisasm is not installed")
    for source in sources:
        name = re.match(r"// (\w+\.cu)\n", source)
        assert name is not None, f"the first line is no file's name: {source[:60]}"
        (tmp_path / name[1]).write_text(source)
    make_placeholders(tmp_path)
    code = "\n".join(code_of(page, "python"))
    if "pytest.mark" in code:  # a test that the page writes is run as well, on the shim
        code += "\n" + "\n".join(
            f'{name}("race")' for name in re.findall(r"^def (test_\w+)\(mode\)", code, re.MULTILINE)
        )
    run([sys.executable, "-c", code], tmp_path)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_shell_blocks_run(page, tmp_path):
    lines = [line for code in code_of(page, "sh") for line in code.splitlines()]
    makes = [line for line in lines if line.startswith("make ")]  # this test is part of one of them
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [line for line in makes if f"\n{line.split()[1]}:" not in makefile] == []
    make_placeholders(tmp_path)
    stories = (DATA / "calibration" / "stories2M.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.txt").write_text("\n".join(stories[:8]) + "\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "exl").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m exl.cli "$@"\n')
    (tmp_path / "bin" / "exl").chmod(0o755)
    script = "set -euo pipefail\n" + "\n".join(line for line in lines if line not in makes)
    with Hub({REPOSITORY: BUNDLED_MODEL}) as hub:
        run(
            ["bash", "-c", script],
            tmp_path,
            PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            HOME=str(tmp_path),
            XDG_CACHE_HOME=str(tmp_path / "cache"),
            HF_HOME=str(tmp_path / "huggingface"),
            HF_ENDPOINT=hub.endpoint,
            NO_PROXY="127.0.0.1,localhost",
        )


def test_the_readme_has_something_to_run():
    readme = ROOT / "README.md"
    assert "exl.load()" in "".join(code_of(readme, "python"))
    assert {"generate", "chat", "quantize", "plan", "eval", "bench", "packed", "info"} <= set(
        re.findall(r"\bexl (\w+)", "".join(code_of(readme, "sh")))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


PATH = re.compile(r"`((?:exl|cuda|tests|benchmarks|scripts|examples)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page):
    found = PATH.findall(page.read_text(encoding="utf-8"))
    headers = ROOT / "cuda" / "include"  # exl/page.cuh, as sources include it
    assert [path for path in found if not (ROOT / path).exists() and not (headers / path).exists()] == []


def test_the_architecture_names_every_module():
    """In the section of its wing; the root's modules in the root's."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sections = {title.split(":")[0].removeprefix("The "): body for title, body in SECTION.findall(text)}
    for folder in [ROOT / "exl", *(path.parent for path in (ROOT / "exl").glob("*/__init__.py"))]:
        section = sections["root" if folder.name == "exl" else folder.name]
        named = set(re.findall(r"`(\w+\.py)`", section))
        there = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        if folder.name == "commands":  # a module for each command is said once
            there -= {f"{name}.py" for name in COMMANDS}
        elif folder.name == "kernels":  # and one for each kernel, in docs/kernels.md
            named |= set(re.findall(r"`(?:exl/kernels/)?(\w+\.py)`", KERNELS.read_text(encoding="utf-8")))
        assert there - named == set(), f"docs/architecture.md: exl/{folder.name} has modules that it does not name"
        assert folder.name == "kernels" or named - there == set(), f"docs/architecture.md: {folder.name}"


SECTION = re.compile(r"^## (The root|\w+: [^\n]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
COMMANDS = ("bench", "chat", "evaluate", "generate", "info", "packed", "plan", "quantize")
KERNELS = ROOT / "docs" / "kernels.md"


def test_the_memory_table_is_what_the_plan_says():
    assert memory_table.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_package_and_distribution_say_the_same():
    said = "exl runs GPTQ-quantized language models from Python on the GPUs people own, in the least memory"
    assert exl.__doc__.startswith(f"{said}.\n")
    assert f"# exl\n\n{said}.\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'description="{said}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
