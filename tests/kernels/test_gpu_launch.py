"""Launching on a real GPU: torch's stream, graphs, large shared memory, programmatic dependent launch. The same kernels
run on the host shim first, so a failure on a GPU is a fault of the launch."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, i64, ptr
from exl.kernels.launch import CudaBackend, launch
from exl.kernels.spec import KernelSpec
from exl.layout.arch import arch_limits
from tests.host.backends import MODES, TEST_KERNELS, make_backend


def load(backend, entry: str):
    return backend.load(KernelSpec("gpu.cu", entry, {}, backend.arch))


@pytest.fixture(params=MODES)
def small(request):
    return make_backend(request.param, 90, TEST_KERNELS)


@pytest.fixture
def gpu():
    return make_backend("cupy", sources=TEST_KERNELS)


def test_values(small):
    torch.manual_seed(0)
    x = torch.randn(1000).half().to(small.device)
    y = torch.zeros(1000, device=small.device)
    launch(load(small, "scale_halves"), (8,), (128,), [ptr(x), ptr(y), i32(1000), f32(2.5)])
    assert torch.equal(y, x.float() * 2.5)


def test_shared_memory_above_48_kb(small):
    num_bytes = arch_limits(small.arch).max_shared_bytes
    if num_bytes <= 48 * 1024:
        pytest.skip("this architecture has 48 KB")
    count = num_bytes // 4
    x = torch.randn(2, count).to(small.device)
    y = torch.zeros_like(x)
    launch(load(small, "reverse_large"), (2,), (128,), [ptr(x), ptr(y), i32(count)], num_bytes)
    assert torch.equal(y, x.flip(1))


def chain(backend, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, length: int) -> None:
    """y = 2 x + length * w; each launch may start before the previous one has ended."""
    grid, n = (-(-x.numel() // 128),), i32(x.numel())
    launch(load(backend, "scale_halves"), grid, (128,), [ptr(x), ptr(y), n, f32(2.0)])
    for _ in range(length):
        launch(load(backend, "add_weights"), grid, (128,), [ptr(w), ptr(y), n], dependent=True)


def test_dependent_launches(small):
    n = 128 * (2000 if small.device.type == "cuda" else 3)
    x, w = torch.randn(n).half().to(small.device), torch.randint(-4, 5, (128,)).float().to(small.device)
    y = torch.zeros(n, device=small.device)
    chain(small, x, w, y, 8)
    expected = x.float() * 2
    for _ in range(8):
        expected = (expected.view(-1, 128) + w).view(-1)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("mode", ["race", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_addresses_beyond_4_gb(mode):
    """A slab of 5 GB, of which only one page is accessed."""
    backend = make_backend(mode, 86, TEST_KERNELS)
    count, index = 5 * 2**28, 2**30 + 12345 * 4
    if mode == "cupy":
        slab = torch.empty(count, device=backend.device)
        slab[index] = 0
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        slab = np.frombuffer(mmap.mmap(-1, count * 4, flags=flags), np.float32)
    launch(load(backend, "far_store"), (1,), (32,), [ptr(slab), i64(index)])
    assert float(slab[index]) == 1.0
    if mode == "race":
        assert slab[index - 2**30] == 0.0
        launch(load(backend, "far_store_wrapped"), (1,), (32,), [ptr(slab), i32(2**20 + 1), i32(2**12)])
        assert slab[2**12] == 1.0  # a 32-bit index wraps to another element: the check above can fail


@pytest.mark.gpu
def test_launches_on_torchs_current_stream(gpu):
    x = torch.randn(1 << 22).half().to(gpu.device)
    y = torch.zeros(1 << 22, device=gpu.device)
    function = load(gpu, "scale_halves")
    side = torch.cuda.Stream(gpu.device)
    side.wait_stream(torch.cuda.current_stream(gpu.device))
    with torch.cuda.stream(side):
        for k in range(50):  # in order on one stream: the last value stays
            launch(function, (1 << 15,), (128,), [ptr(x), ptr(y), i32(1 << 22), f32(k)])
        z = y + 0.0
    side.synchronize()
    assert torch.equal(z, x.float() * 49.0)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [0, 8])
def test_graph_capture(gpu, length):
    """Captured once, replayed on new inputs; with length 8 the graph contains the chain of dependent launches."""
    n = 128 * 1000
    x, w = torch.randn(n).half().to(gpu.device), torch.randint(-4, 5, (128,)).float().to(gpu.device)
    y = torch.zeros(n, device=gpu.device)
    chain(gpu, x, w, y, length)  # loads the modules
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(gpu, x, w, y, length)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(n).half())
        y.fill_(-1.0)
        graph.replay()
        torch.cuda.synchronize()
        expected = x.float() * 2
        for _ in range(length):
            expected = (expected.view(-1, 128) + w).view(-1)
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_nothing_is_loaded_during_a_capture(gpu):
    fresh = CudaBackend(sources=TEST_KERNELS)
    graph = torch.cuda.CUDAGraph()
    y = torch.zeros(1, device=gpu.device)
    with torch.cuda.graph(graph):
        y += 1
        with pytest.raises(KernelError, match="must be loaded before a graph is captured"):
            load(fresh, "scale_halves")


@pytest.mark.gpu
def test_compiled_code_is_found_again(gpu, tmp_path):
    first = CudaBackend(folder=tmp_path, sources=TEST_KERNELS)
    load(first, "scale_halves")
    (path,) = tmp_path.glob("*.bin")
    stamp = path.stat().st_mtime_ns
    second = CudaBackend(folder=tmp_path, sources=TEST_KERNELS)
    x, y = torch.ones(128, dtype=torch.half, device=gpu.device), torch.zeros(128, device=gpu.device)
    launch(load(second, "scale_halves"), (1,), (128,), [ptr(x), ptr(y), i32(128), f32(3.0)])
    assert (y == 3).all()
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.gpu
def test_host_tensors_are_refused(gpu):
    x, y = torch.ones(128, dtype=torch.half), torch.zeros(128, device=gpu.device)
    with pytest.raises(KernelError, match="argument 0 is on cpu"):
        launch(load(gpu, "scale_halves"), (1,), (128,), [ptr(x), ptr(y), i32(128), f32(3.0)])
