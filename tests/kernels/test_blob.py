"""From the formats' matrices through a layer's blob to the kernels: results are those of the matrices' definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import dequantize, random_matrix, silu, sum_bound
from reference.plain_packer import dequantize as plain_dequantize
from reference.plain_packer import pack_layer
from safetensors.torch import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.gptq import GptqConfig
from exl.errors import CheckpointError, KernelError
from exl.formats.gptq import gptq_spec, load_gptq
from exl.formats.matrix import DenseMatrix
from exl.formats.rounding import round_to_nearest
from exl.kernels.blob import pack_linear, view_linear
from exl.kernels.linear import make_scratch, multiply
from exl.kernels.linear_dense import multiply_dense
from exl.kernels.linear_io import Output
from exl.layout.layers import layer_layout, linear_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target
from exl.ops.base import view_segments

SM86 = Target("cuda", arch=86)


def matrix_spec(matrix, symmetric: bool = False) -> MatrixSpec:
    order = None if matrix.order is None else "order"
    bias = matrix.bias is not None
    sizes = (matrix.K, matrix.N, matrix.bits, "u8", matrix.group_size)
    return MatrixSpec("m", *sizes, bias, order, symmetric, matrix.scale_dtype)


def in_a_blob(parts, spec: LinearSpec, backend, **options):
    """Packs it after a norm and another linear, as in a layer; then finds it by name."""
    other = LinearSpec((MatrixSpec("other", 64, 32, 16, "f16"),))
    layout = layer_layout(BlobSpec((NormSpec("attn_norm", 40),), (("o", (other,)), ("qkv", (spec,)))), SM86)
    blob = np.full(layout.num_bytes, 0xEE, np.uint8)
    start, stop = layout.linear_range("qkv", 0)
    pack_linear(parts, layout.linears["qkv"][0], blob[start:stop], **options)
    assert (blob[:start] == 0xEE).all()
    assert (blob[stop:] == 0xEE).all()
    (linear,) = view_segments(layout, torch.from_numpy(blob).to(backend.device), "qkv")
    return view_linear(linear.layout, linear.fields), linear.fields


def inputs(rng, T: int, K: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((T, K))).half()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fused_matrices_with_bias(bits: int, symmetric: bool) -> None:
    backend = backend_or_skip("race")
    rng = np.random.default_rng(bits)
    parts = [random_matrix(rng, bits, 256, N, 64, symmetric, bias) for N, bias in ((40, True), (24, False))]
    weight, fields = in_a_blob(parts, LinearSpec(tuple(matrix_spec(m, symmetric) for m in parts)), backend)
    assert fields["qparams"].shape[2] == 16 * (256 if bits in (2, 3) else 128) // 64 * (
        2 if symmetric else 3 if bits == 8 else 2.5
    )
    x, y = inputs(rng, 3, 256), torch.full((3, 64), float("nan"))
    multiply(backend, weight, x, Output.store(y))
    exact = x.double().numpy() @ np.concatenate([dequantize(m) for m in parts], axis=1)
    exact[:, :40] += parts[0].bias.astype(np.float64)
    limit = np.concatenate([sum_bound(x.double().numpy(), m) for m in parts], axis=1) + 2.0**-23 * np.abs(exact)
    assert (np.abs(y.double().numpy() - exact) <= limit).all()


# bits, K, group size, type of scales, act-order. Among them: groups that do not divide K (the last one shorter than 64
# inputs, than a stage, as long as several stages), one group, and K below and above a stage's 128 or 256 inputs.
FILES = [
    (4, 704, 128, "bf16", False),
    (4, 672, 128, "f32", True),
    (4, 352, 64, "f16", True),
    (4, 800, 256, "bf16", True),
    (4, 160, 32, "f32", False),
    (4, 416, -1, "f32", False),
    (3, 928, 128, "f16", True),
    (3, 288, 64, "f32", False),
    (3, 864, 256, "bf16", False),
    (2, 736, 384, "f32", True),
    (2, 544, 32, "bf16", False),
    (8, 352, 128, "f32", True),
    (8, 224, -1, "bf16", False),
]


@pytest.mark.parametrize("arch", [61, 75, 86])
@pytest.mark.parametrize("file", FILES, ids=str)
@pytest.mark.sample(2)
def test_files_of_the_plain_packer(tmp_path, file: tuple, arch: int) -> None:
    """From a file through formats, layout and kernels to the product, against the plain packer's own weights in
    float64: scales of every type stay unrounded, and the last group may be shorter."""
    bits, K, group_size, scale_dtype, act_order = file
    backend, N, T = backend_or_skip("race", arch), 96, 11
    rng = np.random.default_rng(K)
    size = K if group_size == -1 else group_size
    G, symmetric = -(-K // size), bool(K // 32 % 2)
    codes = rng.integers(0, 1 << bits, (K, N), dtype=np.uint8)
    zeros = np.full((G, N), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (G, N))
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (G, N)) * 2.0 ** rng.integers(-30, -3, (G, N))).float()
    scales = scales.to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[scale_dtype])
    g_idx = np.arange(K) // size
    if act_order:
        rng.shuffle(g_idx)
    tensors = pack_layer(codes, zeros, np.zeros((G, N)), bits, "gptq_v2", g_idx)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()} | {"scales": scales}
    save_file({f"m.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    quant = GptqConfig(bits=bits, group_size=group_size, sym=symmetric, checkpoint_format="gptq_v2")
    with Checkpoint.open(tmp_path) as checkpoint:
        spec, matrix = gptq_spec(checkpoint, "m", quant), load_gptq(checkpoint, "m", quant)
        weight, fields = in_a_blob([matrix], LinearSpec((spec,)), backend)
    assert weight.layout.scale_dtype == scale_dtype
    x, y = inputs(rng, T, K), torch.full((T, N), float("nan"))
    sorted_x = torch.empty_like(x)
    sorted_x[:, fields["channel_map"].long() if act_order and G > 1 else slice(None)] = x
    multiply(backend, weight, sorted_x, Output.store(y), scratch=make_scratch([weight.layout], backend))
    exact = plain_dequantize(codes, zeros, scales.double().numpy(), g_idx)
    x = x.double().numpy()
    # roundings of K products, G groups and 8 slices in f32; tensor cores truncate instead of rounding
    bound = (K + 2 * G + 16) * 2.0**-23 * (np.abs(x) @ np.abs(exact))
    assert (np.abs(y.double().numpy() - x @ exact) <= bound).all()


def test_gate_and_up_in_the_order_that_down_wants() -> None:
    backend = backend_or_skip("race")
    rng = np.random.default_rng(5)
    parts = [random_matrix(rng, 4, 128, 40, 128) for _ in range(2)]
    order = rng.permutation(40).astype(np.int32)
    spec = LinearSpec(tuple(map(matrix_spec, parts)), gated=True)
    weight, _ = in_a_blob(parts, spec, backend, output_order=order)
    x, y = inputs(rng, 2, 128), torch.full((2, 40), float("nan"))
    multiply(backend, weight, x, Output.gated(y))
    gate, up = (x.double().numpy() @ dequantize(m) for m in parts)
    np.testing.assert_allclose(y.double().numpy(), (silu(gate) * up)[:, order], rtol=1e-4, atol=1e-5)


def test_the_channel_map_says_where_an_input_is_expected() -> None:
    """y = x W with x scattered by ``channel_map``, as producers store it."""
    backend = backend_or_skip("race")
    rng = np.random.default_rng(6)
    order = rng.permutation(256).astype(np.int32)
    matrix = dataclasses.replace(random_matrix(rng, 4, 256, 32, 64), order=order)
    weight, fields = in_a_blob([matrix], LinearSpec((matrix_spec(matrix),)), backend)
    x = inputs(rng, 2, 256)
    sorted_x, y = torch.empty_like(x), torch.full((2, 32), float("nan"))
    sorted_x[:, fields["channel_map"].long()] = x
    multiply(backend, weight, sorted_x, Output.store(y))
    exact = x.double().numpy()[:, order] @ dequantize(matrix)  # sorted row i multiplies x[order[i]]
    assert (np.abs(y.double().numpy() - exact) <= sum_bound(x.double().numpy()[:, order], matrix)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("T", [1, 20])
def test_a_dense_head_rounded_when_it_is_loaded(bits: int, T: int) -> None:
    backend = backend_or_skip("race")
    rng = np.random.default_rng(bits)
    values = rng.standard_normal((120, 256)).astype(np.float16)
    head = round_to_nearest(DenseMatrix("f16", 256, 120, None, None, lambda start, stop: values[start:stop]), bits, 128)
    weight, _ = in_a_blob([head], LinearSpec((matrix_spec(head),)), backend)
    x, logits = inputs(rng, T, 256), torch.full((T, 120), float("nan"))
    multiply(backend, weight, x, Output.store(logits), scratch=make_scratch([weight.layout], backend))
    exact = x.double().numpy() @ dequantize(head)
    assert (np.abs(logits.double().numpy() - exact) <= sum_bound(x.double().numpy(), head)).all()
    # Each weight is off by at most half a step of its group (plus f16's rounding of the step).
    step = head.scales.astype(np.float64)[np.arange(256) // 128]
    assert (np.abs(dequantize(head) - values.T) <= 0.501 * step).all()


@pytest.mark.parametrize(("source", "stored"), [("f32", "f16"), ("f16", "f16"), ("bf16", "bf16")])
def test_dense_weights_in_a_type_that_the_kernel_takes(source: str, stored: str) -> None:
    backend = backend_or_skip("race")
    rng = np.random.default_rng(7)
    exact = torch.from_numpy(rng.standard_normal((40, 64))).to(
        {"f32": torch.float32, "f16": torch.float16}.get(source, torch.bfloat16)
    )
    rows = exact.view(torch.uint16).numpy() if source == "bf16" else exact.numpy()
    bias = rng.standard_normal(40).astype(np.float32)
    matrix = DenseMatrix(source, 64, 40, bias, "f32", lambda start, stop: rows[start:stop])
    weight, fields = in_a_blob([matrix], LinearSpec((MatrixSpec("d", 64, 40, 16, source, has_bias=True),)), backend)
    assert torch.equal(fields["weight"], exact.to(torch.bfloat16 if stored == "bf16" else torch.float16))
    x, y = inputs(rng, 3, 64).to(fields["weight"].dtype), torch.full((3, 40), float("nan"))
    multiply_dense(backend, weight, x, Output.store(y))
    expected = x.double().numpy() @ fields["weight"].double().numpy().T + bias
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_zero_points_that_are_not_what_the_configuration_says() -> None:
    matrix = random_matrix(np.random.default_rng(8), 4, 128, 16, 128)
    layout = linear_layout(LinearSpec((matrix_spec(matrix, symmetric=True),)), SM86)
    with pytest.raises(CheckpointError, match=r"m\.qzeros: found zero point \d+, expected 8 everywhere"):
        pack_linear([matrix], layout, np.zeros(layout.num_bytes, np.uint8))


def test_what_f16_cannot_hold_is_named() -> None:
    rows = np.full((16, 32), 1e6, np.float32)
    layout = linear_layout(LinearSpec((MatrixSpec("d", 32, 16, 32, "f32"),)), SM86)
    matrix = DenseMatrix("f32", 32, 16, None, None, lambda start, stop: rows[start:stop])
    with pytest.raises(CheckpointError, match=r"found 1000000\.0, expected 65504 or less"):
        pack_linear([matrix], layout, np.zeros(layout.num_bytes, np.uint8))


def test_a_blob_of_another_size_is_refused() -> None:
    matrix = random_matrix(np.random.default_rng(9), 4, 128, 16, 128)
    layout = linear_layout(LinearSpec((matrix_spec(matrix),)), SM86)
    with pytest.raises(KernelError, match=rf"expected u8 \[{layout.num_bytes}\]"):
        pack_linear([matrix], layout, np.zeros(layout.num_bytes + 64, np.uint8))
