"""``dense=``: what a file has dense in its layers, attention in many published ones, rounded while it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import exl
from exl.engine.build import load_engine
from exl.engine.cache_files import load_cache, save_cache
from exl.layout.specs import Target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions, Reading
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import prefill_logits
from tests.model.test_quantized import make

IDS = some_ids(70, seed=3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Attention in bf16, the MLP in 4 bits: the folder, and transformers' model of the same weights."""
    folder = tmp_path_factory.mktemp("mixed")
    model = make(folder, 4, 32)
    tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
    for name in [name for name in state if "self_attn" in name]:
        module = name.removesuffix(".weight")
        tensors = {key: value for key, value in tensors.items() if not key.startswith(module + ".")}
        tensors[name] = state[name].to(torch.bfloat16)
        state[name] = tensors[name].float()
    model.load_state_dict(state)
    save_file(tensors, folder / "model.safetensors")
    return folder, model


def _engine(folder: Path, cpu: Target, dense: str | int):
    return load_engine(folder, EngineOptions(kv_cache="f32", context=128, dense=dense), cpu=cpu)


@with_both
def test_logits_follow_the_bits(mixed, cpu):
    """Rounded to 8 bits a weight is off by at most 1/510 of its group's range, here below 1/6 of its spread: 0.2 % in
    a product of 64, some of which reaches a logit. 4 bits are 17 times as coarse."""
    folder, model = mixed
    expected = prefill_logits(model, IDS)
    off = {
        dense: float((all_logits(_engine(folder, cpu, dense), IDS) - expected).square().mean().sqrt() / expected.std())
        for dense in ("file", 8, 4)
    }
    assert off["file"] < 2e-3
    assert off["file"] < off[8] < 0.05
    assert 4 * off[8] < off[4] < 0.8


@with_both
def test_only_what_is_dense_is_rounded(mixed, cpu):
    folder, _ = mixed
    layer = _engine(folder, cpu, 8).generator.runner.weights.acquire(0)
    found = {
        name: [(part.layout.spec.bits, len(part.layout.spec.parts)) for part in layer[name]] for name in layer.linears
    }
    assert found == {"qkv": [(8, 3)], "o": [(8, 1)], "gate_up": [(4, 2)], "down": [(4, 1)]}


@with_both
def test_a_model_without_dense_parts_stays_as_it_is(cpu, tmp_path):
    model = make(tmp_path, 4, 32)
    plain, rounded = (all_logits(_engine(tmp_path, cpu, dense), IDS) for dense in ("file", 4))
    assert torch.equal(plain, rounded)
    assert (plain - prefill_logits(model, IDS)).abs().max() < 0.05


def test_the_plan_counts_it_and_says_what_it_would_gain(mixed):
    folder, _ = mixed
    plain, rounded = (exl.plan(folder, dense=dense) for dense in ("file", 8))
    assert rounded.num_bytes < plain.num_bytes
    assert any(note.text.startswith("dense=8 would save") for note in plain.notes)
    assert not any(note.text.startswith("dense=") for note in rounded.notes)


def test_a_model_that_is_dense_altogether_is_not_advised(tmp_path):
    model = make(tmp_path, 4, 32)
    model.save_pretrained(tmp_path / "dense")
    assert not any("dense=8" in note.text for note in exl.plan(tmp_path / "dense").notes)


def test_a_gpu_takes_it_too(mixed):
    with open_model(mixed[0], Reading(dense=4)) as files:
        layouts = files.manifest.layouts(Target("cuda", arch=86)).layers
    kinds = {linear.kind for layer in layouts for some in layer.linears.values() for linear in some}
    assert kinds == {"tiles"}


def test_a_saved_cache_is_of_one_rounding(mixed, tmp_path):
    folder, _ = mixed
    engines = {dense: load_engine(folder, EngineOptions(context=128, dense=dense)) for dense in ("file", 8)}
    all_logits(engines[8], IDS)
    save_cache(engines[8], folder, tmp_path / "kept")
    with pytest.raises(exl.ConfigError, match="was saved for something else: 'layers'"):
        load_cache(engines["file"], folder, tmp_path / "kept")


@pytest.mark.parametrize("dense", [3, "8", True, None])
def test_roundings_that_nobody_has(dense):
    with pytest.raises(exl.ConfigError, match="dense: found"):
        exl.load(dense=dense)
