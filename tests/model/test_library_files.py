"""Files that the formats' own libraries wrote, to logits: ``scripts/make_format_fixtures.py`` made them, with AutoAWQ
0.2.9, AutoRound 0.16.1 and compressed-tensors 0.16.0 and 0.20.0. Logits are those of the libraries' dequantization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from exl.engine.build import load_engine
from exl.formats.dequantize import dequantize
from exl.formats.load import load_matrix
from exl.formats.matrix import QuantizedMatrix
from exl.layout.specs import Target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import all_logits

FOLDER = Path(__file__).parents[1] / "data" / "formats"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
NAME = "model.layers.0.mlp.down_proj"
LAYOUTS = {
    "autoawq-gemm": "awq, gemm",
    "autoawq-gemv": "awq, gemv",
    "autoawq-gemv_fast": "awq, gemv_fast",
    "autoround-awq": "auto-round, auto_round:auto_awq",
    "autoround-awq-exported": "awq, gemm",
    "autoround-v2": "auto-round, auto_round",
    "autoround-zp-gptq": "gptq, gptq",
    "autoround-zp-sym": "auto-round, auto_round:auto_gptq",
    "compressed-tensors-0.16-w3": "compressed-tensors, pack-quantized",
    "compressed-tensors-fp8": "compressed-tensors, e4m3",
    "compressed-tensors-fp8-block": "compressed-tensors, e4m3 in blocks of 16 x 32",
    "compressed-tensors-int8": "compressed-tensors, int-quantized",
    "compressed-tensors-w3": "compressed-tensors, pack-quantized",
    "compressed-tensors-w4": "compressed-tensors, pack-quantized",
    "compressed-tensors-w4-sym": "compressed-tensors, pack-quantized",
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_the_library_reads(case):
    """Libraries multiply in f32, exl's meaning is the exact product: one rounding between them."""
    expected = load_file(FOLDER / case / "expected.safetensors")[f"{NAME}.weight"].numpy()
    with open_model(FOLDER / case) as files:
        assert f"{files.quant.method}, {files.quant.layout}" == LAYOUTS[case]
        matrix = load_matrix(files.checkpoint, NAME, files.quant)
        if isinstance(matrix, QuantizedMatrix):
            assert len(np.unique(matrix.codes(0, matrix.N))) >= min(2**matrix.bits - 1, 64)
            matrix = dequantize(matrix)
        found = matrix.rows(0, len(expected))
    np.testing.assert_allclose(found, expected, rtol=2.0**-23, atol=0)
    assert np.abs(found).max() > 0.05


@with_both
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_librarys_weights(case, cpu: Target):
    expected = load_file(FOLDER / case / "expected.safetensors")
    ids = expected["ids"].tolist() * 5  # many enough for the f32 path of torch's 4-bit kernel
    engine = load_engine(
        FOLDER / case,
        EngineOptions(kv_cache="f32", context=64, **({"arithmetic": "f32"} if cpu.compiled else {})),
        cpu=cpu,
    )
    logits = all_logits(engine, ids)[: len(expected["ids"])]
    assert expected["logits"].std() > 0.1
    assert (logits - expected["logits"]).abs().max() <= 2e-4
