"""The CUDA backend without a GPU: its calls of CuPy and of the driver, recorded by fakes of both. CuPy's compiler needs
no GPU and is tested if CuPy is installed."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import Pointer, f32, i32, u64
from exl.kernels.compiler import CompileFailed
from exl.kernels.driver import Driver, DriverLaunch
from exl.kernels.launch import CudaBackend, CupyCompiler, launch
from exl.kernels.params import Params
from exl.kernels.spec import KernelSpec, flattened, nvrtc_options
from tests.compile.nvrtc import nvrtc
from tests.host.backends import TEST_KERNELS

SPEC = KernelSpec("gpu.cu", "scale_halves", {}, 90)


# ---- the backend -----------------------------------------------------------------------------------------------------


class DriverError(Exception):
    """Replaces CuPy's CUDADriverError."""


class FakeCupy:
    """The part of CuPy that the backend uses. ``calls`` records its calls in order."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        api = SimpleNamespace(CUDADriverError=DriverError, funcSetAttribute=self.set_attribute)
        self.cuda = SimpleNamespace(
            driver=api,
            runtime=SimpleNamespace(CUDARuntimeError=DriverError),
            function=SimpleNamespace(Module=self.make_module),
            Device=self.device,
        )

    def make_module(self) -> SimpleNamespace:
        def load(code: bytes) -> None:
            if code == b"damaged":
                raise DriverError("CUDA_ERROR_INVALID_IMAGE")
            self.calls.append(("load", code))

        return SimpleNamespace(load=load, get_function=lambda name: SimpleNamespace(ptr=0xF00, name=name))

    def device(self, index: int):
        outer = self

        class Scope:
            def __enter__(self) -> None:
                outer.calls.append(("device", index))

            def __exit__(self, *_: object) -> None:
                outer.calls.append(("device done", index))

        return Scope()

    def set_attribute(self, function: int, attribute: int, value: int) -> None:
        if value == 77_777:
            raise DriverError("CUDA_ERROR_INVALID_VALUE")
        self.calls.append(("attribute", function, attribute, value))


class Compiler:
    def __init__(self, code: bytes = b"code") -> None:
        self.code = code

    def version(self) -> str:
        return "fake 1.0"

    def archs(self) -> tuple[int, ...]:
        return (90,)

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        return self.code, ""


@pytest.fixture
def gpu(monkeypatch, driver_path):
    """torch reports a GPU of compute capability 9.0; CuPy and the driver are recording fakes."""
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("exl.kernels.launch.Driver", lambda: Driver(driver_path))
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "init": lambda: None,
        "get_device_properties": lambda device: properties,
        "current_stream": lambda device: SimpleNamespace(
            cuda_stream=0xABC, query=lambda: cupy.calls.append(("query",))
        ),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cupy


def arguments() -> list:
    x, y = Pointer(0x1000, 20, "f16", "cuda:1"), Pointer(0x2000, 40, "f32", "cuda:1")
    return [x, y, i32(10), f32(0.5)]


def test_loading_and_launching(gpu, tmp_path, driver_path):
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    assert (backend.device, backend.arch, backend.num_multiprocessors) == (torch.device("cuda", 1), 90, 132)
    function = backend.load(SPEC)
    assert backend.load(SPEC) is function
    assert gpu.calls == [("device", 1), ("load", b"code"), ("device done", 1)]
    launch(function, (3, 2), (128,), arguments(), 1024)
    assert seen(driver_path)[:12] == [3, 2, 1, 128, 1, 1, 1024, 0xABC, 0, 0xF00, 0x1000, 0x2000]


def test_a_new_thread_takes_the_devices_context_first(gpu, tmp_path, monkeypatch):
    """In a thread that has not called the runtime, the driver's own calls find no context."""
    function = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS).load(SPEC)
    gpu.calls.clear()

    def run() -> None:
        for _ in range(2):
            launch(function, (1,), (128,), arguments())

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert gpu.calls == [("query",), ("query",)]  # once per thread
    gpu.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # the runtime began one in this thread
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert gpu.calls == []


def test_launches_enter_the_device_where_another_is_current(gpu, tmp_path, driver_path, monkeypatch):
    """The driver launches into the current context."""
    entered = []

    class Scope:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            entered.append((self.index, torch.cuda.current_device()))
            monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)

        def __exit__(self, *_: object) -> None:
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    function = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS).load(SPEC)
    monkeypatch.setattr(torch.cuda, "device", Scope)
    launch(function, (1,), (128,), arguments())
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch(function, (4,), (128,), arguments())
    assert entered == [(1, 0)]
    assert seen(driver_path)[0] == 4
    assert torch.cuda.current_device() == 0


