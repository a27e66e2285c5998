"""Dense weights in the file's type, norms as exact f32, and which tensors decide whether a module is quantized."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import CheckpointError, UnsupportedModelError
from exl.formats.dense import dense_spec, load_dense
from exl.formats.load import load_matrix, matrix_spec
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.tensors import read_norm
from exl.layout.specs import NormSpec
from tests.reference.plain_packer import pack_layer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUANT = GptqConfig(bits=4, group_size=32, sym=False)


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors and opens them."""
    opened = []

    def write_and_open(tensors):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        opened.append(Checkpoint.open(tmp_path))
        return opened[-1]

    yield write_and_open
    for checkpoint in opened:
        checkpoint.close()


def as_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor from an array; bf16 is stored as its bits."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype == "bf16" else torch.from_numpy(array)


def quantized(name: str, bits: int = 4, group_size: int = 32) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (64, 32))
    G = 64 // group_size
    tensors = pack_layer(codes, np.ones((G, 32), int), np.full((G, 32), 0.01), bits)
    return {f"{name}.{ending}": torch.from_numpy(tensor) for ending, tensor in tensors.items()}


@pytest.mark.parametrize("bias_dtype", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_bias_keep_the_files_bits(write, dtype, bias_dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator).to(DTYPES[dtype])
    tensors = {"head.weight": weight}
    if bias_dtype is not None:
        tensors["head.bias"] = torch.randn(7, generator=generator).to(DTYPES[bias_dtype])
    checkpoint = write(tensors)
    spec, matrix = dense_spec(checkpoint, "head"), load_dense(checkpoint, "head")
    assert (spec.K, spec.N, spec.dtype, spec.bits) == (5, 7, dtype, 32 if dtype == "f32" else 16)
    assert (spec.quantized, spec.has_bias, spec.order_key) == (False, bias_dtype is not None, None)
    assert (matrix.K, matrix.N, matrix.dtype, matrix.bias_dtype) == (5, 7, dtype, bias_dtype)
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        assert torch.equal(as_torch(matrix.rows(start, stop), dtype), weight[start:stop])
    if bias_dtype is not None:
        assert torch.equal(as_torch(matrix.bias, bias_dtype), tensors["head.bias"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_become_f32_exactly(write, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -3.140625, 65504.0, 6e-8, 1e-3]).to(DTYPES[dtype])
    read = read_norm(write({"norm.weight": values}), "norm.weight", NormSpec("norm", 7))
    assert read.dtype == np.float32
    assert torch.equal(torch.from_numpy(read), values.float())
    assert np.signbit(read[1])


def test_a_norms_transform_is_rounded_once(write):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 1e-3
    read = read_norm(write({"norm.weight": values}), "norm.weight", NormSpec("norm", 1000, offset=1.0, scale=1 / 3))
    exact = (values.double() + 1) / 3
    assert read.dtype == np.float32
    ulp = 2.0**-25  # of f32 from 1/4 to 1/2
    assert float((torch.from_numpy(read).double() - exact).abs().max()) <= ulp / 2 * (1 + 1e-6)
    in_steps = ((values + 1) * torch.tensor(1 / 3)).double()
    assert float((in_steps - exact).abs().max()) > ulp / 2 * (1 + 1e-6)


def test_a_norm_of_another_width_is_refused(write):
    with pytest.raises(CheckpointError, match=r"norm\.weight: found shape \[7\], expected \[8\] for the norm q_norm"):
        read_norm(write({"norm.weight": torch.zeros(7)}), "norm.weight", NormSpec("q_norm", 8))


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (torch.float64, "f64"),
        (torch.float8_e4m3fn, "f8_e4m3"),
        (torch.int8, "i8"),
        (torch.int32, "i32"),
        (torch.bool, "bool"),
    ],
)
def test_other_types_are_refused_by_name(write, dtype, found):
    checkpoint = write({"head.weight": torch.zeros(4, 4).to(dtype), "norm.weight": torch.zeros(4).to(dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"head\.weight: found dtype {found}, exl has dense weights in"):
        dense_spec(checkpoint, "head")
    with pytest.raises(UnsupportedModelError, match=rf"norm\.weight: found dtype {found}"):
        read_norm(checkpoint, "norm.weight", NormSpec("norm", 4))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"head.weight": (4,)}, r"head\.weight: found shape \[4\], expected 2 dimensions"),
        ({"head.weight": (0, 4)}, r"head\.weight: found shape \[0, 4\], expected \[N, K\] above 0"),
        ({"head.weight": (3, 4), "head.bias": (4,)}, r"head\.bias: found shape \[4\], expected \[3\] for 3 outputs"),
        ({"head.weight": (3, 4), "head.bias": (3, 1)}, r"head\.bias: found shape \[3, 1\], expected 1 dimension$"),
        ({"other.weight": (3, 4)}, r"no tensor 'head\.weight' among the 1"),
    ],
)
def test_misshapen_tensors_say_what_was_found_and_expected(write, shapes, message):
    with pytest.raises(CheckpointError, match=message):
        load_dense(write({name: torch.zeros(shape) for name, shape in shapes.items()}), "head")


