"""``rope=`` in the place of what config.json says, against transformers with the same override."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from exl.checkpoint.checkpoint import Checkpoint
from exl.engine.build import load_engine
from exl.engine.cache_files import load_cache, save_cache
from exl.errors import ConfigError
from exl.ops.cpu_target import torch_target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions, Reading
from exl.weights.packed_store import packed_key
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import CASES, build, prefill_logits, save

TOLERANCE = 2e-4  # as in test_against_transformers
IDS = some_ids(90, seed=1)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
ROPES = [
    ({"rope_type": "linear", "factor": 3.0}, 144),
    ({"type": "dynamic", "factor": 2.0}, 96),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}, 96),
    ({"rope_type": "llama3", **LLAMA3}, 192),
    ({"rope_type": "linear", "factor": 2, "rope_theta": 3e4}, 96),
    ({"rope_theta": 3e4}, 48),
]
OPTIONS = {"kv_cache": "f32", "context": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with max_position_embeddings 48: plain RoPE, and yarn."""
    cases = {case.name: case for case in CASES}
    return {name: save(build(cases[name]), tmp_path_factory.mktemp(name)) for name in ("llama", "llama-yarn")}


def transformers_with(folder, rope):
    """The same override as a user of transformers 5 writes it: theta belongs to the dict there."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = (
        {"rope_theta": config.rope_parameters["rope_theta"]} if {"rope_type", "type"} & rope.keys()
        else config.rope_parameters
    ) | rope  # fmt: skip
    config.rope_parameters.setdefault("rope_type", rope.get("type"))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@with_both
@pytest.mark.parametrize("name", ["llama", "llama-yarn"])
@pytest.mark.parametrize(("rope", "max_position"), ROPES, ids=str)
def test_logits_are_those_of_transformers_with_the_same_override(rope, max_position, name, cpu, folders):
    expected = prefill_logits(transformers_with(folders[name], rope), IDS)
    engine = load_engine(folders[name], EngineOptions(**OPTIONS, rope=rope), cpu=cpu)
    assert (all_logits(engine, IDS) - expected).abs().max() <= TOLERANCE
    if (name, rope.get("rope_type")) != ("llama-yarn", "yarn"):  # whose file says the same
        plain = all_logits(load_engine(folders[name], EngineOptions(**OPTIONS), cpu=cpu), IDS)
        assert (plain - expected).abs().max() > 50 * TOLERANCE
    if name == "llama":
        assert engine.config.max_position == max_position
        longer = [text for text in engine.plan.warnings if "longer than the model's own" in text]
        assert bool(longer) == (max_position < 128 and rope.get("type") != "dynamic")


def test_kept_pages_are_of_one_rope_and_packed_weights_of_any(folders, tmp_path):
    rope, cpu, keys = {"rope_type": "linear", "factor": 3.0}, torch_target(), set()
    for other in (None, rope):
        reading = Reading(rope=other)
        with open_model(folders["llama"], reading) as files, Checkpoint.open(folders["llama"]) as checkpoint:
            layouts = files.manifest.layouts(cpu)
            keys.add(packed_key(checkpoint, None, [layouts.embed, *layouts.layers, layouts.head], cpu, "torch"))
    assert len(keys) == 1
    engine = load_engine(folders["llama"], EngineOptions(**OPTIONS, rope=rope), cpu=cpu)
    save_cache(engine, folders["llama"], tmp_path / "kept")
    load_cache(engine, folders["llama"], tmp_path / "kept")
    for other in (None, rope | {"factor": 2.0}):
        engine = load_engine(folders["llama"], EngineOptions(**OPTIONS, rope=other), cpu=cpu)
        with pytest.raises(ConfigError, match="was saved for something else: 'config'"):
            load_cache(engine, folders["llama"], tmp_path / "kept")


def test_the_plan_says_which_rope_is_in_use(folders):
    options = dataclasses.replace(EngineOptions(**OPTIONS), rope={"rope_type": "yarn", "factor": 4.0})
    engine = load_engine(folders["llama"], options, cpu=torch_target())
    assert "RoPE: yarn, factor 4 of 48 tokens, theta 1000; 192 positions" in engine.plan.summary()
    assert "RoPE" not in load_engine(folders["llama"], EngineOptions(**OPTIONS), cpu=torch_target()).plan.summary()
