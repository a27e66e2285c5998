"""The shim's results of warp-wide instructions against NumPy and the definitions of the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest

from exl.kernels.args import i32, ptr
from exl.kernels.launch import launch
from exl.kernels.spec import KernelSpec
from tests.host.backends import MODES, TEST_KERNELS, make_backend
from tests.host.shim import HostShim, ShimBackend

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # the ISA's groupID and threadID_in_group


def run(mode, entry, args, kind=0, grid=(1,), block=(32,), shared=0, arch=86):
    backend = make_backend(mode, arch, TEST_KERNELS)
    spec = KernelSpec("collectives.cu", entry, {"EXL_KIND": kind}, backend.arch)
    if mode != "cupy":
        launch(backend.load(spec), grid, block, [a if not isinstance(a, np.ndarray) else ptr(a) for a in args], shared)
        return
    import torch

    tensors = [torch.from_numpy(a.view(np.uint8)).cuda() if isinstance(a, np.ndarray) else a for a in args]
    launch(backend.load(spec), grid, block, [ptr(t) if isinstance(t, torch.Tensor) else t for t in tensors], shared)
    for array, tensor in zip(args, tensors, strict=True):
        if isinstance(array, np.ndarray):
            array.view(np.uint8)[...] = tensor.cpu().numpy()


def bf16(x: np.ndarray) -> np.ndarray:
    """f32 -> bf16 bits, for values that bf16 holds exactly."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pack_mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fragments of each lane, u32 [32, 10], by the figures of the ISA's section on mma.m16n8k8 and mma.m16n8k16."""
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        rows = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        for r, (row, col) in enumerate(rows[: a.shape[1] // 4]):
            words[lane, r] = int(a[row, col]) | int(a[row, col + 1]) << 16
        for r in range(b.shape[0] // 8):
            words[lane, 4 + r] = int(b[2 * t + 8 * r, g]) | int(b[2 * t + 1 + 8 * r, g]) << 16
        words[lane, 6:] = [c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]
    return words


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["m16n8k16-f16", "m16n8k16-bf16", "m16n8k8-f16"])
def test_mma(mode, kind):
    rng = np.random.default_rng(kind)
    depth = 8 if kind == 2 else 16
    a = rng.integers(-8, 9, (16, depth)).astype(np.float32)  # exact in f32 in any order of the sums
    b = rng.integers(-8, 9, (depth, 8)).astype(np.float32) / 4
    c = rng.integers(-100, 100, (16, 8)).astype(np.float32)
    bits = bf16 if kind == 1 else lambda x: x.astype(np.float16).view(np.uint16)
    words = pack_mma(bits(a), bits(b), c.view(np.uint32))
    out = np.zeros((32, 4), np.float32)
    run(mode, "mma", [words, out], kind)
    d = a @ b + c
    expected = np.stack(
        [d[GROUP, 2 * MEMBER], d[GROUP, 2 * MEMBER + 1], d[GROUP + 8, 2 * MEMBER], d[GROUP + 8, 2 * MEMBER + 1]], 1
    )
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_mma_sums_in_f32_and_cuts_off(arch):
    """Against float64: off by at most one unit in the last place of the largest term, and towards zero."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(16, 16)).astype(np.float16), rng.normal(size=(16, 8)).astype(np.float16)
    words = pack_mma(a.view(np.uint16), b.view(np.uint16), np.zeros((16, 8), np.uint32))
    out = np.zeros((32, 4), np.float32)
    run("race", "mma", [words, out], 0, arch=arch)
    exact = (a.astype(np.float64) @ b.astype(np.float64))[GROUP, 2 * MEMBER]
    largest = (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))[GROUP, 2 * MEMBER]
    error = out[:, 0] - exact
    assert (np.abs(error) <= 2.0**-23 * largest * (16 // {75: 4, 80: 8, 90: 16}[arch])).all()
    if arch == 90:  # one step: a single rounding at the end, by truncation
        assert (error * np.sign(exact) <= 0).all()
        assert (error != 0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [1, 2, 4, 9, 10, 12, 16])
def test_matrices(mode, kind):
    m = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) * 7 + 1
    out = np.zeros((32, 4), np.uint32)
    run(mode, "matrices", [m, out], kind, shared=512)
    count, transposed = (1, True) if kind == 16 else (kind % 8, kind > 8)
    source = m.transpose(0, 2, 1) if transposed else m
    for i in range(4):
        pair = source[i, GROUP, 2 * MEMBER].astype(np.uint32) | source[i, GROUP, 2 * MEMBER + 1].astype(np.uint32) << 16
        assert np.array_equal(out[:, i], pair if i < count else np.zeros(32))


def shuffled(v: np.ndarray, mode: str, operand: int, width: int) -> np.ndarray:
    """The ISA's pseudocode of shfl.sync for each lane of one warp."""
    result = np.zeros_like(v)
    segment = 32 - width
    for lane in range(32):
        highest = (lane & segment) | (0 if mode == "up" else (31 & ~segment))
        if mode == "up":
            source = lane - operand
            valid = source >= highest
        elif mode == "down":
            source = lane + operand
            valid = source <= highest
        elif mode == "xor":
            source = lane ^ operand
            valid = source <= highest
        else:
            source = (lane & segment) | (operand & ~segment & 31)
            valid = source <= highest
        result[lane] = v[source] if valid else v[lane]
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 7, 16, 31])
def test_shuffles(mode, operand, width):
    v = np.random.default_rng(1).integers(1, 2**30, 64).astype(np.uint32)
    out = np.zeros((64, 8), np.uint32)
    run(mode, "shuffles", [v, out, i32(operand), i32(width)], block=(64,))
    for warp in (0, 32):
        part, got = v[warp : warp + 32], out[warp : warp + 32]
        for column, name in enumerate(("idx", "up", "down", "xor")):
            assert np.array_equal(got[:, column], shuffled(part, name, operand, width)), name
        assert np.array_equal(got[:, 4], part[LANES ^ 1])
        assert np.array_equal(got[:, 5], warp + (LANES ^ 1))
        assert np.array_equal(got[:, 6], shuffled(part, "down", 16, 32))
        assert np.array_equal(got[:8, 7], part[LANES[:8] ^ 4])
        assert not got[8:, 7].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [64, 48])
