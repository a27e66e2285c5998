"""Logits against transformers: every family, every RoPE scaling, prefill and token by token; every feature matters.
Through exl's own kernels and through torch's.

Tolerance 2e-4 on logits of order 1: f32 sums in another order, through three layers with weights of 0.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exl.checkpoint.rope_config import RopeConfig
from exl.engine.build import Engine, load_engine
from exl.families.config import ModelConfig
from exl.families.specs import BranchShape, EmbedShape, LayerSpec, MoeShape
from exl.layout.specs import Rows, Target
from exl.planning.options import EngineOptions
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import CASES, Case, build, decode_logits, load_f32, prefill_logits, save, with_attention

TOLERANCE = 2e-4
NUM_PROMPT, NUM_TOKENS = 61, 90  # beyond windows of 16, 24 original positions, 48 positions, a page of 64
IDS = some_ids(NUM_TOKENS, seed=1)


def _load(folder: Path, cpu: Target, **options) -> Engine:
    return load_engine(folder, EngineOptions(**{"kv_cache": "f32", "context": 128} | options), cpu=cpu)


def _decode(engine: Engine, ids: list[int], num_prompt: int) -> torch.Tensor:
    generator = engine.generator
    sequence = generator.begin(len(ids))
    logits = [generator.extend(sequence, ids[:num_prompt]).clone()]
    logits += [generator.extend(sequence, [token_id]).clone() for token_id in ids[num_prompt:]]
    generator.end(sequence)
    return torch.cat(logits)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: case -> (transformers' model, its folder), each built once."""
    built = {}

    def get(case: Case):
        if case.name not in built:
            model = build(case)
            built[case.name] = (model, save(model, tmp_path_factory.mktemp(case.name)))
        return built[case.name]

    return get


@with_both
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_equals_transformers(case, cpu, models):
    model, folder = models(case)
    expected = prefill_logits(model, IDS)
    assert expected.std() > 0.5  # the logits vary enough for a comparison
    difference = (all_logits(_load(folder, cpu), IDS) - expected).abs().max()
    assert difference <= TOLERANCE


@with_both
@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_transformers(case, cpu, models):
    model, folder = models(case)
    expected = decode_logits(model, IDS, NUM_PROMPT)
    difference = (_decode(_load(folder, cpu), IDS, NUM_PROMPT) - expected).abs().max()
    assert difference <= TOLERANCE


@with_both
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", ["llama-dynamic", "qwen2-window", "qwen3"])
def test_chunks_do_not_show(name, chunk, cpu, models):
    """Chunks of any size, windows of any number of chunks: the logits are transformers' for the whole prompt."""
    case = next(case for case in CASES if case.name == name)
    model, folder = models(case)
    engine = _load(folder, cpu, prefill_chunk=chunk, prefill_window=max(chunk, 20))
    assert (all_logits(engine, IDS) - prefill_logits(model, IDS)).abs().max() <= TOLERANCE


@with_both
def test_pages_in_any_order(cpu, models):
    """Attention follows the page table: pages are not adjacent and are allocated in descending order."""
    case = CASES[0]
    model, folder = models(case)
    engine = _load(folder, cpu)
    allocate = engine.generator.pool.allocate
    engine.generator.pool.allocate = lambda count, after=None: allocate(count, after)[::-1]
    assert (all_logits(engine, IDS) - prefill_logits(model, IDS)).abs().max() <= TOLERANCE


@with_both
def test_f16_cache_costs_no_more_than_its_rounding(cpu, models):
    """f16 keys, values and queries have relative errors of 2^-11 each. A score is then off by up to 3 * 2^-11 * |score|
    (~0.02 for the scores of about 10 here), a probability by that share of itself, an output by that share of the
    values' spread; three layers of unit residuals keep it below 0.1. It must also be above zero."""
    case = CASES[0]
    model, folder = models(case)
    engine = _load(folder, cpu, kv_cache="f16")
    difference = (all_logits(engine, IDS) - prefill_logits(model, IDS)).abs().max()
    assert 1e-5 < difference < 0.1


@with_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_dense_weights_keep_the_files_type(dtype, cpu, tmp_path):
    """Rounded weights, f32 arithmetic: equal to transformers in f32 with the same rounded weights."""
    folder = save(build(CASES[2]).to(dtype), tmp_path)
    engine = _load(folder, cpu)
    weights = engine.generator.runner.weights.acquire(0)
    assert weights["qkv"][0].fields["weight"].dtype == dtype
    model = load_f32(folder)
    assert (all_logits(engine, IDS) - prefill_logits(model, IDS)).abs().max() <= TOLERANCE
    difference = (_decode(engine, IDS, NUM_PROMPT) - decode_logits(model, IDS, NUM_PROMPT)).abs().max()
    assert difference <= TOLERANCE


def _changed_layers(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, layers=tuple(dataclasses.replace(x, **changes) for x in config.layers))


def _changed_mixtures(config: ModelConfig, changes: Callable[[MoeShape], dict[str, object]]) -> ModelConfig:
    def changed(layer: LayerSpec) -> LayerSpec:
        if not isinstance(layer.mlp, MoeShape):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, **changes(layer.mlp)))

    return dataclasses.replace(config, layers=tuple(map(changed, config.layers)))


