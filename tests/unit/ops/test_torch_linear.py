"""CPU linears against float64 arithmetic on the codes themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.layers import linear_layout
from exl.layout.specs import LinearSpec, MatrixSpec, Target, fuse
from exl.ops.base import Linear, view_field
from exl.ops.torch_linear import Scratch, matmul, pack_int4, pack_int4_words, pack_linear, pack_planes, probe_int4pack

NATIVE = Target("cpu", int4pack=probe_int4pack())
NO_INT4PACK = Target("cpu")
BF16_ROUNDOFF = 2.0**-8  # eight significant bits


def random_quantized(
    rng, bits, K, N, group_size, *, order=False, bias=False, scale_dtype="f16"
) -> tuple[QuantizedMatrix, MatrixSpec]:
    """A random matrix. f16 cannot represent its bf16 and f32 scales; the last group may be shorter."""
    codes = rng.integers(0, 2**bits, (K, N), dtype=np.uint8)
    G = -(-K // group_size)
    scales = (rng.random((G, N)) * 0.05 + 0.001).astype(np.float16 if scale_dtype == "f16" else np.float32)
    if scale_dtype == "bf16":
        scales = ((scales * np.float32(2.0**-20)).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    matrix = QuantizedMatrix(
        bits=bits,
        group_size=group_size,
        K=K,
        N=N,
        scales=scales,
        zeros=rng.integers(0, 2**bits + 1, (G, N)).astype(np.uint16).clip(0, 255).astype(np.uint8),
        order=rng.permutation(K).astype(np.int32) if order else None,
        bias=rng.standard_normal(N).astype(np.float16) if bias else None,
        read_codes=lambda start, stop: codes[:, start:stop],
        scale_dtype=scale_dtype,
    )
    order_key = "key" if order else None
    return matrix, MatrixSpec("m", K, N, bits, "u8", group_size, bias, order_key, scale_dtype=scale_dtype)


def exact_weight(matrix: QuantizedMatrix) -> np.ndarray:
    """W [K, N] in float64, rows in the checkpoint's order."""
    codes = matrix.codes(0, matrix.N).astype(np.float64)
    groups = np.arange(matrix.K) // matrix.group_size
    weight = matrix.scales.astype(np.float64)[groups] * (codes - matrix.zeros[groups])
    if matrix.order is None:
        return weight
    unsorted = np.empty_like(weight)
    unsorted[matrix.order] = weight
    return unsorted


def pack(parts, specs, target) -> Linear:
    layout = linear_layout(LinearSpec(tuple(specs)), target)
    blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_linear(parts, layout, target, blob)
    return Linear(layout, {name: view_field(blob, field) for name, field in layout.fields.items()})


def run(linear: Linear, x: np.ndarray, num_decode_rows: int) -> np.ndarray:
    spec = linear.layout.spec
    out = torch.full((len(x), spec.N), torch.nan)
    scratch = Scratch(torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(x.size))
    matmul(torch.from_numpy(x.astype(np.float32)), linear, num_decode_rows, scratch, out)
    return out.double().numpy()


CASES = [
    (bits, K, N, group, order)
    for bits in (2, 3, 4, 8)
    for K, N, group, order in [
        (128, 64, 32, False),
        (96, 80, 96, False),  # one group; a partial block of int4pack
        (160, 24, 32, True),  # an N that int4pack does not support
        (192, 144, 64, True),
        (288, 48, 96, False),  # a group size that int4pack does not support
        (224, 64, 128, True),  # a shorter last group
    ]
]


@pytest.mark.parametrize("target", [NATIVE, NO_INT4PACK], ids=["native", "planes"])
@pytest.mark.parametrize(("bits", "K", "N", "group", "order"), CASES)
def test_panels_hold_the_exact_weights(bits, K, N, group, order, target):
    """One-hot rows read out the weights: exactly (code - zero) * scale."""
    rng = np.random.default_rng(bits * 1000 + K)
    matrix, spec = random_quantized(rng, bits, K, N, group, order=order)
    linear = pack([matrix], [spec], target)
    assert (run(linear, np.eye(K), 0) == exact_weight(matrix)).all()


