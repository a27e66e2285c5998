"""LoRA adapters beside the weights against transformers with the same adapter merged into them in f64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import some_ids
from tests.model.hf_models import CASES, build, decode_logits, prefill_logits, save
from tests.reference.adapter_twin import make

TOLERANCE = 2e-4
NUM_PROMPT, NUM_TOKENS = 61, 80
IDS = some_ids(NUM_TOKENS, seed=1)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = {
    "llama": ALL,
    "llama-biases": ALL,
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "phi3": FUSED,
    "glm": ["q_proj", "k_proj", "gate_up_proj", "o_proj"],
    "gemma2": ALL,
    "granite": ALL,
}


def load(folder: Path, cpu, **options) -> Engine:
    return load_engine(folder, EngineOptions(**{"kv_cache": "f32", "context": 128} | options), cpu=cpu)


def all_logits(engine: Engine, lora: str | None) -> torch.Tensor:
    return torch.cat([chunk.clone() for chunk in engine.generator.logits(IDS, lora)])


def token_by_token(engine: Engine, lora: str | None) -> torch.Tensor:
    generator = engine.generator
    sequence = generator.begin(NUM_TOKENS, lora)
    logits = [generator.extend(sequence, IDS[:NUM_PROMPT]).clone()]
    logits += [generator.extend(sequence, [token_id]).clone() for token_id in IDS[NUM_PROMPT:]]
    generator.end(sequence)
    return torch.cat(logits)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: name of a case -> (transformers' model, its folder, an adapter, its folder)."""
    built = {}

    def get(name: str):
        if name not in built:
            model = build(next(case for case in CASES if case.name == name))
            folder = tmp_path_factory.mktemp(name)
            adapter = make(model, TARGETS[name])
            built[name] = (model, save(model, folder / "model"), adapter, adapter.save(folder / "adapter"))
        return built[name]

    return get


@with_both
@pytest.mark.parametrize("name", TARGETS)
def test_equals_merged_weights(name, cpu, models):
    model, folder, adapter, adapter_folder = models(name)
    merged = adapter.merged(model)
    engine = load(folder, cpu, lora={"a": adapter_folder})
    expected = prefill_logits(merged, IDS)
    plain = prefill_logits(model, IDS)
    assert (expected - plain).abs().max() > 500 * TOLERANCE
    assert (all_logits(engine, "a") - expected).abs().max() <= TOLERANCE
    assert (all_logits(engine, None) - plain).abs().max() <= TOLERANCE
    difference = (token_by_token(engine, "a") - decode_logits(merged, IDS, NUM_PROMPT)).abs().max()
    assert difference <= TOLERANCE
