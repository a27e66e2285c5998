"""The scalar wrappers of ptx.cuh: their PTX text, evaluated by NumPy, equals what the host shim computes for them."""

from __future__ import annotations

import numpy as np
import pytest

from exl.kernels.args import ptr
from exl.kernels.launch import launch
from exl.kernels.spec import KernelSpec, flattened, nvrtc_options
from tests.host.backends import TEST_KERNELS, make_backend

from .nvrtc import nvrtc
from .ptx_text import evaluate

NUM_RESULTS = 19
EX2, F32_RESULTS = 17, (9, 12, 17)
HALVES = (
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x03FF,
    0x0400,
    0x3C00,
    0x3C01,
    0xBC00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E01,
)
FLOATS = (0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 6e-8, 2.98e-8, 2.9802322387695312e-08, 1e-45, 3e38, np.inf, np.nan)


def inputs() -> np.ndarray:
    """u32 [n, 3]: random words, random and special halves, floats whose rounding to 16 bits is a tie."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (1600, 3), dtype=np.uint32)
    halves = rng.choice(np.array(HALVES, np.uint16), (800, 6)).view(np.uint32)
    ordinary = rng.normal(size=(800, 6)).astype(np.float16).view(np.uint32)
    floats = rng.choice(np.array(FLOATS, np.float32), (320, 3)).view(np.uint32)
    small = (rng.normal(size=(320, 3)) * 30).astype(np.float32).view(np.uint32)
    ties = (rng.integers(0, 2**18, (640, 3), dtype=np.uint32) << 12) + np.uint32(0x38000000)
    found = np.concatenate([words, halves, ordinary, floats, small, ties, ties & np.uint32(0xFFFF8000)])
    return found[: len(found) // 32 * 32]


def same(a: np.ndarray, b: np.ndarray, column: int) -> np.ndarray:
    if column not in F32_RESULTS:
        return a == b
    x, y = a.view(np.float32), b.view(np.float32)
    if column == EX2:  # a GPU is within 2 units in the last place, the shim within 1
        with np.errstate(invalid="ignore", over="ignore"):
            close = np.abs(x.astype(np.float64) - y) <= 2.0**-22 * np.abs(y)
        return close | (x == y) | (np.isnan(x) & np.isnan(y))
    return (a == b) | (np.isnan(x) & np.isnan(y))


@pytest.mark.parametrize("arch", [61, 75, 86, 120])
def test_text_and_shim_agree(arch):
    compiler = nvrtc()
    if compiler is None:
        pytest.skip("NVRTC is not installed (wheel nvidia-cuda-nvrtc-cu12)")
    spec = KernelSpec("instructions.cu", "scalar_instructions", {}, arch)
    ptx, _ = compiler.compile(flattened(spec, TEST_KERNELS), spec.source, nvrtc_options(spec, real=False))
    words = inputs()
    count = len(words)
    by_text = np.zeros((count, NUM_RESULTS), np.uint32)
    met = evaluate(ptx.decode(), spec.entry, count, [words.ravel(), by_text.reshape(-1)])
    assert {"lop3.b32", "prmt.b32", "fma.rn.f16x2", "cvt.rn.f16.f32", "ex2.approx.ftz.f32"} <= set(met)
    assert ("cvt.rn.bf16x2.f32" in met) == (arch >= 80)  # below sm_80 it is integer arithmetic

    by_shim = np.zeros((count, NUM_RESULTS), np.uint32)
    function = make_backend("race", arch, TEST_KERNELS).load(spec)
    launch(function, (count // 32,), (32,), [ptr(words), ptr(by_shim)])
    for column in range(NUM_RESULTS):
        wrong = np.flatnonzero(~same(by_text[:, column], by_shim[:, column], column))
        assert wrong.size == 0, (
            f"result {column} of inputs {[hex(v) for v in words[wrong[0]]]}: "
            f"text {by_text[wrong[0], column]:#x}, shim {by_shim[wrong[0], column]:#x}"
        )


def test_evaluator_refuses_what_it_does_not_know():
    ptx = ".visible .entry f(\n.param .u64 f_param_0\n)\n{\n\tmov.u32 %r1, %tid.x;\n\tbrev.b32 %r2, %r1;\n\tret;\n}\n"
    with pytest.raises(NotImplementedError, match="brev"):
        evaluate(ptx, "f", 32, [np.zeros(1, np.uint32)])
