"""What GPTQ files of other programs than AutoGPTQ have: zeros with borrows, planes, embeddings, heads of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import CheckpointError, ConfigError, ExlWarning, UnsupportedModelError
from exl.formats.load import load_matrix, load_part, matrix_spec, table_spec, tensors_of
from exl.formats.matrix import DenseMatrix
from exl.formats.settle_quant import settle_quant
from exl.layout.specs import Rows
from tests.reference.plain_formats import borrowed_zeros, pack_gptq_p
from tests.reference.plain_packer import dequantize, pack_layer
from tests.unit.formats.layer_files import NAME, dense_values, expect_matrix, open_layer, random_layer

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}


def quant(**values) -> GptqConfig:
    return parse_quant_config(BASE | values, "config.json")


# --- zeros of 0 in v1, by the file's writer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "borrows"),
    [
        ({"meta": {"quantizer": ["gptqmodel:5.0.0"]}}, True),
        ({"meta": {"quantizer": "GPTQModel:7.7.0"}}, True),
        ({"provider": "auto-round"}, True),
        ({"meta": {"quantizer": ["optimum:1.2"]}}, False),
        ({"meta": {"quantizer": ["exl"]}}, False),
        ({"meta": {"damp_percent": 0.1}}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_zero_are_read_as_their_writer_wrote_them(tmp_path, bits, writer, borrows):
    codes, zeros, scales = random_layer((bits, borrows), 64, 32, 32, bits)
    assert (zeros == 0).any()
    tensors = pack_layer(codes, zeros, scales, bits)
    if borrows and bits != 3:
        tensors["qzeros"] = borrowed_zeros(zeros, bits)
    with open_layer(tmp_path, tensors) as checkpoint:
        matrix = load_matrix(checkpoint, NAME, quant(bits=bits, **writer))
        expect_matrix(matrix, codes, zeros, scales)


def test_words_of_zeros_differ_by_the_borrow_alone():
    """1, 0, 5 become 0, 15, 4 field by field; as a word the 0 takes its borrow from the 5."""
    zeros = np.array([[1, 0, 5, 8, 8, 8, 8, 8]])
    assert borrowed_zeros(zeros, 4).astype(np.uint32)[0, 0] == 0x777773F0
    assert np.array(pack_layer(np.zeros((8, 8), int), zeros, np.ones((1, 8)), 4)["qzeros"])[0, 0] == 0x777774F0


def test_symmetric_zeros_need_no_writer(tmp_path):
    codes, zeros, scales = random_layer("symmetric", 64, 32, 32, 4, zeros=8)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 4)) as checkpoint:
        matrix = load_matrix(checkpoint, NAME, quant(sym=True, meta={"quantizer": ["gptqmodel:5"]}))
        expect_matrix(matrix, codes, zeros, scales)


# --- planes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes(tmp_path, bits, key):
    codes, zeros, scales = random_layer(bits, 96, 32, 32, bits)
    g_idx = [2 - k // 32 for k in range(96)]
    tensors = pack_gptq_p(codes, zeros, scales, bits) | {"g_idx": np.array(g_idx, np.int32)}
    with open_layer(tmp_path, tensors) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, quant(bits=bits, **{key: "gptq_p"})), codes, zeros, scales, g_idx)


def test_planes_of_symmetric_zeros_are_no_other_format(tmp_path, recwarn):
    """What an equal zero looks like says nothing of planes."""
    codes, zeros, scales = random_layer("planes", 64, 32, 32, 3, zeros=4)
    with open_layer(tmp_path, pack_gptq_p(codes, zeros, scales, 3)) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, quant(bits=3, sym=True, format="gptq_p")), codes, zeros, scales)
    assert [str(w.message) for w in recwarn if w.category is ExlWarning] == []


@pytest.mark.parametrize("bits", [5, 6, 7])
@pytest.mark.parametrize("where", ["bits", "dynamic"])
def test_widths_that_only_planes_have_are_refused_by_name(bits, where):
    values = {"bits": bits} if where == "bits" else {"dynamic": {".*down.*": {"bits": bits}}}
    with pytest.raises(UnsupportedModelError, match=rf"bits: found {bits}, exl has \(2, 3, 4, 8\)"):
        quant(format="gptq_p", **values)


# --- tensors over configuration; heads and embeddings --------------------------------------------------------------


def test_a_rule_for_a_module_that_is_dense_changes_nothing(tmp_path):
    """As official files of Qwen3.5 have it."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with open_layer(tmp_path, {"weight": weight}, "lm_head") as checkpoint:
        own = quant(dynamic={"lm_head": {}, "model.language_model.embed_tokens": {}})
        assert matrix_spec(checkpoint, "lm_head", own).dtype == "bf16"
        assert isinstance(load_matrix(checkpoint, "lm_head", own), DenseMatrix)
        assert tensors_of(checkpoint, "lm_head") == {"lm_head.weight"}


