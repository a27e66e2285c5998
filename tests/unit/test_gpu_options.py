"""Tests for GPUs on machines that lack this or that: what is collected, what is skipped, and what must fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIGHT = "pexpect,prompt_toolkit,gradio,nbformat,nbclient,ipykernel,matplotlib,playwright"


def run_pytest(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.host.blocked", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_gpu_tests_are_collected_without_packages_that_only_tests_need():
    """None of the GPU's tests of models goes with what a GPU machine is likely to lack."""
    found = run_pytest("--collect-only", "-m", "gpu", "--blocked", LIGHT, "tests/model", "tests/unit")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "tests/model/test_cuda_graphs.py::test_replayed_steps_give_the_same_bits[cupy]" in found.stdout


def test_kernel_tests_are_collected_without_any_of_them():
    options = ("-p", "no:hypothesispytest", "--collect-only", "-rs", "-m", "gpu")  # its plugin needs hypothesis
    blocked = f"{LIGHT},transformers,hypothesis"
    found = run_pytest(*options, "--blocked", blocked, "tests/kernels", "tests/model")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "tests/kernels/test_gpu_launch.py::test_graph_capture[8]" in found.stdout
    assert "transformers is not installed" in found.stdout


def test_another_missing_module_is_an_error(tmp_path):
    """What is no package of tests, such as a module of ours by a wrong name, fails as ever."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_it.py").write_text("import exl.no_such_module\n\ndef test_it(): pass\n")
    found = run_pytest("--rootdir", str(tmp_path), str(tmp_path))
    assert found.returncode == 2, found.stdout + found.stderr
    assert "No module named 'exl.no_such_module'" in found.stdout


MACHINES = """
import pytest, torch
from exl.errors import KernelError
from tests.host import backends

MACHINES = {
    "no-gpu": (False, object(), "no CUDA device"),
    "no-cupy": (True, None, "CuPy is not installed"),
    "no-nvrtc": (True, object(), "CuPy is installed, but finds no NVRTC"),
    "broken": (True, object(), "a kernel cannot be loaded"),
}

@pytest.mark.parametrize("name", MACHINES)
def test_on(monkeypatch, name):
    available, cupy, reason = MACHINES[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: cupy)
    def broken(*args, **options):
        raise KernelError(reason)
    monkeypatch.setattr(backends, "CudaBackend", broken)
    backends.make_backend("cupy")
"""


def test_a_gpu_that_is_required_or_broken(tmp_path):
    """Without the option tests are skipped where there is no GPU or no CuPy, and nowhere else."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_machines.py").write_text(MACHINES)
    common = ("--rootdir", str(tmp_path), "-rsfE", str(tmp_path))
    plain, strict = run_pytest(*common).stdout, run_pytest("--require-gpu", *common).stdout
    assert "2 failed, 2 skipped" in plain, plain
    assert "no CUDA device" in plain
    assert "finds no NVRTC" in plain
    assert "4 failed" in strict, strict
    assert strict.count("--require-gpu: ") >= 4
