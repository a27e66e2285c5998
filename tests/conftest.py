from __future__ import annotations

import hashlib
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from exl.user_cache import chat_model_folder
from tests.host import backends

# One thread, also in processes that tests start: matrices are tiny, and on a busy machine a second thread makes every
# barrier wait for milliseconds.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A test run started in the background ignores SIGINT, but some tests raise it for themselves: restore the handler.
if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ASAN_ONE_IN = 4  # a sample runs one case in this many under AddressSanitizer

# Packages that only tests import; llguidance, without which there are no constraints; llvmlite, without which torch
# computes on the CPU. If one is missing, only the
# test modules that need it are skipped.
TEST_ONLY = frozenset(
    {
        "accelerate",
        "gguf",
        "gradio",
        "hypothesis",
        "ipykernel",
        "jsonschema",
        "llguidance",
        "llvmlite",
        "lm_eval",
        "matplotlib",
        "nbclient",
        "nbformat",
        "pexpect",
        "playwright",
        "transformers",
    }
)

# Looked up now, because tests change the environment that says where the user's cache is.
CHAT_MODELS = {dense: chat_model_folder(dense) for dense in (True, False)}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, dense."""
    return _chat_model(dense=True)


@pytest.fixture(scope="session")
def smollm2_quantized() -> Path:
    """The folder of SmolLM2-135M-Instruct as `make chat` quantizes it."""
    return _chat_model(dense=False)


def _chat_model(dense: bool) -> Path:
    folder = CHAT_MODELS[dense]
    if folder is None:
        pytest.skip("SmolLM2 is not at hand: make chat-model")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exl")
    group.addoption(
        "--require-gpu", action="store_true", help="tests for a GPU fail, instead of being skipped, without one"
    )
    group.addoption("--kernel-cache", type=Path, metavar="FOLDER", help="compiled kernels (default: the user's cache)")
    group.addoption(
        "--stress-seconds", type=float, default=20, metavar="N", help="how long threads are kept under stress"
    )
    group.addoption(
        "--sample",
        metavar="SEED",
        help="run one in n of the cases that a test marked sample(n) has, drawn by SEED, and one in "
        f"{ASAN_ONE_IN} under AddressSanitizer; at least one of each test and build. Default: all",
    )


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


# ---- samples ---------------------------------------------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--sample")
    return None if seed is None else f"a sample of the marked cases: pytest --sample {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--sample")
    if seed is None:
        return
    left_out = set(items) - drawn(items, seed)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))


def drawn(items: list[pytest.Item], seed: str) -> set[pytest.Item]:
    """The tests that a sample runs. Drawn per test and build, so that every test keeps at least one case."""
    groups: dict[tuple[str, str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        build = build_of(item)
        marker = item.get_closest_marker("sample")
        one_in = 1 if marker is None or item.get_closest_marker("gpu") else marker.args[0]
        if build == "asan" and not item.path.name.startswith("test_shim_"):  # those show what each build detects
            one_in = max(one_in, ASAN_ONE_IN)
        groups[item.nodeid.split("[")[0], build, one_in].append(item)
    found = set()
    for (_, _, one_in), group in groups.items():
        group.sort(key=lambda item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest())
        found.update(group[: -(-len(group) // one_in)])
    return found


def build_of(item: pytest.Item) -> str:
    """The shim's build on which a case runs, or "" if none."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return next((value for name in ("mode", "backend") if (value := params.get(name)) in ("race", "asan", "plain")), "")
