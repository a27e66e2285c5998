"""Kernels that work row by row, against float64; rows end where memory does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exl.cpu_kernels.embed import Embed
from exl.cpu_kernels.gated_mlp import GatedProduct
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.norm import NormAdd, RmsNorm, RowFactors
from exl.cpu_kernels.quantize import ActivationForm
from exl.cpu_kernels.rope_tables import RopeTables
from exl.cpu_kernels.softcap import ScaleLogits
from tests.cpu_kernels.guards import guarded_array

WIDTHS = [1, 15, 16, 63, 64, 200, 576, 2049]
EPS = 1e-5
# Where each byte of a run of inputs comes from, by the widths of the weights' codes.
ORDERS = {
    "bytes": list(range(16)),
    "eights": [0, 2, 4, 6, 1, 3, 5, 7],
    "sixteens": [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return guarded_array(rng.standard_normal(shape).astype(np.float32))


def empty(*shape: int) -> NDArray[np.float32]:
    return guarded_array(np.full(shape, 77, np.float32))


def normalized(x: NDArray, weight: NDArray | float = 1.0, centred: bool = False) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    if centred:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def decoded(records: NDArray[np.uint8], form: ActivationForm, num_rows: int) -> tuple[NDArray, NDArray]:
    """Records [R][M][bytes] -> (values [M, R * rows], steps [M, R]); checks the sums."""
    records = records.reshape(-1, num_rows, form.num_bytes)
    parts = records[..., : form.parts * form.rows].view(np.int8).reshape(*records.shape[:2], form.parts, form.rows)
    q = parts.astype(np.int64)
    q = q[:, :, 0] * 256 + q[:, :, 1] if form.parts == 2 else q[:, :, 0]
    order = ORDERS[form.order]
    runs = q.reshape(*q.shape[:2], -1, len(order))
    inputs = np.empty_like(runs)
    inputs[..., order] = runs
    tail = np.ascontiguousarray(records[..., form.parts * form.rows :])
    steps, sums = tail[..., :4].copy().view(np.float32)[..., 0], tail[..., 4:8].copy().view(np.int32)[..., 0]
    np.testing.assert_array_equal(sums, q.sum(-1))
    values = inputs.reshape(q.shape) * steps[..., None].astype(np.float64)
    return values.transpose(1, 0, 2).reshape(num_rows, -1), steps.T


def assert_near(found: NDArray, steps: NDArray, expected: NDArray, rows: int) -> None:
    """Within half a step, and what the f32 values before it were off."""
    bound = 0.5001 * np.repeat(steps, rows, axis=1).astype(np.float64) + 2e-6 * np.abs(expected)
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(library: Library, rng, width):
    x, weight, out = normal(rng, 5, width), normal(rng, width), empty(5, width)
    args = slots(x, width, None, weight, out, width, width, EPS)
    library.call(RmsNorm(), args, 5)
    np.testing.assert_allclose(out, normalized(x, weight), rtol=1e-6, atol=0)
    alone = empty(1, width)
    library.call(RmsNorm(), slots(x[3:], width, None, weight, alone, width, width, EPS))
    np.testing.assert_array_equal(alone[0], out[3])


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_layer_norm(library: Library, rng, width):
    """Rows whose mean is larger than their deviations: what is beyond a row's end must not lose the mean, too."""
    x, weight, out = normal(rng, 5, width), normal(rng, width), empty(5, width)
    x += 3
    library.call(RmsNorm(centred=True), slots(x, width, None, weight, out, width, width, EPS), 5)
    exact = normalized(x, weight, centred=True)
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=4e-6)
    alone, chosen = empty(1, width), guarded_array(np.array([3], np.int32))
    spec = RmsNorm(centred=True, chosen=True)
    library.call(spec, slots(x, width, chosen, weight, alone, width, width, EPS))
    np.testing.assert_array_equal(alone[0], out[3])
    form = ActivationForm(32, 2, "eights")
    num_records = -(-width // 32)
    records = guarded_array(np.zeros(num_records * 5 * form.num_bytes, np.uint8))
    args = slots(x, width, None, weight, None, 0, width, EPS, records, 5, num_records, None)
    library.call(RmsNorm(form, keeps=False, centred=True), args, 5)
    expected = np.zeros((5, 32 * num_records))
    expected[:, :width] = out
    assert_near(*decoded(records, form, 5), expected, 32)


def test_factors_of_two_runs_of_a_row(library: Library, rng):
    x, out = normal(rng, 3, 57), empty(3, 2)
    library.call(RowFactors(), slots(x, 57, out, 40, 17, EPS, 0.5), 3)
    for i, (run, eps) in enumerate(((x[:, :40], EPS), (x[:, 40:], 0.5))):
        exact = 1 / np.sqrt((run.astype(np.float64) ** 2).mean(-1) + eps)
        np.testing.assert_allclose(out[:, i], exact, rtol=1e-6)


def test_rms_norm_of_chosen_rows_without_weight(library: Library, rng):
    wide, rows = normal(rng, 6, 300), guarded_array(np.array([4, 0, 4], np.int32))
    out = empty(3, 100)
    library.call(RmsNorm(chosen=True, weighted=False), slots(wide, 300, rows, None, out, 100, 100, EPS), 3)
    np.testing.assert_allclose(out, normalized(wide[rows, :100]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("form", "width"),
    [
        (ActivationForm(128, 2, "eights"), 512),
        (ActivationForm(64, 1, "sixteens"), 200),
        (ActivationForm(96, 2, "bytes"), 96 + 50),
        (ActivationForm(16, 2, "eights"), 7),
    ],
)
def test_rms_norm_to_records(library: Library, rng, form, width):
    num_rows, num_records = 3, -(-width // form.rows)
    x, weight = normal(rng, num_rows, width), normal(rng, width)
    records = guarded_array(np.zeros(num_records * num_rows * form.num_bytes, np.uint8))
    out = empty(num_rows, width)
    args = slots(x, width, None, weight, out, width, width, EPS, records, num_rows, num_records, None)
    library.call(RmsNorm(form), args, num_rows)
    expected = np.zeros((num_rows, num_records * form.rows))
    expected[:, :width] = normalized(x, weight)
    np.testing.assert_allclose(out, expected[:, :width], rtol=1e-6, atol=0)
    assert_near(*decoded(records, form, num_rows), expected, form.rows)


def test_rms_norm_to_records_by_a_list(library: Library, rng):
    form, num_rows, width, num_records = ActivationForm(32, 2, "sixteens"), 2, 75, 3
    listed = np.full(num_records * form.rows, -1, np.int32)
    listed[:30], listed[32:77] = rng.permutation(width)[:30], rng.permutation(width)[:45]
    # Element -1 would be on a page that faults.
    x, weight = (guarded_array(normal(rng, *shape), before=True) for shape in ((num_rows, width), (width,)))
    records = guarded_array(np.zeros(num_records * num_rows * form.num_bytes, np.uint8))
    index = guarded_array(listed)
    args = slots(x, width, None, weight, None, 0, width, EPS, records, num_rows, num_records, index)
    library.call(RmsNorm(form, keeps=False, gathered=True), args, num_rows)
    expected = np.where(listed >= 0, normalized(x, weight)[:, listed], 0)
    assert_near(*decoded(records, form, num_rows), expected, form.rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_rms_norm_shows_what_is_not_finite(library: Library, rng, bad):
    """1e30: its square is infinite in f32."""
    form = ActivationForm(32, 2, "eights")
    x, weight, out = normal(rng, 2, 64), normal(rng, 64), empty(2, 64)
    x[1, 40] = bad
    records = np.zeros(2 * 2 * form.num_bytes, np.uint8)
    library.call(RmsNorm(form), slots(x, 64, None, weight, out, 64, 64, EPS, records, 2, 2, None), 2)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[0]).all()
    values, steps = decoded(records, form, 2)
    assert np.isnan(steps[1]).all()
    assert np.isfinite(values[0]).all()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [5, 100])
def test_norm_and_add(library: Library, rng, width, centred):
    y, weight, h, out = normal(rng, 3, width), normal(rng, width), normal(rng, 3, width), empty(3, width)
    library.call(NormAdd(centred), slots(y, width, weight, h, width, out, width, width, EPS, 0.25), 3)
    np.testing.assert_allclose(out, h + 0.25 * normalized(y, weight, centred), rtol=1e-6, atol=1e-6)


def activated(gate: NDArray, activation: str) -> NDArray[np.float64]:
    gate = gate.astype(np.float64)
    if activation == "silu":
        return gate / (1 + np.exp(-gate))
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [9, 64, 345])
def test_gated_product(library: Library, rng, activation, width):
    both, out = normal(rng, 3, 2 * width), empty(3, width)
    columns = 48
    chunks = -(-width // columns)
    library.call(
        GatedProduct(activation), slots(both, 2 * width, width, out, width, columns, chunks), num_chunks=3 * chunks
    )
    expected = activated(both[:, :width], activation) * both[:, width:]
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("gathered", [False, True])
def test_gated_product_to_records(library: Library, rng, gathered):
    form, num_rows, width, per_chunk = ActivationForm(64, 2, "eights"), 3, 345, 2
    num_records = 6
    chunks = -(-num_records // per_chunk)
    listed = np.full(num_records * form.rows, -1, np.int32)
    listed[:width] = rng.permutation(width) if gathered else np.arange(width)
    both = normal(rng, num_rows, 2 * width)
    records = guarded_array(np.zeros(num_records * num_rows * form.num_bytes, np.uint8))
    index = guarded_array(listed) if gathered else None
    args = slots(both, 2 * width, width, records, 0, per_chunk, chunks, num_rows, num_records, index)
    library.call(GatedProduct("silu", form, gathered), args, num_rows * chunks)
    product = activated(both[:, :width], "silu") * both[:, width:]
    assert_near(*decoded(records, form, num_rows), np.where(listed >= 0, product[:, listed], 0), form.rows)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [3, 16, 70])
def test_embed(library: Library, rng, dtype, width):
    stored = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    table = torch.from_numpy(rng.standard_normal((9, width))).to(stored)
    table[2, 0] = torch.nan
    memory = guarded_array(table.view(torch.uint8).numpy())
    ids, out = guarded_array(np.array([8, 0, 2, 8], np.int32)), empty(4, width)
    library.call(Embed(dtype), slots(memory, ids, out, width, width, 3.25), 4)
    np.testing.assert_array_equal(out, table.float().numpy()[ids] * np.float32(3.25))


def test_logits_are_scaled_and_capped(library: Library, rng):
    width, columns = 1000, 128
    x, out = guarded_array(40 * rng.standard_normal((2, width)).astype(np.float32)), empty(2, width)
    x[0, 5], x[1, 7] = np.inf, np.nan
    args = slots(x, width, out, width, width, columns, 8, 0.5, 30.0)
    library.call(ScaleLogits(capped=False), args, 16)
    np.testing.assert_array_equal(out, x * np.float32(0.5))
    library.call(ScaleLogits(capped=True), args, 16)
    np.testing.assert_allclose(out, 30 * np.tanh(0.5 * x.astype(np.float64) / 30), rtol=1e-6)


@pytest.mark.parametrize("half", [5, 32])
def test_rope_tables(library: Library, rng, half):
    positions = guarded_array(np.array([0, 1, 4095, 131_071, 10_000_000], np.int32))
    frequencies = guarded_array((10_000.0 ** -rng.uniform(0, 1, (2, half))).astype(np.float32))
    chosen = guarded_array(np.array([0, 1, 1, 0, 1], np.int32))
    cos, sin = empty(5, half), empty(5, half)
    library.call(RopeTables(True), slots(positions, frequencies, cos, sin, half, 1.25, 5, 2, chosen), 3)
    angles = (positions.astype(np.float32)[:, None] * frequencies[chosen]).astype(np.float64)
    np.testing.assert_allclose(cos, 1.25 * np.cos(angles), rtol=1.3e-7, atol=1e-12)
    np.testing.assert_allclose(sin, 1.25 * np.sin(angles), rtol=1.3e-7, atol=1e-12)
    library.call(RopeTables(), slots(positions, frequencies, cos, sin, half, 1.0, 5, 5, None))
    angles = (positions.astype(np.float32)[:, None] * frequencies[0]).astype(np.float64)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=1.3e-7, atol=1e-12)


def test_bits_do_not_depend_on_the_instructions(libraries: list[Library], rng):
    form, width, num_rows = ActivationForm(64, 2, "eights"), 345, 2
    both, weight = normal(rng, num_rows, 2 * width), normal(rng, width)
    results = set()
    for library in libraries:
        out, records = np.zeros((3, num_rows, width), np.float32), np.zeros(2 * 6 * num_rows * form.num_bytes, np.uint8)
        first, second = records[: len(records) // 2], records[len(records) // 2 :]
        library.call(
            RmsNorm(form), slots(both, 2 * width, None, weight, out[0], width, width, EPS, first, num_rows, 6), num_rows
        )
        args = slots(both, 2 * width, width, second, 0, 6, 1, num_rows, 6)
        library.call(GatedProduct("gelu_tanh", form), args, num_rows)
        library.call(GatedProduct("silu"), slots(both, 2 * width, width, out[1], width, width, 1), num_rows)
        library.call(ScaleLogits(True), slots(both, 2 * width, out[2], width, width, width, 1, 2.0, 5.0), num_rows)
        results.add(out.tobytes() + records.tobytes())
    assert len(results) == 1


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 5),
    width=st.integers(1, 1500),
    spare=st.integers(0, 40),
    form=st.sampled_from([ActivationForm(128, 2, "eights"), ActivationForm(48, 1, "bytes")]),
    per_chunk=st.integers(1, 4),
)
def test_random_shapes(library: Library, seed, num_rows, width, spare, form, per_chunk):
    """Rows apart from each other, a last record that is not full, chunks that do not divide the records."""
    rng = np.random.default_rng(seed)
    num_records = -(-width // form.rows)
    chunks = -(-num_records // per_chunk)
    both, weight = normal(rng, num_rows, 2 * width + spare), normal(rng, width)
    records = guarded_array(np.zeros(num_records * num_rows * form.num_bytes, np.uint8))
    expected = np.zeros((num_rows, num_records * form.rows))

    args = slots(both, 2 * width + spare, None, weight, None, 0, width, EPS, records, num_rows, num_records)
    library.call(RmsNorm(form, keeps=False), args, num_rows)
    expected[:, :width] = normalized(both[:, :width], weight)
    assert_near(*decoded(records, form, num_rows), expected, form.rows)

    args = slots(both, 2 * width + spare, width, records, 0, per_chunk, chunks, num_rows, num_records)
    library.call(GatedProduct("silu", form), args, num_rows * chunks)
    expected[:, :width] = activated(both[:, :width], "silu") * both[:, width : 2 * width]
    assert_near(*decoded(records, form, num_rows), expected, form.rows)
