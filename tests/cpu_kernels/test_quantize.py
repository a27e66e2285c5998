"""Activations to integers, against NumPy byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.quantize import QuantizeRows, form_of
from exl.layout.columns import ColumnLayout
from tests.cpu_kernels import integer_reference
from tests.cpu_kernels.guards import guarded_array

LAYOUTS = [
    pytest.param(ColumnLayout(4, 300, 64, 128), 2, id="4 bits, K no multiple of a record"),
    pytest.param(ColumnLayout(8, 256, 64, 64), 1, id="8 bits"),
    pytest.param(ColumnLayout(3, 7 * 24 + 5, 64, 24), 2, id="3 bits, padded groups"),
    pytest.param(ColumnLayout(2, 90, 64, 90), 1, id="2 bits, one group"),
]


def activations(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Of all magnitudes; one row of zeros, one of denormals, one next to nothing, one that nearly overflows."""
    x = rng.standard_normal((rows, size)).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 20, (rows, size // 16 + 1)).repeat(16, 1)[:, :size]).astype(np.float32)
    x[0], x[1] = 0, np.float32(1e-42)
    x[2] = rng.choice(np.float32([9e-31, -1.1e-30, 1e-30]), size)
    x[3] *= np.float32(3.4e38) / np.abs(x[3]).max()
    return x


def quantize(library: Library, x: np.ndarray, layout: ColumnLayout, parts: int, *, gathered: bool, per: int = 3):
    """The records u8 [R, M, bytes], in memory that ends where they do. What a kernel leaves as it is, is zero."""
    rows, form = len(x), form_of(layout, parts)
    records = guarded_array(np.zeros((layout.num_records, rows, form.num_bytes), np.uint8))
    source = guarded_array(layout.source_rows()) if gathered else None
    args = slots(x, records, x.strides[0] // 4, layout.num_records, rows, source, per, x.shape[1])
    library.call(QuantizeRows(form, gathered), args, rows * -(-layout.num_records // per))
    return records


@pytest.mark.parametrize(("layout", "parts"), LAYOUTS)
@pytest.mark.parametrize("gathered", [True, False])
def test_as_numpy(library: Library, layout: ColumnLayout, parts: int, gathered: bool) -> None:
    """In order, inputs behind K count as zero and are not read: there is a page that faults."""
    if not gathered:
        layout = ColumnLayout(layout.bits, layout.K, layout.N, layout.K)  # groups have no gaps
    x = guarded_array(activations(np.random.default_rng(1), 7, layout.K))
    found = quantize(library, x, layout, parts, gathered=gathered)
    expected = integer_reference.record_bytes(integer_reference.quantized(x, layout, parts), layout.bits, parts)
    assert found.tobytes() == expected.tobytes()


def test_half_a_step_at_most(library: Library) -> None:
    layout = ColumnLayout(8, 128, 64, 128)  # bytes in the order of the inputs
    x = np.random.default_rng(2).standard_normal((4, 128)).astype(np.float32)
    for parts in (1, 2):
        records = quantize(library, x, layout, parts, gathered=False)[0]
        q = records[:, :128].view(np.int8).astype(np.float64)
        if parts == 2:
            q = 256 * q + records[:, 128:256].view(np.int8)
        step = np.ascontiguousarray(records[:, parts * 128 :][:, :4]).view(np.float32).astype(np.float64)
        assert step.max() < {1: 0.05, 2: 0.0002}[parts]
        assert (np.abs(q * step - x) <= step * (0.5 + 1e-2)).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_the_step_nan(library: Library, bad: float) -> None:
    """In its record alone; and no integer comes from it."""
    layout = ColumnLayout(4, 256, 64, 128)
    x = np.ones((3, 256), np.float32)
    x[1, 200] = bad
    found = quantize(library, x, layout, 2, gathered=False)
    expected = integer_reference.record_bytes(integer_reference.quantized(x, layout, 2), 4, 2)
    step = np.ascontiguousarray(found[:, :, 256:260]).view(np.float32)[..., 0]
    assert np.isnan(step[1, 1])
    assert np.isnan(step).sum() == 1
    found[1, 1, 256:260] = expected[1, 1, 256:260] = 0  # NaN has many bits
    assert found.tobytes() == expected.tobytes()


def test_any_stride_and_any_chunk(library: Library) -> None:
    layout = ColumnLayout(4, 512, 64, 64)
    x = np.random.default_rng(3).standard_normal((5, 600)).astype(np.float32)
    expected = quantize(library, np.ascontiguousarray(x[:, :512]), layout, 2, gathered=False, per=8)
    for per in (1, 3, 100):
        assert quantize(library, x[:, :512], layout, 2, gathered=False, per=per).tobytes() == expected.tobytes()
