"""Inverse frequencies against transformers and mpmath, and their bits."""

from __future__ import annotations

import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exl.checkpoint.rope_config import RopeConfig
from exl.logarithm import natural_log
from exl.ops.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES = [
    ({"rope_type": "linear", "factor": 2.0}, 1e4, 1),
    ({"rope_type": "dynamic", "factor": 2.0}, 1e4, 20_001),
    (LLAMA3, 5e5, 1),
    (YARN, 1e6, 1),
    (YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, 1e6, 1),
]


def config(parameters: dict, theta: float) -> RopeConfig:
    fields = {key: value for key, value in parameters.items() if key in RopeConfig.__dataclass_fields__}
    original = parameters.get("original_max_position_embeddings", 16_384)
    return RopeConfig(
        kind=parameters["rope_type"], theta=theta, max_position=16_384, original_max_position=original, **fields
    )


@pytest.mark.parametrize(("parameters", "theta", "length"), CASES)
def test_as_in_transformers(parameters, theta, length):
    theirs = LlamaConfig(
        head_dim=128, max_position_embeddings=16_384, rope_parameters=parameters | {"rope_theta": theta}
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"), length)
    found, factor = inverse_frequencies(config(parameters, theta), 128, length)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2.5e-7)
    assert factor == pytest.approx(expected_factor, rel=1e-14)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 3.7])
def test_powers_are_rounded_once(theta):
    """Of f32: 1 / rounded(theta ^ exponent), rounded."""
    found, _ = inverse_frequencies(RopeConfig(theta=theta), 96, 1)
    base = mpmath.mpf(float(np.float32(theta)))
    exponents = np.arange(0, 96, 2, dtype=np.float32) / np.float32(96)
    with mpmath.workprec(100):
        expected = [np.float32(1) / np.float32(float(base ** mpmath.mpf(float(e)))) for e in exponents]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


BITS = """
import hashlib
import numpy as np
from exl.checkpoint.rope_config import RopeConfig
from exl.ops.rope import inverse_frequencies
digest = hashlib.sha256()
for theta in (1e4, 5e5, 1e6, 3.7):
    digest.update(inverse_frequencies(RopeConfig(theta=theta), 128, 1)[0].tobytes())
dynamic = RopeConfig(kind="dynamic", factor=2.0, max_position=2048)
digest.update(inverse_frequencies(dynamic, 128, 3000)[0].tobytes())
yarn = RopeConfig(kind="yarn", factor=4.0, original_max_position=4096)
digest.update(np.float64(inverse_frequencies(yarn, 128, 1)[1]).tobytes())
print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_instructions_that_libraries_choose():
    """A process in which NumPy and glibc believe in a plain x86-64 has the same bits. (With NumPy's own power, it has
    others.)"""
    plain = {
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_ICL",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
    }
    found = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BITS], env=os.environ | more, stdout=subprocess.PIPE, check=True
        )
        for more in ({}, plain)
    ]
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize("theta", [1e-300, 9.9e29])
def test_extreme_bases_are_no_error(theta):
    with np.errstate(divide="ignore"):
        frequencies, _ = inverse_frequencies(RopeConfig(theta=theta), 8, 1)
    assert frequencies[0] == 1
    assert not np.isnan(frequencies).any()


def test_logarithms_are_correctly_rounded():
    rng = np.random.default_rng(2)
    with mpmath.workprec(200):
        for x in [*rng.uniform(0, 3, 300), *np.exp(rng.uniform(-300, 300, 300)), 1.0, 1.0 + 2**-52]:
            assert natural_log(float(x)) == float(mpmath.log(mpmath.mpf(float(x))))
    assert natural_log(0.0) == -np.inf
