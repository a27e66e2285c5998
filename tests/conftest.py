from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.host import backends

# Tiny matrices: a second thread only waits, and on a busy machine it waits for milliseconds at every barrier.
torch.set_num_threads(1)

# A test run that was started in the background ignores Ctrl-C; tests that raise it for themselves must be heard.
if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Packages that only tests import. A machine that lacks one skips the modules that need it, and collects the others.
TEST_ONLY = frozenset(
    {"gradio", "hypothesis", "ipykernel", "matplotlib", "nbclient", "nbformat", "pexpect", "playwright", "transformers"}
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exl")
    group.addoption(
        "--require-gpu", action="store_true", help="tests for a GPU fail, instead of being skipped, without one"
    )
    group.addoption("--kernel-cache", type=Path, metavar="FOLDER", help="compiled kernels (default: the user's cache)")


def pytest_configure(config: pytest.Config) -> None:
    backends.configure(require_gpu=config.option.require_gpu, kernel_cache=config.option.kernel_cache)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    excinfo = getattr(getattr(report, "call", None), "excinfo", None)
    missing = missing_package(None if excinfo is None else excinfo.value)
    if report.outcome == "failed" and missing in TEST_ONLY:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: {missing} is not installed")
    return report


def missing_package(error: BaseException | None) -> str | None:
    """The package whose absence is behind ``error``."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None
