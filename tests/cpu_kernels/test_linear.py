"""Integer linears: against f64 within what quantizing activations costs, and against NumPy bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exl.cpu_kernels.kernel import build_module
from exl.cpu_kernels.library import Library, compile_object, slots
from exl.cpu_kernels.linear import MOST_ROWS, ROW_BLOCK, Linear, best_kind, linear
from exl.cpu_kernels.processor import ISAS
from exl.cpu_kernels.quantize import QuantizeRows, form_of
from exl.layout.columns import ColumnLayout
from tests.cpu_kernels import integer_reference
from tests.cpu_kernels.guards import guarded_array
from tests.cpu_kernels.packer import from_scale_dtype, pack_columns, to_scale_dtype

# Twice the eight numbers of e2m1 and their negatives, plus 12.
FP4 = np.array([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0], np.uint8)
KINDS = {"row": 1, "rows": MOST_ROWS, "panel": 10**6}  # and the most rows of each


@dataclass(frozen=True)
class Weight:
    layout: ColumnLayout
    codes: NDArray[np.uint8]  # [K, N]
    scales: NDArray  # [groups, N], as stored
    zeros: NDArray[np.uint8]

    @property
    def packed(self) -> NDArray[np.uint8]:
        return pack_columns(self.layout, self.codes, self.scales, self.zeros)

    @property
    def numbers(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """What codes stand for and what is subtracted, both as unsigned integers."""
        if self.layout.code_kind == "fp4":
            return FP4[self.codes], np.full_like(self.zeros, FP4[0])
        return self.codes, self.zeros

    @property
    def dense(self) -> NDArray[np.float64]:
        group = np.arange(self.layout.K) // self.layout.group_size
        codes, zeros = self.numbers
        centred = codes.astype(np.float64) - zeros.astype(np.float64)[group]
        return centred * from_scale_dtype(self.scales).astype(np.float64)[group]


def random_weight(rng: np.random.Generator, layout: ColumnLayout) -> Weight:
    codes = rng.integers(0, 1 << layout.bits, (layout.K, layout.N), np.uint8, endpoint=False)
    shape = layout.num_groups, layout.N
    scales = to_scale_dtype(rng.uniform(0.5, 1.5, shape).astype(np.float32) / 50, layout.scale_dtype)
    zeros = rng.integers(0, 1 << layout.bits, shape, np.uint8, endpoint=False)
    if layout.symmetric:
        zeros[:] = 1 << (layout.bits - 1)
    return Weight(layout, codes, scales, zeros)


def multiply(
    library: Library,
    weight: Weight,
    x: NDArray[np.float32],
    parts: int,
    kind: str,
    *,
    per: int = 2,
    bias: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
    scale: float = 1.0,
    before: bool = False,
    **fields: object,
) -> NDArray[np.float32]:
    """f32 [M, N]. All that the kernels touch lies at pages that fault: behind it or ``before`` it. ``fields``: of the
    kernel, instead of what is usual."""
    layout, rows = weight.layout, len(x)
    form = form_of(layout, parts)
    records = guarded_array(np.zeros((layout.num_records, rows, form.num_bytes), np.uint8), before=before)
    x, source = np.ascontiguousarray(x), layout.source_rows()
    args = slots(x, records, layout.K, layout.num_records, rows, source, layout.num_records, layout.K)
    library.call(QuantizeRows(form, True), args, rows)
    packed = guarded_array(weight.packed, before=before)
    out = guarded_array(np.full((rows, layout.N), np.nan, np.float32), before=before)
    bias, residual = (None if v is None else guarded_array(v, before=before) for v in (bias, residual))
    args = slots(
        packed, records, out, layout.N, layout.num_records, rows, layout.N, layout.num_blocks,
        bias, residual, layout.N, scale, per,
    )  # fmt: skip
    row_blocks = -(-rows // ROW_BLOCK) if kind == "panel" else 1
    library.call(replace(linear(layout, parts, kind), **fields), args, -(-layout.num_blocks // per) * row_blocks)
    return out


def reference(weight: Weight, x: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    records = integer_reference.quantized(x, weight.layout, parts)
    codes, zeros = weight.numbers
    return integer_reference.product(records, weight.layout, codes, weight.scales, zeros)


def by_every_kind(library: Library, weight: Weight, x: NDArray[np.float32], parts: int, **options) -> None:
    """Each kind on as many rows as it takes, each equal to NumPy's bits."""
    expected = reference(weight, x, parts)
    bias, residual = options.get("bias"), options.get("residual")
    if bias is not None:
        expected = expected + bias
    if residual is not None:
        expected = integer_reference.fma32(np.float32(options["scale"]), expected, residual)
    for kind, most in KINDS.items():
        some = dict(options, residual=None if residual is None else residual[:most])
        found = multiply(library, weight, x[:most], parts, kind, **some)
        np.testing.assert_array_equal(found, expected[:most], err_msg=f"{kind}, {library.isa}")


