"""mxfp4 against the numbers of its definition: every code with every scale, exactly, in the file's meaning and through
both ways to multiply on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant_config import read_quant_config
from exl.errors import CheckpointError, UnsupportedModelError
from exl.formats.dequantize import dequantize
from exl.formats.load import load_part
from exl.formats.stacked import has_stacked, stacked_spec, stacked_tensors
from exl.layout.layers import linear_layout
from exl.layout.specs import LinearSpec, Stack, Target
from exl.ops.base import Linear, view_field
from exl.ops.torch_linear import Scratch, matmul, pack_linear
from tests.model.cpu_targets import needs_kernels

# Sign, two bits of exponent (bias 1), one of mantissa: OCP Microscaling Formats 1.0, 5.3.3.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array(E2M1 + [-value for value in E2M1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two experts of 255 outputs: output n of the first has scale n, of the second 254 - n; 64 inputs with all codes in
    two orders, written one by one."""
    folder = tmp_path_factory.mktemp("mxfp4")
    rng = np.random.default_rng(0)
    codes = np.stack([np.stack([rng.permutation(np.repeat(np.arange(16), 4)) for _ in range(255)]) for _ in range(2)])
    blocks = np.zeros((2, 255, 2, 16), np.uint8)
    for expert in range(2):
        for n in range(255):
            for k, code in enumerate(codes[expert, n]):
                blocks[expert, n, k // 32, k % 32 // 2] |= int(code) << (4 * (k % 2))
    scales = np.stack([np.arange(255), np.arange(254, -1, -1)])[:, :, None].repeat(2, 2).astype(np.uint8)
    bias = rng.standard_normal((2, 255)).astype(np.float32)
    save_file({"m_blocks": blocks, "m_scales": scales, "m_bias": bias}, folder / "model.safetensors")
    with np.errstate(over="ignore"):
        weights = (E2M1[codes] * 2.0 ** (scales[:, :, :1].astype(np.float64) - 127)).astype(np.float32)
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint, weights, bias


def matrix(checkpoint: Checkpoint, expert: int):
    spec = stacked_spec(checkpoint, "m", Stack(expert=expert), 2)
    return load_part(checkpoint, spec, None), spec


@pytest.mark.filterwarnings("ignore:overflow encountered")  # six times the largest scales, as in f32 itself
@pytest.mark.parametrize("expert", [0, 1])
def test_every_code_with_every_scale_is_exact(expert, checkpoint):
    checkpoint, weights, bias = checkpoint
    found, spec = matrix(checkpoint, expert)
    assert (spec.K, spec.N, spec.bits, spec.group_size, spec.has_bias) == (64, 255, 4, 32, True)
    np.testing.assert_array_equal(dequantize(found).rows(0, 255), weights[expert])
    np.testing.assert_array_equal(dequantize(found).rows(7, 9), weights[expert, 7:9])
    np.testing.assert_array_equal(found.bias, bias[expert])
    assert np.isfinite(weights).mean() > 0.99
    assert len(np.unique(np.abs(weights[np.isfinite(weights)]))) > 2 * 255  # powers of two and 1.5 times those


def test_the_tensors_show_what_they_are(checkpoint):
    checkpoint = checkpoint[0]
    assert has_stacked(checkpoint, "m")
    assert not has_stacked(checkpoint, "other")
    assert stacked_tensors(checkpoint, "m") == {"m_blocks", "m_scales", "m_bias"}


def test_its_configuration_says_nothing(tmp_path):
    config = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    assert read_quant_config(tmp_path, {**config, "model_type": "gpt_oss"}) is None
    with pytest.raises(
        UnsupportedModelError, match=r"quant_method: found 'mxfp4', which is MXFP4, .* in gpt-oss alone"
    ):
        read_quant_config(tmp_path, {**config, "model_type": "llama"})


def one_hot_products(weights: np.ndarray) -> np.ndarray:
    """x W of rows of the identity. 0 times infinity is NaN, so that outputs with one are left out."""
    return np.where(np.isfinite(weights).all(1, keepdims=True), weights, 0).T


def test_torch_multiplies_the_exact_numbers(checkpoint):
    checkpoint, weights, _ = checkpoint
    found, spec = matrix(checkpoint, 0)
    target = Target("cpu", int4pack="split32")
    layout = linear_layout(LinearSpec((spec,)), target)
    assert layout.kind == "planes"
    blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_linear([found], layout, target, blob)
    linear = Linear(layout, {name: view_field(blob, field) for name, field in layout.fields.items()})
    linear.fields["bias"].zero_()
    out = torch.empty(64, 255)
    scratch = Scratch(torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(64 * 64))
    matmul(torch.eye(64), linear, 0, scratch, out)
    finite = np.isfinite(weights[0]).all(1)
    np.testing.assert_array_equal(out.numpy()[:, finite], one_hot_products(weights[0])[:, finite])
    assert finite.sum() == 253


@needs_kernels
def test_kernels_multiply_the_exact_numbers(checkpoint):
    from exl.cpu_kernels.library import shared_library, slots
    from exl.cpu_kernels.linear_f32 import linear_f32
    from exl.layout.layers import column_layout
    from exl.ops import compiled_pack

    checkpoint, weights, _ = checkpoint
    found, spec = matrix(checkpoint, 0)
    layout, library = linear_layout(LinearSpec((spec,)), Target("cpu", compiled=True)), shared_library()
    columns, blob = column_layout(layout.spec), np.zeros(layout.num_bytes, np.uint8)
    compiled_pack.pack_linear([found], layout, blob, library)
    x, out = np.eye(64, dtype=np.float32), np.empty((64, 255), np.float32)
    for kind, rows in (("panel", 64), ("rows", 8), ("row", 1)):
        for first in range(0, 64, rows):
            some, result = x[first : first + rows], out[first : first + rows]
            args = (blob, some, result, 255, columns.num_records, rows, 255, columns.num_blocks)
            library.call(linear_f32(columns, kind), slots(*args, None, None, 0, 1.0, 1, 64), columns.num_blocks)
        finite = np.isfinite(weights[0]).all(1)
        np.testing.assert_array_equal(out[:, finite], one_hot_products(weights[0])[:, finite])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"m_scales": np.full((2, 4, 1), 255, np.uint8)}, "m_scales: found NaN .255. for expert 1, output 0, block 0"),
        ({"m_scales": np.zeros((2, 4, 2), np.uint8)}, r"m_scales: found shape \[2, 4, 2\], expected \[2, 4, 1\]"),
        ({"m_blocks": np.zeros((2, 4, 1, 8), np.uint8)}, r"m_blocks: found shape .* expected \[2, 4, 1, 16\]"),
        ({"m_blocks": np.zeros((3, 4, 1, 16), np.uint8)}, r"m_blocks: found shape .* expected \[2, 4, 1, 16\]"),
        ({"m_bias": np.zeros((2, 5), np.float32)}, r"m_bias: found shape \[2, 5\], expected \[2, 4\]"),
        ({"m_blocks": np.zeros((2, 4, 1, 16), np.float32)}, "m_blocks: found dtype f32, expected u8"),
    ],
)
def test_bad_tensors_are_named(change, expected, tmp_path):
    tensors = {"m_blocks": np.zeros((2, 4, 1, 16), np.uint8), "m_scales": np.full((2, 4, 1), 127, np.uint8)}
    save_file(tensors | change, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=expected):
        load_part(checkpoint, stacked_spec(checkpoint, "m", Stack(expert=1), 2), None)