def test_rows_out_of_range(write):
    matrix = load_dense(write({"head.weight": torch.zeros(4, 4)}), "head")
    with pytest.raises(ValueError, match=r"rows 2:5 of head\.weight, which has shape \[4, 4\]"):
        matrix.rows(2, 5)


# --- quantized or dense: the tensors decide ------------------------------------------------------------------------


def test_tensors_decide_what_a_module_is(write):
    checkpoint = write(quantized("a") | {"b.weight": torch.zeros(32, 64)})
    assert isinstance(load_matrix(checkpoint, "a", QUANT), QuantizedMatrix)
    assert isinstance(load_matrix(checkpoint, "b", QUANT), DenseMatrix)
    assert isinstance(load_matrix(checkpoint, "b", None), DenseMatrix)
    assert (matrix_spec(checkpoint, "a", QUANT).bits, matrix_spec(checkpoint, "b", QUANT).bits) == (4, 32)


def test_a_quantized_head_needs_no_flag_and_a_dense_one_may_have_it(write):
    checkpoint = write(quantized("lm_head"))
    assert matrix_spec(checkpoint, "lm_head", GptqConfig(bits=4, group_size=32, lm_head=False)).quantized
    checkpoint = write({"lm_head.weight": torch.zeros(32, 64)})
    assert not matrix_spec(checkpoint, "lm_head", GptqConfig(bits=4, group_size=32, lm_head=True)).quantized


def test_overrides_reach_the_module_that_they_name(write):
    quant = parse_quant_config(
        {
            "bits": 4,
            "group_size": 32,
            "sym": False,
            "dynamic": {r"+:a\.down": {"bits": 8, "group_size": 64}, r"-:a\.up": {}},
        },
        "quantize_config.json",
    )
    checkpoint = write(quantized("a.down", 8, 64) | quantized("a.gate") | quantized("a.up"))
    down, gate = matrix_spec(checkpoint, "a.down", quant), matrix_spec(checkpoint, "a.gate", quant)
    assert (down.bits, down.group_size) == (8, 64)
    assert (gate.bits, gate.group_size) == (4, 32)
    assert matrix_spec(checkpoint, "a.up", quant).bits == 4, "excluded, but its tensors are quantized: they decide"


def test_quantized_tensors_without_any_configuration(write):
    for function in (matrix_spec, load_matrix):
        with pytest.raises(CheckpointError, match=r"a\.qweight: found quantized weights, but no quantize_config\.json"):
            function(write(quantized("a")), "a", None)


def test_neither_and_both(write):
    with pytest.raises(CheckpointError, match="a: found neither weight nor qweight"):
        matrix_spec(write({"b.weight": torch.zeros(2, 2)}), "a", QUANT)
    with pytest.raises(CheckpointError, match="a: found both qweight and weight"):
        matrix_spec(write(quantized("a") | {"a.weight": torch.zeros(32, 64)}), "a", QUANT)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("B", "Marlin"),
        ("q_weight", "EXL2"),
        ("trellis", "EXL3"),
        ("W_q", "HQQ"),
        ("weight_global_scale", "NVFP4"),
        ("Qidxs", "QuIP#"),
        ("codebooks", "AQLM"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
    ],
)
def test_other_formats_give_themselves_away_by_their_tensors(write, tensor, kind):
    checkpoint = write({f"a.{tensor}": torch.zeros(4), "a.weight": torch.zeros(4, 4)})
    with pytest.raises(UnsupportedModelError, match=rf"a\.{tensor}: found a tensor of {kind}"):
        matrix_spec(checkpoint, "a", QUANT)


def test_bf16_scales_and_bias_of_a_quantized_module(write):
    tensors = quantized("a")
    scales = torch.full((2, 32), 0.0101).bfloat16()
    tensors |= {"a.scales": scales, "a.bias": torch.linspace(-5, 5, 32).bfloat16()}
    matrix = load_matrix(write(tensors), "a", QUANT)
    assert (matrix.scales.dtype, matrix.scale_dtype) == (np.float32, "bf16")
    assert torch.equal(torch.from_numpy(matrix.scales).float(), scales.float())
    assert torch.equal(torch.from_numpy(matrix.bias), tensors["a.bias"].float())