def _without(engine: Engine, feature: str) -> None:
    """Removes one feature from a loaded model."""
    runner = engine.generator.runner
    decoder, layers = runner.decoder, runner.weights.layers
    config = decoder.config
    rope, mlp = config.rope, config.layers[0].mlp
    in_attention = {
        "rope": {"rope": dataclasses.replace(rope, theta=1e30, kind="default")},
        "rope_scaling": {"rope": RopeConfig(theta=rope.theta, partial_rotary_factor=rope.partial_rotary_factor)},
        "attention_factor": {"rope": dataclasses.replace(rope, attention_factor=1.0)},
        "truncate": {"rope": dataclasses.replace(rope, truncate=True)},
        "partial": {"rope": dataclasses.replace(rope, partial_rotary_factor=1.0)},
        "query_scale": {"rope": dataclasses.replace(rope, query_beta=0.0)},
        "one_rope": {"rope": rope},
        "no_rope": {"rope": rope},
        "window": {"window": None},
        "window_layers": {"window": 16},
        "attn_scale": {"scale": config.head_dim**-0.5},
        "attn_softcap": {"softcap": None},
    }
    in_model = {
        "embed_scale": {"embed": EmbedShape()},
        "logits_softcap": {"logits": dataclasses.replace(config.logits, softcap=None)},
        "logits_scale": {"logits": dataclasses.replace(config.logits, scale=1.0)},
        "layer_norm": {"norm": dataclasses.replace(config.norm, kind="rms")},
    }
    in_layers = {
        "activation": {"mlp": dataclasses.replace(mlp, activation="silu")},
        "attn_post_norm": {"attn_branch": BranchShape()},
        "mlp_post_norm": {"mlp_branch": BranchShape()},
        "residual_scale": {"attn_branch": BranchShape(), "mlp_branch": BranchShape()},
        "parallel": {"parallel": False},
    }
    in_route = {
        "normalize": {"normalize": False},
        "normalized": {"normalize": True},
        "sigmoid": {"score": "softmax"},
        "chosen": {"score": "softmax", "normalize": False},
        "groups": {"groups": 1, "top_groups": 1},
        "route_scaling": {"scaling": 1.0},
    }
    if feature in in_attention:
        decoder.config = with_attention(config, **in_attention[feature])
    elif feature in in_model:
        decoder.config = dataclasses.replace(config, **in_model[feature])
    elif feature in in_layers:
        decoder.config = _changed_layers(config, **in_layers[feature])
    elif feature in in_route:
        decoder.config = _changed_mixtures(
            config, lambda moe: {"route": dataclasses.replace(moe.route, **in_route[feature])}
        )
    elif feature == "experts":
        decoder.config = _changed_mixtures(config, lambda moe: {"route": dataclasses.replace(moe.route, scaling=0.0)})
    elif feature == "limit":
        decoder.config = _changed_mixtures(config, lambda moe: {"limit": None})
    elif feature == "router_linear_bias":
        for layer in layers:
            layer["router"][0].fields["bias"].zero_()
    elif feature == "expert_bias":
        for layer in layers:
            for expert in range(layer.experts.layout.count):
                layer.experts[expert]["down"][0].fields["bias"].zero_()
    elif feature == "sinks":
        decoder.config = with_attention(config, sinks=False)
    elif feature == "shared":
        decoder.config = _changed_mixtures(config, lambda moe: {"shared": None})
    elif feature == "shared_gate":
        decoder.config = _changed_mixtures(config, lambda moe: {"shared": dataclasses.replace(moe.shared, gated=False)})
    elif feature == "router_bias":
        for layer in layers:
            if "router_bias" in layer.norms:
                layer.norms["router_bias"].zero_()
    elif feature in ("q_norm", "k_norm", "norm_rows"):
        attention = decoder._attention

        def changed(shape, w):
            spec = attention(shape, w)
            if feature != "norm_rows":
                return dataclasses.replace(spec, **{feature: None})
            firsts = (
                dataclasses.replace(norm, weight=norm.weight[: spec.head_dim]) for norm in (spec.q_norm, spec.k_norm)
            )
            return dataclasses.replace(spec, norm_rows=False, **dict(zip(("q_norm", "k_norm"), firsts, strict=True)))

        decoder._attention = changed
    elif feature == "norm_offset":
        for norm in (runner._final_norm, *(norm for layer in layers for norm in layer.norms.values())):
            norm.sub_(1.0)
    else:
        names = {"qkv_bias": ("qkv",), "o_bias": ("o",), "mlp_bias": ("gate_up", "down")}[feature]
        for layer in layers:
            for name in names:
                layer[name][0].fields["bias"].zero_()


@with_both
@pytest.mark.parametrize(
    ("case", "feature"), [(case, f) for case in CASES for f in case.features], ids=lambda value: str(value)
)
def test_every_feature_matters(case, feature, cpu, models, monkeypatch):
    """Without the feature the comparison above fails by a wide margin, so it is not vacuous."""
    model, folder = models(case)
    if feature == "pairs":
        monkeypatch.setattr(Rows, "indices", lambda rows: np.arange(rows.first, rows.first + rows.count))
        engine = _load(folder, cpu)
    else:
        engine = _load(folder, cpu)
        _without(engine, feature)
    assert (all_logits(engine, IDS) - prefill_logits(model, IDS)).abs().max() > 50 * TOLERANCE
