"""Page-locked memory without a GPU: the calls of the CUDA runtime, and that its errors are reported once."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import exl
from exl.errors import KernelError, MemoryBudgetError
from exl.memory.copies import TorchCopyEngine
from exl.memory.device import TorchRuntime, free_bytes, pinned
from exl.memory.host import HostBuffer

GPU = torch.device("cuda", 1)


class CudaError(int):
    """torch's enum, which names only success."""

    def __str__(self) -> str:
        return "cudaError.???"


class Cuda:
    """A runtime whose last error stays until a kernel's check reads it. ``refuse``: what registering memory returns."""

    def __init__(self, refuse: int = 0) -> None:
        self.refuse, self.last, self.device = refuse, 0, 0
        self.calls: list[tuple] = []

    def call(self, name: str, *args: int) -> CudaError:
        self.calls.append((name, self.device, *args))
        self.last = self.refuse or self.last
        return CudaError(self.refuse)

    def kernel(self, *args, **options) -> None:
        found, self.last = self.last, 0
        if found:
            raise RuntimeError(f"CUDA error: {self.text(found)}")

    def text(self, error: int) -> str:
        return {2: "out of memory", 713: "the memory is not registered"}[int(error)]

    @contextmanager
    def current(self, device: torch.device):
        before, self.device = self.device, device.index
        yield
        self.device = before


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    binding = SimpleNamespace(
        cudaError=CudaError,
        cudaGetErrorString=cuda.text,
        cudaHostRegister=lambda *args: cuda.call("register", *args),
        cudaHostUnregister=lambda *args: cuda.call("unregister", *args),
    )
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for CUDA has loaded a real runtime
    monkeypatch.setattr(torch.cuda, "cudart", lambda: binding)
    monkeypatch.setattr(torch.cuda, "device", cuda.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)  # it does not check the last error
    monkeypatch.setattr(torch, "ones", cuda.kernel)
    return cuda


def refused(cuda: Cuda) -> str:
    cuda.refuse = 2
    with pytest.raises(MemoryBudgetError) as caught, pinned(HostBuffer(8192, "test")):
        pass
    return str(caught.value)


def test_a_refusal_says_why(cuda):
    assert "does not lock 8192 bytes (out of memory, cudaError_t 2)" in refused(cuda)


def test_a_refusal_does_not_surface_at_the_next_kernel(cuda):
    refused(cuda)
    cuda.kernel()


def test_memory_is_locked_on_the_device_it_is_for(cuda):
    """It is also unlocked on that device, whichever device is current in the thread."""
    buffer = HostBuffer(8192, "test")
    address = buffer.array.ctypes.data
    with pinned(buffer, GPU):
        assert cuda.calls == [("register", 1, address, 8192, 0)]
    assert cuda.calls[1:] == [("unregister", 1, address)]
    assert cuda.device == 0


def test_what_cannot_be_unlocked_is_told_and_forgotten(cuda, caplog):
    with pinned(HostBuffer(8192, "test"), GPU):
        cuda.refuse = 713
    assert "8192 bytes stay locked (the memory is not registered" in caplog.text
    cuda.kernel()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="this system forks all pages")
def test_a_child_does_not_get_locked_pages(cuda):
    """A fork would copy them all at once: pages that the device may access cannot be copy-on-write."""
    buffer = HostBuffer(8192, "test")
    assert flags_of(buffer) is not None
    assert "dc" not in flags_of(buffer)  # "do not copy area on fork"
    with pinned(buffer):
        assert "dc" in flags_of(buffer)
        assert not child_has(buffer)
    assert "dc" not in flags_of(buffer)
    assert child_has(buffer)
    with pinned(buffer):
        buffer.close()


def flags_of(buffer: HostBuffer) -> list[str] | None:
    """Flags of the mapping that contains the buffer, from /proc/self/smaps."""
    return mapping_flags(buffer.array.ctypes.data, Path("/proc/self/smaps").read_text())


def mapping_flags(address: int, smaps: str) -> list[str] | None:
    inside = False
    for line in smaps.splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


def child_has(buffer: HostBuffer) -> bool:
    address = buffer.array.ctypes.data
    child = os.fork()
    if not child:
        found = mapping_flags(address, Path("/proc/self/smaps").read_text())
        os._exit(1 if found is None else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_whoever_waits_for_an_event_leaves_the_core_to_others(monkeypatch):
    """This includes events of copies: the thread that reads layers needs the core."""
    made = []

    class Event:
        def __init__(self, **options) -> None:
            made.append(options)

        def record(self, stream) -> None:
            self.stream = stream

    current = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_event=lambda event: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    engine = TorchCopyEngine(GPU)
    assert engine.record().stream is current
    copied = engine.copy(torch.zeros(4), torch.ones(4), None)
    assert copied.stream is not current
    assert made == [{"blocking": True}] * 2
    sources = [path.read_text(encoding="utf-8") for path in Path(exl.__file__).parent.rglob("*.py")]
    assert not any(".record_event(" in source for source in sources)  # torch's own events spin


def test_free_memory_is_read_when_the_gpu_is_started(cuda, monkeypatch):
    """The first product allocates memory for cuBLAS's workspace and kernels, so free memory is read after it."""
    free = [8000]
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: device)
    monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype: free.append(7000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free[-1] + 100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 9000))
    assert free_bytes(GPU) == (7100, 9000)

    def broken(*args, **options) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate")

    monkeypatch.setattr(torch, "mm", broken)
    with pytest.raises(KernelError, match=r"cuda:1, 7100 of 9000 bytes free: a first product .*NOT_INITIALIZED"):
        free_bytes(GPU)


def test_any_runtime_can_be_handed_in():
    calls = []
    runtime = SimpleNamespace(
        register=lambda address, num_bytes: calls.append("register") or 1,
        text=lambda error: f"error {error}",
        clear=lambda: calls.append("clear"),
    )
    with pytest.raises(MemoryBudgetError, match=r"\(error 1\)"), pinned(HostBuffer(1, "test"), GPU, runtime):
        pass
    assert calls == ["register", "clear"]


RUNTIME = r"""
extern "C" {
int last = 2, asked = 0;
int cudaGetLastError() { int found = last; last = 0; asked++; return found; }
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="built with g++, found by its soname")
def test_the_last_error_is_taken_from_the_library_that_is_loaded(cuda, monkeypatch, tmp_path):
    """If no library is loaded, or the loaded one has no error, a kernel of torch clears it."""
    monkeypatch.setattr(torch.version, "cuda", "4711.2")
    cuda.last = 2
    TorchRuntime(GPU).clear()
    assert cuda.last == 0
    path = tmp_path / "anything.so"
    command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.4711", "-x", "c++", "-o", path, "-"]
    subprocess.run(command, input=RUNTIME, text=True, check=True)
    library = ctypes.CDLL(str(path))
    cuda.last = 2
    TorchRuntime(GPU).clear()
    assert (ctypes.c_int.in_dll(library, "last").value, cuda.last) == (0, 2)
    TorchRuntime(GPU).clear()
    assert (ctypes.c_int.in_dll(library, "asked").value, cuda.last) == (2, 0)