# accuracy


@pytest.mark.parametrize(("parts", "typical", "with_outliers"), [(2, 4e-5, 2e-4), (1, 1e-2, 4e-2)])
@pytest.mark.parametrize(("share", "size"), [(0, 1), (0.005, 30), (0.001, 300)], ids=["gaussian", "x 30", "x 300"])
def test_close_to_exact(
    library: Library, parts: int, typical: float, with_outliers: float, share: float, size: float
) -> None:
    """Activations are off by half a step at most, and everything after that rounds like f32."""
    rng = np.random.default_rng(1)
    weight = random_weight(rng, ColumnLayout(4, 2048, 128, 128, symmetric=True))
    x = rng.standard_normal((24, 2048)).astype(np.float32)
    x[:, rng.random(2048) < share] *= size
    found = multiply(library, weight, x, parts, "panel").astype(np.float64)
    exact = x.astype(np.float64) @ weight.dense
    relative = np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean())
    assert relative < (typical if size == 1 else with_outliers)
    step = np.abs(x.astype(np.float64)).reshape(24, 16, 128).max(2) / {1: 127, 2: 32512}[parts]
    weights = np.abs(weight.dense).reshape(16, 128, 128).sum(1)
    rounding = 2.0**-21 * np.abs(x).astype(np.float64) @ np.abs(weight.dense)
    assert (np.abs(found - exact) <= 0.51 * step @ weights + rounding).all()


# bits

SHAPES = [  # each bits with other scales, zeros, groups, K and N
    pytest.param(ColumnLayout(4, 384, 130, 128, symmetric=True), 2, id="4-sym"),
    pytest.param(ColumnLayout(4, 96, 64, 96, scale_dtype="bf16"), 1, id="4-per-channel"),
    pytest.param(ColumnLayout(4, 200, 72, 24), 2, id="4-padded"),
    pytest.param(ColumnLayout(8, 256, 65, 128, scale_dtype="f32"), 2, id="8"),
    pytest.param(ColumnLayout(8, 300, 100, 128, symmetric=True), 1, id="8-sym-short-last-group"),
    pytest.param(ColumnLayout(3, 256, 100, 128), 2, id="3"),
    pytest.param(ColumnLayout(3, 150, 129, 48, symmetric=True, scale_dtype="f32"), 1, id="3-padded"),
    pytest.param(ColumnLayout(2, 256, 63, 64), 2, id="2"),
    pytest.param(ColumnLayout(4, 384, 130, 32, True, "bf16", "fp4"), 2, id="fp4"),
    pytest.param(ColumnLayout(4, 256, 65, 128, True, "f32", "fp4"), 1, id="fp4-large-groups"),
]


