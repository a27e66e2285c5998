"""Fixtures of the tests of the CPU's own kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

try:
    from exl.cpu_kernels.library import Library
    from exl.cpu_kernels.processor import usable_isas
except ModuleNotFoundError:  # without llvmlite: the modules of tests, which import kernels, are skipped

    def usable_isas() -> tuple[str, ...]:
        return ()


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run keeps compiled kernels; never the user's own cache."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session", params=usable_isas() or [None])
def library(request: pytest.FixtureRequest, compiled_folder: Path) -> Library:
    """Compiled kernels, for each instruction set that this processor has in turn."""
    if request.param is None:
        pytest.skip("this processor has no instruction set that the kernels are written for")
    return Library(request.param, compiled_folder)


@pytest.fixture(scope="session")
def libraries(compiled_folder: Path) -> list[Library]:
    """One for each instruction set that this processor has, for tests that compare them."""
    if not usable_isas():
        pytest.skip("this processor has no instruction set that the kernels are written for")
    return [Library(isa, compiled_folder) for isa in usable_isas()]