@pytest.mark.parametrize("target", [NATIVE, NO_INT4PACK], ids=["native", "planes"])
@pytest.mark.parametrize("scale_dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 128), (4, 32), (4, 64), (8, 64)])
def test_panels_hold_scales_that_f16_cannot(bits, group, scale_dtype, target):
    """bf16 scales: exact as well. f32 scales: the exact product, rounded to f32 once."""
    rng = np.random.default_rng(bits)
    matrix, spec = random_quantized(rng, bits, 160, 48, group, scale_dtype=scale_dtype)
    assert (matrix.scales != matrix.scales.astype(np.float16)).any()
    linear = pack([matrix], [spec], target)
    assert linear.layout.kind == ("int4pack" if (bits, group) == (4, 32) and target.int4pack else "planes")
    exact = exact_weight(matrix)
    assert (run(linear, np.eye(160), 0) == exact.astype(np.float32)).all()
    if scale_dtype == "bf16":
        assert (exact.astype(np.float32) == exact).all()


def test_matrices_with_scales_of_other_types_do_not_share_a_launch():
    rng = np.random.default_rng(9)
    specs = [random_quantized(rng, 4, 128, 32, 32, scale_dtype=t)[1] for t in ("f16", "f16", "bf16", "f32", "f32")]
    assert [len(linear.parts) for linear in fuse(specs)] == [2, 1, 2]


@pytest.mark.parametrize(("bits", "K", "N", "group", "order"), CASES)
def test_decode_rows_of_panels_are_exact_too(bits, K, N, group, order):
    rng = np.random.default_rng(bits * 1000 + K + 1)
    matrix, spec = random_quantized(rng, bits, K, N, group, order=order)
    linear = pack([matrix], [spec], NO_INT4PACK)
    assert (run(linear, np.eye(K), K) == exact_weight(matrix)).all()


@pytest.mark.skipif(NATIVE.int4pack is None, reason="this torch has no int4pack kernel")
@pytest.mark.parametrize(
    ("K", "N", "group", "order", "scale_dtype"), [(256, 208, 32, True, "f16"), (512, 64, 128, False, "f32")]
)
def test_int4pack_decode_errs_by_its_roundings_only(K, N, group, order, scale_dtype):
    """bf16 input, scale s, offset (8 - z) s and output, each rounded once; f32 sums of K terms."""
    rng = np.random.default_rng(K)
    matrix, spec = random_quantized(rng, 4, K, N, group, order=order, bias=True, scale_dtype=scale_dtype)
    linear = pack([matrix], [spec], NATIVE)
    assert linear.layout.kind == "int4pack"
    x = rng.standard_normal((5, K)).astype(np.float32)
    weight = exact_weight(matrix)
    exact = x.astype(np.float64) @ weight

    u = BF16_ROUNDOFF
    scales = np.repeat(matrix.scales.astype(np.float64), group, axis=0)
    zeros = np.repeat(matrix.zeros.astype(np.float64), group, axis=0)
    parts = scales * (np.abs(matrix.codes(0, N).astype(np.float64) - 8) + np.abs(8 - zeros))
    if matrix.order is not None:
        unsorted = np.empty_like(parts)
        unsorted[matrix.order] = parts
        parts = unsorted
    terms = np.abs(x) @ parts
    bound = terms * ((1 + u) ** 2 - 1) + np.abs(exact) * u * (1 + u) + terms * K * 2.0**-24
    got = run(linear, x, 5) - matrix.bias.astype(np.float64)
    assert (np.abs(got - exact) <= bound * 1.01 + 1e-6).all()
    assert np.abs(got - exact).max() > 1e-4  # the bf16 path really ran


@pytest.mark.parametrize("kind", ["int4", "planes3", "f32", "f16"])
def test_decode_rows_do_not_depend_on_their_number(kind):
    rng = np.random.default_rng(5)
    K, N = 384, 160
    if kind in ("int4", "planes3"):
        matrix, spec = random_quantized(rng, 4 if kind == "int4" else 3, K, N, 128)
        linear = pack([matrix], [spec], NATIVE)
    else:
        linear = pack([dense(rng, kind, K, N)], [MatrixSpec("d", K, N, 32, kind)], NATIVE)
    x = rng.standard_normal((9, K)).astype(np.float32)
    together = run(linear, x, 9)
    for i in range(9):
        assert (run(linear, x[i : i + 1], 1) == together[i]).all()
    mixed = run(linear, x, 4)  # the other rows are prefill rows
    assert (mixed[:4] == together[:4]).all()


def dense(rng, dtype: str, K: int, N: int, bias: np.ndarray | None = None) -> DenseMatrix:
    weight = (rng.standard_normal((N, K)) * 0.1).astype(np.float16 if dtype == "f16" else np.float32)
    if dtype == "bf16":
        weight = (weight.view(np.uint32) >> 16).astype(np.uint16)
    return DenseMatrix(
        dtype, K, N, bias, None if bias is None else "f32", lambda start, stop: weight[start:stop].copy()
    )


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dense_weights_are_kept_bit_for_bit(dtype):
    rng = np.random.default_rng(3)
    K, N = 160, 2100  # more rows than are packed or converted at a time
    bias = rng.standard_normal(N).astype(np.float32)
    matrix = dense(rng, dtype, K, N, bias)
    rows = matrix.rows(0, N)
    if dtype == "bf16":
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    linear = pack([matrix], [MatrixSpec("d", K, N, 32, dtype, has_bias=True)], NATIVE)
    expected = rows.T.astype(np.float32) + bias
    for num_decode_rows in (0, K):
        assert (run(linear, np.eye(K), num_decode_rows) == expected).all()


def test_fused_parts_lie_side_by_side():
    """Widths that the block size does not divide, biases on some parts only."""
    rng = np.random.default_rng(8)
    K, widths = 128, (80, 48, 1040)
    parts, specs = zip(*[random_quantized(rng, 4, K, N, 32, bias=i == 1) for i, N in enumerate(widths)], strict=True)
    linear = pack(parts, specs, NATIVE)
    expected = np.concatenate([exact_weight(part) for part in parts], axis=1)
    expected[:, 80:128] += parts[1].bias.astype(np.float64)
    assert np.allclose(run(linear, np.eye(K), 0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_place_every_bit(bits):
    """Checks the layout's words bit by bit: see pack_planes."""
    rng = np.random.default_rng(bits)
    K = 64
    codes = rng.integers(0, 2**bits, (3, K), dtype=np.uint8)
    packed = pack_planes(codes, bits)
    assert packed.shape == (3, K * bits // 8)
    for n in range(3):
        for k in range(K):
            code = int(codes[n, k])
            if bits == 8:
                got = int(packed[n, k])
            elif bits == 3:
                low = int(packed[n, k % 16]) >> (2 * (k // 16)) & 3
                got = low | (int(packed[n, 16 + k % 8]) >> (k // 8) & 1) << 2
            else:
                width = K * bits // 8
                got = int(packed[n, k % width]) >> (bits * (k // width)) & (2**bits - 1)
            assert got == code


@pytest.mark.skipif(NATIVE.int4pack is None, reason="this torch has no int4pack kernel")
def test_int4_packing_is_torchs_own():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (96, 272), dtype=np.uint8)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.T.astype(np.int32)), 1)
    assert (pack_int4(codes, NATIVE.int4pack) == expected.view(-1).numpy()).all()


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("K", "N"), [(32, 64), (4096, 128), (2080, 192)])
def test_words_are_packed_as_codes_are(monkeypatch, block, K, N):
    monkeypatch.setattr("exl.ops.torch_linear._PACK_WORDS", 1000)  # several steps, the last one shorter
    codes = np.random.default_rng(K).integers(0, 16, (K, N), dtype=np.uint8)
    words = np.zeros((K // 8, N), np.uint32)
    for j in range(8):
        words |= codes[j::8].astype(np.uint32) << np.uint32(4 * j)
    out = np.full(K * N // 2, 0xAA, np.uint8)
    pack_int4_words(words, block, out)
    assert np.array_equal(out, pack_int4(codes, f"split{block}"))