def test_votes(mode, threads):
    v = np.random.default_rng(2).integers(0, 8, 64).astype(np.uint32)
    out = np.zeros((64, 14), np.uint32)
    run(mode, "votes", [v, out], block=(threads,))
    for start in (0, 32):
        part = v[start : min(start + 32, threads)]
        lanes = 1 << np.arange(len(part), dtype=np.uint64)
        full = int(lanes.sum())
        expected = [
            np.full(len(part), int(lanes[part % 2 == 1].sum())),
            np.full(len(part), (part == 3).any()),
            np.ones(len(part)),
            np.array([int(lanes[part == x].sum()) for x in part]),
            np.full(len(part), full),
            np.ones(len(part)),
            np.full(len(part), part.sum()),
            np.full(len(part), (part.astype(np.int32) - 4).max()).astype(np.int32).view(np.uint32),
            np.full(len(part), part.min()),
            np.full(len(part), np.bitwise_xor.reduce(part)),
            np.full(len(part), (v[:threads] % 2).sum()),
            np.full(len(part), (v[:threads] == 7).any()),
            np.ones(len(part)),
            np.ones(len(part)),
        ]
        assert np.array_equal(out[start : start + len(part)], np.stack(expected, 1).astype(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_atomics(mode):
    rng = np.random.default_rng(3)
    v = rng.integers(-1000, 1000, 64).astype(np.int32)
    result = np.array([5, 900, -900, 0, 0, 0, -1, 9], np.int32)
    start = result.copy()
    old = np.zeros((64, 8), np.int32)
    run(mode, "atomics", [v, result, old], block=(64,), shared=32)
    assert result[0] == start[0] + v.sum()
    assert result[1] == min(900, v.min())
    assert result[2] == max(-900, v.max())
    assert result[3] == np.bitwise_xor.reduce(v)
    assert result[4] == 64 % 41
    assert sorted(old[:, 4]) == sorted(np.arange(64) % 41)
    assert 1 <= result[5] <= 64  # the longest run of threads in order
    assert result[7] == start[7] - v.sum()
    assert sorted([*old[:, 6], result[6]]) == list(range(-1, 64))  # every value was exchanged exactly once


@pytest.mark.parametrize("mode", MODES)
def test_last_block_to_arrive(mode):
    x = np.random.default_rng(4).normal(size=20 * 32).astype(np.float32)
    sums = []
    for _ in range(3):
        partials, counter, y = np.zeros(20, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
        run(mode, "last_block", [x, partials, counter, y], grid=(20,), shared=4)
        assert counter[0] == 0
        sums.append(y[0])
    assert abs(sums[0] - x.astype(np.float64).sum()) < 1e-4
    assert sums[0] == sums[1] == sums[2]  # although blocks arrived in three different orders


def order_of(seed: int, mode: str = "plain", extra: tuple[str, ...] = ()) -> np.ndarray:
    backend = ShimBackend(HostShim(mode, seed, TEST_KERNELS, extra))
    counter, order = np.zeros(1, np.int32), np.zeros(256, np.int32)
    launch(backend.load(KernelSpec("collectives.cu", "schedule", {}, 86)), (4,), (64,), [ptr(counter), ptr(order)])
    assert sorted(order) == list(range(256))
    return order


def test_threads_run_in_seeded_random_order():
    first = order_of(1)
    assert np.array_equal(first, order_of(1))
    assert not np.array_equal(first, order_of(2))
    assert not np.array_equal(first // 64, np.sort(first // 64))  # blocks
    block = first[first // 64 == 0]
    assert not np.array_equal(block, np.sort(block))  # threads
    assert (np.diff(block // 32) != 0).sum() > 2  # warps take turns


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_portable_fibers(mode):
    """Without the switch in assembly, ucontext switches fibers: in the same order, with the same results."""
    assert np.array_equal(order_of(1, mode, ("-DEXL_UCONTEXT",)), order_of(1, mode))
