"""The CUDA backend without a GPU: what it hands to CuPy and to the driver, each played by one that writes it down.
CuPy's compiler needs no GPU, and is tested where CuPy is installed."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import Pointer, f32, i32, u64
from exl.kernels.compiler import CompileFailed
from exl.kernels.driver import Driver, pack_params
from exl.kernels.launch import CudaBackend, CupyCompiler, launch
from exl.kernels.spec import KernelSpec, flattened, nvrtc_options
from tests.compile.nvrtc import nvrtc
from tests.host.backends import TEST_KERNELS

SPEC = KernelSpec("gpu.cu", "scale_halves", {}, 90)


# ---- the backend -----------------------------------------------------------------------------------------------------


class DriverError(Exception):
    """In the place of CuPy's CUDADriverError."""


class FakeCupy:
    """The part of CuPy that the backend uses. ``calls`` holds what was asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        api = SimpleNamespace(
            CUDADriverError=DriverError, launchKernel=self.launch_kernel, funcSetAttribute=self.set_attribute
        )
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
        self.calls.append(("attribute", function, attribute, value))

    def launch_kernel(self, function: int, *numbers: int) -> None:
        *geometry, stream, params, extra = numbers
        if geometry[0] == 77:
            raise DriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        slots = (ctypes.c_void_p * 4).from_address(params)
        values = [ctypes.c_uint64.from_address(slots[0]).value, ctypes.c_int32.from_address(slots[2]).value]
        values.append(ctypes.c_float.from_address(slots[3]).value)
        self.calls.append(("launch", function, tuple(geometry), stream, extra, values))


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
def gpu(monkeypatch):
    """A torch that believes in a GPU of compute capability 9.0, and a CuPy that writes down."""
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "init": lambda: None,
        "get_device_properties": lambda device: properties,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0xABC),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cupy


def arguments() -> list:
    x, y = Pointer(0x1000, 20, "f16", "cuda:1"), Pointer(0x2000, 40, "f32", "cuda:1")
    return [x, y, i32(10), f32(0.5)]


def test_loading_and_launching(gpu, tmp_path):
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    assert (backend.device, backend.arch, backend.num_multiprocessors) == (torch.device("cuda", 1), 90, 132)
    function = backend.load(SPEC)
    assert backend.load(SPEC) is function
    assert gpu.calls == [("device", 1), ("load", b"code"), ("device done", 1)]
    gpu.calls.clear()
    launch(function, (3, 2), (128,), arguments(), 1024)
    values = [0x1000, 10, 0.5]
    expected = ("launch", 0xF00, (3, 2, 1, 128, 1, 1, 1024), 0xABC, 0, values)
    assert gpu.calls == [("device", 1), expected, ("device done", 1)]


def test_large_shared_memory_is_asked_for_once(gpu, tmp_path):
    function = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS).load(SPEC)
    for num_bytes in (48 * 1024, 60_000, 50_000, 70_000):
        launch(function, (1,), (128,), arguments(), num_bytes)
    asked = [call[1:] for call in gpu.calls if call[0] == "attribute"]
    assert asked == [(0xF00, 8, 60_000), (0xF00, 8, 70_000)]


def test_dependent_launches_go_to_the_driver_where_it_knows_them(gpu, tmp_path, driver_path, monkeypatch):
    monkeypatch.setattr("exl.kernels.launch.Driver", lambda: Driver(driver_path))
    backend = CudaBackend(folder=tmp_path, compiler=Compiler(), sources=TEST_KERNELS)
    gpu.calls.clear()
    launch(backend.load(SPEC), (9,), (128,), arguments(), 64, dependent=True)
    seen = list((ctypes.c_uint64 * 16).in_dll(ctypes.CDLL(driver_path), "seen"))
    assert seen[:10] == [9, 1, 1, 128, 1, 1, 64, 0xABC, 1, 0xF00]
    assert not any(call[0] == "launch" for call in gpu.calls)

    compiler = Compiler()
    compiler.archs = lambda: (86,)
    older = KernelSpec(SPEC.source, SPEC.entry, {}, 86)
    backend = CudaBackend(folder=tmp_path, compiler=compiler, sources=TEST_KERNELS)
    launch(backend.load(older), (9,), (128,), arguments(), 64, dependent=True)
    assert [call[0] for call in gpu.calls].count("launch") == 1  # a plain launch below sm_90


class Graphs:
    """torch's side of captures: a graph's scope, which may fail at its end, and the stream that it leaves behind."""

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
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("failure", [None, "inside", "at the end"])
@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_inside_of_a_capture(gpu, tmp_path, monkeypatch, failure, collects):
    """It may be a module, and unloading one breaks the capture. Before, there is a chance."""
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
    """torch's allocators hold on to its address until a capture has ended well."""
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
    with pytest.raises(KernelError, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        launch(function, (77,), (128,), arguments())
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

# The declarations of cuda.h (CUDA 12 and 13), and an entry that writes down what it was given.
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


@pytest.mark.parametrize("dependent", [False, True])
def test_launch_structures_reach_the_driver(driver_path, dependent):
    params, keep = pack_params([u64(0x1234567890AB), f32(1.5)])
    stream, function = 0x7F0000001000, 0x7F0000002000
    Driver(driver_path).launch(function, (5, 6, 7), (8, 9, 1), 70000, stream, params, dependent=dependent)
    seen = list((ctypes.c_uint64 * 16).in_dll(ctypes.CDLL(driver_path), "seen"))
    bits = int.from_bytes(np.float32(1.5).tobytes(), "little")
    head = [5, 6, 7, 8, 9, 1, 70000, stream, int(dependent), function, 0x1234567890AB, bits, 0]
    assert seen == [*head, 6 if dependent else 0, int(dependent), 72]
    assert len(keep) == 2


def test_driver_errors(driver_path):
    params, _keep = pack_params([u64(0), f32(0)])
    with pytest.raises(KernelError, match="cuLaunchKernelEx failed with 1: invalid argument"):
        Driver(driver_path).launch(0, (99, 1, 1), (1, 1, 1), 0, 0, params, dependent=True)
    with pytest.raises(KernelError, match="has no cuLaunchKernelEx"):
        Driver("libm.so.6").launch(0, (1, 1, 1), (1, 1, 1), 0, 0, params, dependent=True)


# ---- CuPy's binding, where it is installed: no GPU needed ------------------------------------------------------------


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