@pytest.mark.parametrize(("layout", "parts"), SHAPES)
def test_bits(library: Library, layout: ColumnLayout, parts: int) -> None:
    """17 rows meet every tile; memory may not be touched behind what there is."""
    rng = np.random.default_rng(2)
    by_every_kind(
        library, random_weight(rng, layout), rng.standard_normal((17, layout.K)).astype(np.float32), parts,
        bias=rng.standard_normal(layout.N).astype(np.float32),
        residual=rng.standard_normal((17, layout.N)).astype(np.float32), scale=0.22,
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "parts"), SHAPES[::3])
def test_memory_before(library: Library, layout: ColumnLayout, parts: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, layout.K)).astype(np.float32)
    by_every_kind(library, random_weight(rng, layout), x, parts, before=True)


@pytest.mark.parametrize(("layout", "parts"), [SHAPES[3].values, SHAPES[5].values])
def test_largest_sums(library: Library, layout: ColumnLayout, parts: int) -> None:
    """Every code and activation at its extreme: nothing saturates, nothing overflows."""
    rng = np.random.default_rng(4)
    weight = random_weight(rng, layout)
    weight.codes[:] = (1 << layout.bits) - 1
    weight.codes[:, ::3] = 0
    weight.zeros[:, ::2], weight.zeros[:, 1::2] = 0, (1 << layout.bits) - 1
    x = np.ones((5, layout.K), np.float32)
    x[1], x[2, ::2], x[3] = -1, -1, np.float32(-255.5 / 256)  # low bytes of -128 where the largest is 1
    x[3, ::128] = 1
    by_every_kind(library, weight, x, parts)


@pytest.mark.parametrize(("layout", "parts"), [SHAPES[-2].values, SHAPES[-1].values])
def test_largest_sums_of_fp4(library: Library, layout: ColumnLayout, parts: int) -> None:
    """The largest number is larger than any code of 4 bits."""
    weight = random_weight(np.random.default_rng(4), layout)
    weight.codes[:], weight.codes[:, ::3] = 7, 15
    x = np.full((5, layout.K), np.float32(-255.5 / 256))  # low bytes of -128 where the largest is 1
    x[:, :: layout.rows] = np.array([1, -1, 1, -1, 0.5], np.float32)[:, None]
    x[4] = -1
    by_every_kind(library, weight, x, parts)


def test_more_rows_than_a_block(library: Library) -> None:
    """Rows in blocks of 128, and a row's bits in them as alone."""
    rng = np.random.default_rng(5)
    weight = random_weight(rng, ColumnLayout(4, 256, 100, 128, symmetric=True))
    x = rng.standard_normal((2 * ROW_BLOCK + 3, 256)).astype(np.float32)
    together = multiply(library, weight, x, 2, "panel", per=1)
    np.testing.assert_array_equal(together, reference(weight, x, 2))
    for row in (0, ROW_BLOCK - 1, ROW_BLOCK, 2 * ROW_BLOCK + 2):
        np.testing.assert_array_equal(multiply(library, weight, x[row : row + 1], 2, "row"), together[row : row + 1])


def test_any_chunk(library: Library) -> None:
    rng = np.random.default_rng(6)
    weight = random_weight(rng, ColumnLayout(4, 128, 300, 128, symmetric=True))
    x = rng.standard_normal((3, 128)).astype(np.float32)
    for kind, most in KINDS.items():
        for per in (1, 4, 5, 9):
            found = multiply(library, weight, x[:most], 2, kind, per=per)
            np.testing.assert_array_equal(found, reference(weight, x[:most], 2))


def test_prefetching_changes_nothing(library: Library) -> None:
    """Nor does it fault behind the last record."""
    rng = np.random.default_rng(9)
    weight = random_weight(rng, ColumnLayout(3, 150, 129, 48, symmetric=True, scale_dtype="f32"))
    x = rng.standard_normal((1, 150)).astype(np.float32)
    for prefetches in (True, False):
        found = multiply(library, weight, x, 1, "row", prefetches=prefetches)
        np.testing.assert_array_equal(found, reference(weight, x, 1))


# values that are not finite, and tiny ones