def test_a_head_has_bits_of_its_own(tmp_path):
    codes, zeros, scales = random_layer("head", 64, 32, 64, 8)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 8), "lm_head") as checkpoint:
        own = quant(lm_head=True, dynamic={"lm_head": {"bits": 8, "group_size": 64}})
        expect_matrix(load_matrix(checkpoint, "lm_head", own), codes, zeros, scales)
        assert tensors_of(checkpoint, "lm_head") == {f"lm_head.{part}" for part in ("qweight", "qzeros", "scales")}


@pytest.mark.parametrize("order", [False, True], ids=["sequential", "act-order"])
@pytest.mark.parametrize(
    ("bits", "scale_type"), [(2, torch.float16), (3, torch.bfloat16), (4, torch.float32), (8, torch.float16)]
)
def test_an_embedding_is_packed_along_its_tokens(tmp_path, bits, scale_type, order):
    """A token is an input: W[k, n] of the formula is channel n of token k."""
    codes, zeros, scales = random_layer(bits, 160, 32, 64, bits)
    scales = torch.from_numpy(scales).to(scale_type)
    g_idx = np.random.default_rng(bits).permutation(np.arange(160) // 64) if order else np.arange(160) // 64
    tensors = pack_layer(codes, zeros, scales.double().numpy(), bits, g_idx=g_idx) | {"scales": scales}
    with open_layer(tmp_path, tensors, "embed") as checkpoint:
        own = quant(bits=bits, group_size=64)
        spec = table_spec(checkpoint, "embed", own)
        assert (spec.K, spec.N, spec.dtype, spec.quantized) == (32, 160, "f32", False)
        table = load_part(checkpoint, spec, own)
        expected = dequantize(codes, zeros, scales.double().numpy(), g_idx)
        if scale_type == torch.float32:
            expected = expected.astype(np.float32)  # one rounding; of the others there is none
        np.testing.assert_array_equal(dense_values(table).astype(np.float64), expected)
        for start, stop in ((0, 1), (31, 33), (100, 160), (159, 160), (7, 7)):
            np.testing.assert_array_equal(table.rows(start, stop), expected[start:stop])


def test_some_outputs_of_a_module_in_every_format(tmp_path):
    """A fused qkv: as ``select.py`` takes them, also from planes, whose words are no words of others."""
    codes, zeros, scales = random_layer("rows", 64, 96, 32, 3)
    with open_layer(tmp_path, pack_gptq_p(codes, zeros, scales, 3)) as checkpoint:
        own = quant(bits=3, format="gptq_p")
        whole = matrix_spec(checkpoint, NAME, own)
        part = load_part(checkpoint, replace(whole, N=32, rows=Rows(32, 32, 96)), own)
        expect_matrix(part, codes[:, 32:64], zeros[:, 32:64], scales[:, 32:64])


def test_files_that_disagree_about_planes_are_no_case_for_the_tensors(tmp_path):
    codes, zeros, scales = random_layer("disagree", 64, 32, 32, 3)
    with open_layer(tmp_path, pack_gptq_p(codes, zeros, scales, 3)) as checkpoint:
        files = replace(quant(bits=3, format="gptq_p"), others=(quant(bits=3),))
        with pytest.raises(ConfigError, match=r"checkpoint_format: found gptq_p in .* and gptq in .*: correct the"):
            settle_quant(checkpoint, files)


def test_a_table_that_is_damaged_says_so(tmp_path):
    codes, zeros, scales = random_layer("damaged", 64, 32, 32, 4)
    with (
        open_layer(tmp_path, pack_layer(codes, zeros, scales[:1], 4), "embed") as checkpoint,
        pytest.raises(CheckpointError, match=r"embed\.scales: found shape \[1, 32\], expected \[2, 32\]"),
    ):
        table_spec(checkpoint, "embed", quant())