def test_a_prepared_launch_goes_to_the_stream_that_is_current(gpu, tmp_path, driver_path, monkeypatch):
    """A graph is captured on another stream than the launches before it."""
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    work = backend.load(SPEC).prepare((1, 1, 1), (128, 1, 1), Params(arguments()), 0, False)
    found = []
    for stream in (0xABC, 0xDEF, 0, 0xABC):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, at=stream: SimpleNamespace(cuda_stream=at))
        backend.start([work])
        found.append(seen(driver_path)[7])
    assert found == [0xABC, 0xDEF, 0, 0xABC]


def test_large_shared_memory_is_asked_for_once(gpu, tmp_path):
    function = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS).load(SPEC)
    for num_bytes in (48 * 1024, 60_000, 50_000, 70_000):
        launch(function, (1,), (128,), arguments(), num_bytes)
    asked = [call[1:] for call in gpu.calls if call[0] == "attribute"]
    assert asked == [(0xF00, 8, 60_000), (0xF00, 8, 70_000)]


def test_dependent_launches_where_the_driver_knows_them(gpu, tmp_path, driver_path):
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    launch(backend.load(SPEC), (9,), (128,), arguments(), 64, dependent=True)
    assert seen(driver_path)[:10] == [9, 1, 1, 128, 1, 1, 64, 0xABC, 1, 0xF00]
    compiler = Compiler()
    compiler.archs = lambda: (86,)
    older = KernelSpec(SPEC.source, SPEC.entry, {}, 86)
    backend = CudaBackend(folder=tmp_path, compiler=compiler, sources=TEST_KERNELS)
    launch(backend.load(older), (8,), (128,), arguments(), 64, dependent=True)
    assert seen(driver_path)[:10] == [8, 1, 1, 128, 1, 1, 64, 0xABC, 0, 0xF00]  # a plain launch below sm_90


class Graphs:
    """torch's side of captures: a graph's scope, which may fail at its end, and the stream that is current after it."""

    def __init__(self, monkeypatch) -> None:
        self.fail_at_end = False
        self.stream = None
        outer = self

        class Scope:
            def __init__(self, graph, stream, capture_error_mode) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                outer.stream = self.stream

            def __exit__(self, *_: object) -> None:
                if outer.fail_at_end:
                    raise RuntimeError("the capture was invalidated")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
        monkeypatch.setattr(torch.cuda, "graph", Scope)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream of its own")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))


class Circle:
    """Garbage that only the cycle collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("failure", [None, "inside", "at the end"])
@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_inside_of_a_capture(gpu, tmp_path, monkeypatch, failure, collects):
    """Garbage may be a module, and unloading one breaks the capture. It may be collected before the capture."""
    graphs = Graphs(monkeypatch)
    graphs.fail_at_end = failure == "at the end"
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    before = torch.cuda.current_stream(backend.device).cuda_stream
    garbage = weakref.ref(Circle())
    seen = []

    def run() -> None:
        seen.append((gc.isenabled(), garbage() is None, graphs.stream))
        if failure == "inside":
            raise KernelError("inside")

    was = gc.isenabled()
    gc.enable() if collects else gc.disable()
    try:
        if failure is None:
            assert backend.capture(run)() == "replayed"
        else:
            with pytest.raises((KernelError, RuntimeError), match=r"inside|invalidated"):
                backend.capture(run)
        assert gc.isenabled() == collects
    finally:
        gc.enable() if was else gc.disable()
    assert seen == [(False, True, "a stream of its own")]
    assert graphs.stream.cuda_stream == before


def test_a_graph_whose_capture_failed_is_kept(gpu, tmp_path, monkeypatch):
    """torch's allocators keep its address until a capture ends without error."""
    graphs, kept = Graphs(monkeypatch), []
    made = SimpleNamespace(replay=None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr("exl.kernels.launch._BROKEN_GRAPHS", kept)
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    backend.capture(lambda: None)
    assert kept == []
    graphs.fail_at_end = True
    with pytest.raises(RuntimeError, match="invalidated"):
        backend.capture(lambda: None)
    assert kept == [made]


def test_refusals(gpu, tmp_path, monkeypatch):
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    function = backend.load(SPEC)
    on_another = [Pointer(0x1000, 20, "f16", "cuda:0"), *arguments()[1:]]
    with pytest.raises(KernelError, match="argument 0 is on cuda:0, the kernel runs on cuda:1"):
        launch(function, (1,), (128,), on_another)
    with pytest.raises(KernelError, match=r"scale_halves sm_90 on grid \(99, 1, 1\).* failed with 1: invalid argument"):
        launch(function, (99,), (128,), arguments())
    with pytest.raises(KernelError, match=r"scale_halves sm_90 with 77777 bytes .*CUDA_ERROR_INVALID_VALUE"):
        launch(function, (1,), (128,), arguments(), 77_777)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.load(SPEC) is function
    with pytest.raises(KernelError, match="must be loaded before a graph is captured"):
        backend.load(KernelSpec(SPEC.source, "add_weights", {}, 90))


def test_code_that_the_driver_refuses(gpu, tmp_path):
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(b"damaged"), sources=TEST_KERNELS)
    with pytest.raises(KernelError, match=r"cannot be loaded on cuda:1: CUDA_ERROR_INVALID_IMAGE"):
        backend.load(SPEC)


