"""Page-locked memory that a GPU reads by itself, without a GPU: CUDA's calls, and when the memory is given back."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from exl.errors import KernelError, MemoryBudgetError
from exl.memory import device as device_module
from exl.memory import mapped as mapped_module
from exl.memory.device import TorchRuntime
from exl.memory.mapped import mapped
from tests.host.backends import make_backend

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Runtime:
    """CUDA's calls, written down. ``failing``: a call that returns an error."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing, self.calls = failing, []

    def call(self, name: str) -> int:
        self.calls.append(name)
        return 2 if name == self.failing else 0

    def register(self, address: int, num_bytes: int) -> int:
        self.address, self.num_bytes = address, num_bytes
        return self.call("register")

    def unregister(self, address: int) -> int:
        assert address == self.address
        return self.call("unregister")

    def device_address(self, address: int) -> tuple[int, int]:
        assert address == self.address
        return self.call("device_address"), address

    def text(self, error: int) -> str:
        return f"error {error}"

    def clear(self) -> None:
        self.calls.append("clear")


@pytest.fixture
def runtime(monkeypatch):
    """torch has no CUDA here: its tensor of the memory is one of the CPU, which keeps the memory's description alive
    as one of a GPU does, and says that it is on the GPU."""
    runtime = Runtime()

    class OnGpu(torch.Tensor):
        device = GPU

    def tensor_of(memory, device):
        assert device == GPU
        description = memory.__cuda_array_interface__
        (num_bytes,), (address, read_only) = description["shape"], description["data"]
        assert (description["typestr"], description["strides"], read_only) == ("|u1", None, False)
        raw = (ctypes.c_uint8 * num_bytes).from_address(address)
        raw.memory = memory
        return torch.frombuffer(raw, dtype=torch.uint8).as_subclass(OnGpu)

    monkeypatch.setattr(mapped_module, "_tensor_of", tensor_of)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: runtime.calls.append(f"synchronize {device}"))
    return runtime


def test_both_tensors_are_the_same_bytes(runtime):
    with ExitStack() as stack:
        host, on_device = mapped(8192, "embedding", GPU, stack, runtime)
        assert (runtime.address, runtime.num_bytes) == (host.data_ptr(), 8192)
        assert not host.any()
        host[5] = 7
        assert on_device[5] == 7
        assert runtime.calls == ["register", "device_address"]
    # Kernels may still read it: it is unlocked after they have ended.
    assert runtime.calls[2:] == ["synchronize cuda:0", "unregister"]


def test_memory_that_nobody_closes_goes_with_its_last_tensor(runtime):
    stack = ExitStack()
    host, on_device = mapped(8192, "embedding", GPU, stack, runtime)
    part = on_device[4096:].view(torch.int16)
    del host, on_device
    gc.collect()
    assert "unregister" not in runtime.calls
    del part
    gc.collect()
    assert runtime.calls[2:] == ["synchronize cuda:0", "unregister"]
    stack.close()
    assert runtime.calls.count("unregister") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_a_child_leaves_the_device_alone(runtime):
    stack = ExitStack()
    _, on_device = mapped(8192, "embedding", GPU, stack, runtime)
    child = os.fork()
    if not child:
        code = 99  # for a child that raises an error: it must not go on as a second run of the tests
        try:
            del on_device
            gc.collect()
            stack.close()
            code = len(runtime.calls)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    stack.close()


@pytest.mark.parametrize(
    ("failing", "error", "words", "calls"),
    [
        ("register", MemoryBudgetError, r"does not lock 8192 bytes \(error 2\)", ["register", "clear"]),
        (
            "device_address",
            KernelError,
            r"embedding: cuda:0 does not map page-locked memory \(error 2\)",
            ["register", "device_address", "clear", "unregister"],
        ),
    ],
)
def test_what_the_driver_refuses_is_named_and_given_back(runtime, failing, error, words, calls):
    runtime.failing = failing
    with pytest.raises(error, match=words), ExitStack() as stack:
        mapped(8192, "embedding", GPU, stack, runtime)
    assert runtime.calls == calls


def test_a_copy_in_vram_is_refused(runtime, monkeypatch):
    monkeypatch.setattr(mapped_module, "_tensor_of", lambda memory, device: torch.zeros(8192, dtype=torch.uint8))
    with pytest.raises(KernelError, match="torch copied page-locked memory"), ExitStack() as stack:
        mapped(8192, "embedding", GPU, stack, runtime)
    assert runtime.calls == ["register", "device_address", "unregister"]


def test_a_device_that_reports_an_error_still_gives_the_memory_back(runtime, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    stack = ExitStack()
    kept = mapped(8192, "embedding", GPU, stack, runtime)
    with pytest.raises(RuntimeError, match="illegal"):
        stack.close()
    assert kept[0].numel() == 8192
    assert runtime.calls[2:] == ["unregister"]


def test_a_cpu_reads_its_own_memory():
    with ExitStack() as stack:
        host, on_device = mapped(8192, "embedding", CPU, stack)
        assert host is on_device
        assert host.numel() == 8192


DRIVER = r"""
extern "C" int cuMemHostGetDevicePointer_v2(unsigned long long* found, char* address, unsigned flags) {
  *found = (unsigned long long)(address + 4096);
  return flags == 0 ? 0 : 1;
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="built with g++")
def test_the_address_comes_from_the_driver(monkeypatch, tmp_path):
    """Which need not be the host's: "may or may not match", says the reference of cudaHostRegister."""
    path = tmp_path / "driver.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-o", path, "-"], input=DRIVER, text=True, check=True)
    monkeypatch.setattr(device_module, "_driver", lambda: ctypes.CDLL(str(path)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: ExitStack())
    high = 0x7F00_0000_0000  # more than 32 bits
    assert TorchRuntime(GPU).device_address(high) == (0, high + 4096)


@pytest.mark.gpu
def test_a_gpu_reads_what_the_host_writes():
    """Without a byte of VRAM for it."""
    device = make_backend("cupy").device
    with ExitStack() as stack:
        before = torch.cuda.memory_allocated()
        host, on_device = mapped(1 << 20, "test", device, stack)
        host.copy_(torch.arange(1 << 20).to(torch.uint8))
        assert torch.cuda.memory_allocated() == before
        assert torch.equal(on_device[1000:3000].clone().cpu(), host[1000:3000])