def test_nan_and_inf_in_their_row_alone(library: Library) -> None:
    rng = np.random.default_rng(7)
    weight = random_weight(rng, ColumnLayout(4, 256, 70, 128))
    x = rng.standard_normal((4, 256)).astype(np.float32)
    x[0, 3], x[2, 255] = np.nan, -np.inf
    clean = np.where(np.isfinite(x), x, np.float32(0))
    for kind in ("rows", "panel"):
        found = multiply(library, weight, x, 2, kind)
        assert np.isnan(found[[0, 2]]).all()
        np.testing.assert_array_equal(found[[1, 3]], reference(weight, clean, 2)[[1, 3]])
    assert np.isnan(multiply(library, weight, x[:1], 2, "row")).all()


def test_denormals(library: Library) -> None:
    """Scales that are denormal in f16, results that are in f32; rows that are next to nothing become zero."""
    rng = np.random.default_rng(8)
    weight = random_weight(rng, ColumnLayout(4, 128, 64, 128))
    weight.scales[:] = np.float16(6e-8) * rng.integers(1, 9, weight.scales.shape)
    x = rng.standard_normal((4, 128)).astype(np.float32)
    x[1] *= np.float32(1e-29)
    x[2] *= np.float32(1e-32)
    x[3] = 0
    by_every_kind(library, weight, x, 2)
    found = multiply(library, weight, x, 2, "rows")
    assert (found[[2, 3]] == 0).all()
    assert (found[1] != 0).any()


# random shapes


@st.composite
def products(draw: st.DrawFn, forms: st.SearchStrategy[tuple[ColumnLayout, int]]):
    """A weight, its inputs and what is added. ``forms``: layouts whose kernels it will need."""
    form, parts = draw(forms)
    group = draw(st.sampled_from([g for g in range(1, 300) if _record(form.bits, g) == form.rows]))
    layout = ColumnLayout(
        form.bits, draw(st.integers(1, 3 * group)), draw(st.integers(1, 200)), group, form.symmetric, form.scale_dtype
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(1, 40))
    x = rng.standard_normal((rows, layout.K)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-6, 6)))
    options: dict = {"per": draw(st.integers(1, 4)), "scale": draw(st.sampled_from([1.0, 0.22]))}
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal(layout.N).astype(np.float32)
    if draw(st.booleans()):
        options["residual"] = rng.standard_normal((rows, layout.N)).astype(np.float32)
    return random_weight(rng, layout), x, parts, options


def _record(bits: int, group: int) -> int:
    return ColumnLayout(bits, group, 64, group).rows


ALL = st.tuples(
    st.sampled_from(
        [
            ColumnLayout(bits, rows, 64, rows, symmetric, dtype)
            for bits in (2, 3, 4, 8)
            for rows in ((32, 96, 128) if bits == 3 else (16, 32, 112, 128))
            for symmetric, dtype in ((True, "f16"), (False, "f16"), (False, "bf16"), (True, "f32"))
        ]
    ),
    st.sampled_from([1, 2]),
)


@settings(max_examples=50, deadline=None)
@given(products(st.sampled_from([shape.values for shape in SHAPES])))  # whose kernels are compiled already
def test_random_shapes(libraries: list[Library], product) -> None:
    for library in libraries:
        by_every_kind(library, *product[:3], **product[3])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(products(ALL))
def test_random_shapes_of_every_form(libraries: list[Library], product) -> None:
    for library in libraries:
        by_every_kind(library, *product[:3], **product[3])


# the rest


@pytest.mark.parametrize("isa", ISAS)
def test_best_kind_takes_its_rows(isa: str) -> None:
    for rows in (1, 2, 8, 16, 17, 32, 33, 1000):
        assert KINDS[best_kind(isa, rows)] >= rows


@pytest.mark.parametrize("isa", ["avxvnni", "neon"])
def test_compiles_for_machines_that_are_not_here(isa: str) -> None:
    specs = [Linear(bits, 64, False, "f16", 2, kind) for bits, kind in ((4, "rows"), (8, "row"))]
    assert len(compile_object(build_module(specs, isa), isa)) > 1000