def test_without_a_gpu_the_cuda_backend_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="no CUDA device"):
        CudaBackend()


# ---- the driver ------------------------------------------------------------------------------------------------------

# The declarations of cuda.h (CUDA 12 and 13), and an entry that records its arguments.
DRIVER = r"""
#include <stdint.h>
#include <string.h>
typedef struct CUstream_st* CUstream;
typedef enum { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 } CUlaunchAttributeID;
typedef union {
  char pad[64];
  struct { void* base_ptr; size_t num_bytes; float hitRatio; int hitProp, missProp; } accessPolicyWindow;
  int cooperative, programmaticStreamSerializationAllowed;
} CUlaunchAttributeValue;
typedef struct {
  CUlaunchAttributeID id;
  char pad[8 - sizeof(CUlaunchAttributeID)];
  CUlaunchAttributeValue value;
} CUlaunchAttribute;
typedef struct {
  unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
} CUlaunchConfig;
extern "C" {
uint64_t seen[16];
int cuLaunchKernelEx(const CUlaunchConfig* c, void* f, void** params, void** extra) {
  const uint64_t all[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
    c->sharedMemBytes, (uint64_t)c->hStream, c->numAttrs, (uint64_t)f, *(uint64_t*)params[0], *(uint32_t*)params[1],
    (uint64_t)extra, c->numAttrs ? c->attrs[0].id : 0u,
    c->numAttrs ? (uint64_t)c->attrs[0].value.programmaticStreamSerializationAllowed : 0u, sizeof *c->attrs};
  memcpy(seen, all, sizeof all);
  return c->gridDimX == 99 ? 1 : 0;
}
int cuGetErrorString(int, const char** text) { *text = "invalid argument"; return 0; }
}
"""


@pytest.fixture(scope="module")
def driver_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libdriver.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-o", path, "-"], input=DRIVER, text=True, check=True)
    return str(path)


def seen(path: str) -> list[int]:
    """The recorded arguments of the last launch."""
    return list((ctypes.c_uint64 * 16).in_dll(ctypes.CDLL(path), "seen"))


@pytest.mark.parametrize("dependent", [False, True])
def test_launch_structures_reach_the_driver(driver_path, dependent):
    params = Params([u64(0x1234567890AB), f32(1.5)])
    stream, function = 0x7F0000001000, 0x7F0000002000
    DriverLaunch(Driver(driver_path), "", function, (5, 6, 7), (8, 9, 1), params, 70000, dependent).start(stream)
    bits = int.from_bytes(np.float32(1.5).tobytes(), "little")
    head = [5, 6, 7, 8, 9, 1, 70000, stream, int(dependent), function, 0x1234567890AB, bits, 0]
    assert seen(driver_path) == [*head, 6 if dependent else 0, int(dependent), 72]


def test_driver_errors(driver_path):
    params = Params([u64(0), f32(0)])
    with pytest.raises(KernelError, match="a kernel: cuLaunchKernelEx failed with 1: invalid argument"):
        DriverLaunch(Driver(driver_path), "a kernel", 0, (99, 1, 1), (1, 1, 1), params, 0, True).start(0)
    with pytest.raises(KernelError, match="has no cuLaunchKernelEx"):
        DriverLaunch(Driver("libm.so.6"), "a kernel", 0, (1, 1, 1), (1, 1, 1), params, 0, True)


# ---- CuPy's binding, if it is installed: no GPU needed ---------------------------------------------------------------


def test_without_cupy_the_compiler_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    with pytest.raises(KernelError, match="through CuPy, which is not installed"):
        CupyCompiler()


@pytest.mark.parametrize("real", [True, False])
def test_cupys_compiler_gives_what_nvrtc_gives(real):
    pytest.importorskip("cupy_backends", reason="CuPy is not installed")
    direct, through = nvrtc(), CupyCompiler()
    if direct is None or direct.version() != through.version():
        pytest.skip("CuPy uses another NVRTC")
    assert through.archs() == direct.archs()
    text, options = flattened(SPEC, TEST_KERNELS), nvrtc_options(SPEC, real=real)
    assert through.compile(text, SPEC.source, options)[0] == direct.compile(text, SPEC.source, options)[0]
    with pytest.raises(CompileFailed, match="error"):
        through.compile("int f( {", "x.cu", options)
