"""What the arithmetic of quantized layers costs: divergence of next-token distributions from f32 activations'."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from tests.model.cpu_targets import needs_kernels

DATA = Path(__file__).parents[1] / "data"
TEXT = (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8")[:1200]

pytestmark = needs_kernels


def distributions(folder: Path, arithmetic: str | None) -> torch.Tensor:
    with exl.load(folder, device="cpu", kv_cache="f32", arithmetic=arithmetic) as llm:
        return torch.log_softmax(llm.logits(llm.encode(TEXT)[:400]).double(), -1)


def divergence(folder: Path, arithmetic: str | None) -> float:
    """Mean KL, in nats."""
    exact, other = distributions(folder, "f32"), distributions(folder, arithmetic)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    """stories2M, rounded to nearest."""
    out = tmp_path_factory.mktemp("four bits") / "model"
    quantize(DATA / "stories2M", out, QuantizeOptions(method="rtn", bits=4, group_size=64))
    return out


@pytest.fixture(scope="module")
def outlier(tmp_path_factory) -> Path:
    """The same with one of the 256 channels 300 times as large behind each norm, and its weights as much smaller."""
    folder = tmp_path_factory.mktemp("outlier")
    shutil.copytree(DATA / "stories2M", folder / "dense")
    tensors = load_file(DATA / "stories2M" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[0] *= 300
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 0] /= 300
    save_file(tensors, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    quantize(folder / "dense", folder / "model", QuantizeOptions(method="rtn", bits=4, group_size=64))
    return folder / "model"


def test_the_default_is_as_good_as_f32(four_bits):
    """A step is 1 / 32512 of the largest activation of 64 or fewer. 1e-9 and 6e-9 were measured."""
    for folder in (four_bits, BUNDLED_MODEL):
        assert 0 < divergence(folder, None) < 1e-7


def test_a_channel_300_times_as_large_leaves_the_others_bits_enough(outlier):
    """They share its steps: 32512 / 300, about 100 for the largest of them. 6e-7 was measured."""
    assert divergence(outlier, None) < 1e-6


def test_8_bits_cost_what_they_save(four_bits):
    """8e-5 and 4e-4 were measured: 256 times the error in the activations, 256^2 times the divergence."""
    for folder in (four_bits, BUNDLED_MODEL):
        assert 1e-5 < divergence(folder, "int8") < 1e-3


def test_smollm2(smollm2_quantized):
    assert 0 < divergence(smollm2_quantized, None) < 1e-6
