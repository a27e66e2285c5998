"""AWQ files -> codes, zeros and scales: against a plain packer, in each of the layouts that programs write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.checkpoint.quant.awq import AwqConfig
from exl.checkpoint.quant_config import parse_quant_config, read_quant_config
from exl.errors import CheckpointError, ConfigError, UnsupportedModelError
from exl.formats.load import load_matrix, matrix_spec, tensors_of
from tests.reference.plain_formats import pack_awq_fast, pack_awq_gemm, pack_awq_gemv
from tests.reference.plain_packer import pack_layer
from tests.unit.formats.layer_files import NAME, expect_matrix, open_layer, random_layer

BASE = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def quant(**values) -> AwqConfig:
    return parse_quant_config(BASE | values, "config.json")


def pack(version, codes, zeros, scales):
    width = 4 * (-(-len(zeros) // 32)) if zeros is not None else 0  # of AutoAWQ, for groups of 32
    if version == "gemm":
        return pack_awq_gemm(codes, zeros, scales)
    if version == "gemv":
        return pack_awq_gemv(codes, zeros, scales, width)
    tensors = pack_awq_fast(codes, zeros, scales, width)
    if version == "llm-awq":
        tensors["scaled_zeros"] = tensors.pop("qzeros")
    return tensors


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("K", "N", "group_size"), [(128, 32, 32), (64, 8, 64), (192, 40, -1), (320, 16, 32)])
def test_codes_zeros_and_scales_are_exact(tmp_path, K, N, group_size, version):
    size = K if group_size == -1 else group_size
    codes, zeros, scales = random_layer((version, K), K, N, size, 4)
    tensors = pack(version, codes, zeros, scales)
    with open_layer(tmp_path, tensors) as checkpoint:
        own = quant(version=version, group_size=group_size)
        matrix, spec = load_matrix(checkpoint, NAME, own), matrix_spec(checkpoint, NAME, own)
        expect_matrix(matrix, codes, zeros, scales)
        assert (spec.K, spec.N, spec.bits, spec.group_size) == (K, N, 4, size)
        assert (spec.symmetric, spec.order_key, spec.scale_dtype) == (False, None, "f16")
        assert tensors_of(checkpoint, NAME) == {f"{NAME}.{ending}" for ending in tensors}


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_stay_exact(tmp_path, scale_type, version):
    codes, zeros, scales = random_layer("types", 64, 32, 32, 4)
    scales = torch.from_numpy(scales).to(scale_type)
    tensors = pack(version, codes, zeros, scales.float().numpy())
    tensors["scales"] = torch.from_numpy(tensors["scales"]).to(scale_type)
    with open_layer(tmp_path, tensors) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, quant(version=version)), codes, zeros, scales.float().numpy())
        assert matrix_spec(checkpoint, NAME, quant(version=version)).scale_dtype == str(scale_type)[6:].replace(
            "bfloat", "bf"
        ).replace("float", "f")


@pytest.mark.parametrize("version", VERSIONS)
def test_files_without_zero_points_may_lack_zeros(tmp_path, version):
    codes, zeros, scales = random_layer("symmetric", 64, 32, 32, 4, zeros=8)
    tensors = pack(version, codes, zeros, scales)
    for missing in (False, True):
        if missing:
            del tensors["scaled_zeros" if version == "llm-awq" else "qzeros"]
        with open_layer(tmp_path, tensors) as checkpoint:
            own = quant(version=version, zero_point=False)
            expect_matrix(load_matrix(checkpoint, NAME, own), codes, zeros, scales)
            assert matrix_spec(checkpoint, NAME, own).symmetric
            if missing:
                with pytest.raises(CheckpointError, match=rf"no tensor '{NAME}\.qzeros'"):
                    matrix_spec(checkpoint, NAME, quant(version=version))


def test_zeros_where_the_configuration_says_that_there_are_none(tmp_path):
    codes, zeros, scales = random_layer("asymmetric", 64, 32, 32, 4)
    with (
        open_layer(tmp_path, pack("gemm", codes, zeros, scales)) as checkpoint,
        pytest.raises(CheckpointError, match=r"up_proj: found zero 0, expected 8 everywhere: config\.json says"),
    ):
        load_matrix(checkpoint, NAME, quant(zero_point=False))


def test_a_scale_of_zero_has_any_zero(tmp_path):
    """gemv_fast stores the product, which then says nothing: all weights of the group are 0."""
    codes, zeros, scales = random_layer("nothing", 64, 32, 32, 4)
    scales[0, 3] = 0
    with open_layer(tmp_path, pack("gemv_fast", codes, zeros, scales)) as checkpoint:
        matrix = load_matrix(checkpoint, NAME, quant(version="gemv_fast"))
        expected = zeros.copy()
        expected[0, 3] = 0
        expect_matrix(matrix, codes, expected, scales)


@pytest.mark.parametrize("scale", [6e-8, 6e-5, 1.0, 60000.0])
def test_every_zero_is_found_behind_its_product(tmp_path, scale):
    """Also of subnormal scales, and where the product leaves f16: that is inf and refused as not finite."""
    codes, zeros, scales = random_layer("products", 64, 16, 64, 4, zeros=np.arange(16)[None])
    scales[:] = scale
    with np.errstate(over="ignore"):
        tensors = pack("gemv_fast", codes, zeros, scales)
    with open_layer(tmp_path, tensors) as checkpoint:
        own = quant(version="gemv_fast", group_size=64)
        if scale == 60000.0:
            with pytest.raises(CheckpointError, match=r"qzeros: found -inf at \[0, 2\]"):
                load_matrix(checkpoint, NAME, own)
        else:
            expect_matrix(load_matrix(checkpoint, NAME, own), codes, zeros, scales)


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("gemm", {"qweight": np.zeros((64, 4), np.int16)}, r"qweight: found dtype i16, expected i32"),
        ("gemm", {"qweight": np.zeros((40, 4), np.int32)}, r"qweight: found shape \[40, 4\], .* K a multiple of 32"),
        ("gemm", {"qweight": np.zeros((8, 32), np.int32)}, r"qweight: found shape \[8, 32\], .* K a multiple of 32"),
        ("gemm", {"qweight": np.zeros((64, 0), np.int32)}, r"qweight: found shape \[64, 0\]"),
        (
            "gemm",
            {"scales": np.zeros((1, 32), np.float16)},
            r"scales: found shape \[1, 32\], expected \[2, 32\]",
        ),
        ("gemm", {"qzeros": np.zeros((2, 32), np.int32)}, r"qzeros: found shape \[2, 32\], expected \[2, 4\]"),
        (
            "gemv",
            {"scales": np.zeros((32, 1), np.float16)},
            r"scales: found shape \[32, 1\], expected room for 2",
        ),
        ("gemv", {"scales": np.zeros((16, 32), np.float16)}, r"scales: found shape \[16, 32\], expected \[32, 32\]"),
        ("gemv", {"qzeros": np.zeros((32, 1), np.int32)}, r"qzeros: found shape \[32, 1\], expected \[32, 4\]"),
        ("gemv_fast", {"qweight": np.zeros((8, 96), np.int16)}, r"qweight: found 96 inputs, expected a multiple of 64"),
        ("gemv_fast", {"qzeros": np.ones((32, 32), np.float16)}, r"qzeros: found 1\.0 for group 0, output 0, expected"),
        ("gemv_fast", {"qzeros": np.zeros((32, 32), np.int32)}, r"qzeros: found dtype i32, expected f16"),
        ("gemm", {"bias": np.zeros(31, np.float16)}, r"bias: found shape \[31\], expected \[32\]"),
    ],
)
def test_damaged_layers_say_what_was_found_and_expected(tmp_path, version, changes, message):
    codes, zeros, scales = random_layer("damaged", 64, 32, 32, 4)
    with (
        open_layer(tmp_path, pack(version, codes, zeros, scales) | changes) as checkpoint,
        pytest.raises(CheckpointError, match=rf"model\.safetensors: {NAME}\.{message}"),
    ):
        load_matrix(checkpoint, NAME, quant(version=version))


def test_gptq_tensors_in_a_folder_that_says_awq(tmp_path):
    codes, zeros, scales = random_layer("gptq", 64, 32, 32, 4)
    with (
        open_layer(tmp_path, pack_layer(codes, zeros, scales, 4)) as checkpoint,
        pytest.raises(CheckpointError, match=r"qweight: found shape \[8, 32\], expected \[K, N / 8\]"),
    ):
        matrix_spec(checkpoint, NAME, quant())


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, (128, "gemm", True)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMV"}, (64, "gemv", True)),
        ({"method": "awq", "quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm"}, (64, "gemm", True)),
        (BASE | {"version": "gemm", "format": "gemm", "sym": True, "zero_point": None}, (32, "gemm", False)),
        (BASE | {"backend": "llm-awq"}, (32, "llm-awq", True)),
        (BASE | {"backend": "autoawq", "version": "gemv_fast"}, (32, "gemv_fast", True)),
    ],
)
def test_key_names_of_several_programs(values, expected):
    config = parse_quant_config(values, "quant_config.json")
    assert (config.group_size, config.version, config.zero_point) == expected
    assert (config.method, config.layout, config.bits) == ("awq", expected[1], 4)


def test_modules_that_are_not_converted_are_named_by_parts_of_their_names():
    config = quant(modules_to_not_convert=["visual", ".mlp.gate", "lm_head"])
    names = {"visual.blocks.0.fc": True, "model.layers.1.mlp.gate_proj": True, "lm_head": True, "model.a.q_proj": False}
    assert {name: config.for_module(name) is None for name in names} == names


def test_two_files_of_one_folder_are_one_configuration(tmp_path):
    """AutoAWQ writes a quant_config.json without a method, and transformers' copy into config.json."""
    (tmp_path / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'
    )
    config = read_quant_config(tmp_path, {"quantization_config": BASE | {"modules_to_not_convert": ["lm_head"]}})
    assert (config.others, config.dense, config.source) == ((), ("lm_head",), "quant_config.json")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            BASE | {"version": "exllama"},
            UnsupportedModelError,
            r"version: found 'exllama', exl reads AWQ's gemm",
        ),
        (BASE | {"version": "gemm", "format": "gemv"}, ConfigError, r"found \{.*\}, expected names of one thing"),
        (BASE | {"bits": 8}, UnsupportedModelError, r"bits: found 8, exl has \(4,\)"),
        (BASE | {"bits": None}, ConfigError, r"found no bits, which an AWQ checkpoint needs"),
        (BASE | {"modules_to_not_convert": "lm_head"}, ConfigError, r"modules_to_not_convert: found 'lm_head'"),
        (BASE | {"zero_point": 1}, ConfigError, r"zero_point: found 1, expected true or false"),
        (BASE | {"dynamic": {"+:a": {"bits": 8}}}, UnsupportedModelError, r"dynamic: '\+:a': found bits"),
    ],
)
def test_values_that_make_no_sense_name_file_and_key(values, error, message):
    with pytest.raises(error, match=rf"^config\.json: {message}"):
        parse_quant_config(values, "config.json")


def test_files_of_two_methods_in_one_folder(tmp_path):
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    with pytest.raises(ConfigError, match=r"found gptq in quantize_config\.json and awq in config\.json: quant"):
        read_quant_config(tmp_path, {"quantization_config": BASE})
