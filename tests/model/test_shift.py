"""Texts beyond the context: against attention written out in f64, alone and in company, in all types of the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import Engine, load_engine
from exl.engine.request import TokenRequest
from exl.errors import ConfigError
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cpu_targets import TARGETS, with_both
from tests.model.cuda_engines import some_ids
from tests.model.hf_models import CASES, build, save

CONTEXT, PROMPT = 256, some_ids(100)
GREEDY = SamplingParams(temperature=0.0, max_tokens=250)
KINDS = ("f16", "q8", "q4")
KEPT, SEEN, STEP = 64, 192, 64  # of 4 pages one stays and one holds its turned copy; of the other two one is dropped


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: name of a case -> (transformers' model, its folder), each built once."""
    built = {}

    def get(name: str):
        if name not in built:
            (case,) = [case for case in CASES if case.name == name]
            model = build(case)
            built[name] = (model, save(model, tmp_path_factory.mktemp(name)))
        return built[name]

    return get


def opened(folder, where, **options) -> Engine:
    options = {"context": CONTEXT, "kv_cache": "f32"} | options
    if where == "shim":
        engine = load_engine(folder, EngineOptions(vram="2GB", **options), backend=make_backend("plain"))
    else:
        engine = load_engine(folder, EngineOptions(device="cpu", **options), cpu=where)
    engine.generator.eos_ids = frozenset()
    return engine


def answers(engine: Engine, requests: list[TokenRequest]) -> list:
    handles = [engine.generator.submit(request, inline=True) for request in requests]
    return [(answer.token_ids, answer.ranked, answer.outcome) for handle in handles for answer in handle.result()]


def asked(prompt=PROMPT, params=GREEDY, keep=4, **options) -> TokenRequest:
    return TokenRequest(prompt, params, top_logprobs=2, shift_keep=keep, **options)


@torch.no_grad()
def written_out(model, ids: list[int], kept: int = KEPT, seen: int = SEEN, step: int = STEP) -> torch.Tensor:
    """Logits f64 [T, V]: row t sees the first ``kept`` tokens as if they stood directly before the others that it sees;
    keys and values are those that each token had when it was computed."""
    model = model.double()
    config, inner = model.config, model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    keys = [[] for _ in inner.layers]
    values = [[] for _ in inner.layers]
    logits = []
    for t, token_id in enumerate(ids):
        dropped = max(0, -(-(t + 1 - seen) // step)) * step
        where = [*range(min(kept, t + 1)), *range(kept + dropped, t + 1)]
        positions = [j + dropped if j < kept and dropped else j for j in where]
        cos, sin = inner.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.tensor([positions]))
        h = inner.embed_tokens(torch.tensor([token_id]))
        for i, layer in enumerate(inner.layers):
            x, attention = layer.input_layernorm(h), layer.self_attn
            q = attention.q_proj(x).view(1, heads, 1, -1)
            keys[i].append(attention.k_proj(x).view(kv_heads, -1))
            values[i].append(attention.v_proj(x).view(kv_heads, -1))
            k, v = (torch.stack([of[i][j] for j in where], 1)[None] for of in (keys, values))
            _, k = apply_rotary_pos_emb(k, k, cos, sin)
            _, q = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            weights = torch.softmax(q @ k.transpose(-1, -2) * attention.scaling, -1)
            h = h + attention.o_proj((weights @ v).reshape(1, -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits.append(model.lm_head(inner.norm(h))[0])
    return torch.stack(logits)


@with_both
@pytest.mark.parametrize(("name", "keep"), [("llama", 4), ("llama-yarn", 64), ("llama-linear", 0)])
def test_rows_see_the_beginning_directly_before_the_rest(name, keep, cpu, models):
    """Three shifts of 64 tokens (of 128 with nothing kept): positions up to 350 in a context of 256."""
    model, folder = models(name)
    engine = opened(folder, cpu)
    ((ids, ranked, outcome),) = answers(engine, [asked(keep=keep)])
    assert (len(ids), outcome.finish_reason, outcome.limit) == (250, "length", "max_tokens")
    sizes = (0, 256, 128) if keep == 0 else (KEPT, SEEN, STEP)
    expected = torch.log_softmax(written_out(model, PROMPT + ids[:-1], *sizes)[len(PROMPT) - 1 :], -1)
    differences = [
        abs(logprob - float(row[token_id]))
        for row, found in zip(expected, ranked, strict=True)
        for token_id, logprob in found
    ]
    assert max(differences) <= 4e-4  # as in test_against_transformers, for logits and their normalization
    unturned = torch.log_softmax(
        written_out(model, PROMPT + ids[:-1], *sizes[:2], 192 - sizes[2])[len(PROMPT) - 1 :], -1
    )
    assert (unturned - expected).abs().max() > 0.05  # what is dropped shows
    engine.close()


@pytest.mark.parametrize("where", TARGETS)
def test_the_same_alone_and_in_company_over_few_pages(where, models):
    """Some are paused after a shift, and computed and shifted again; with drafts; and with what is in the cache."""
    params = [replace(GREEDY, temperature=1.0, seed=i, max_tokens=200) for i in range(3)]
    requests = [
        asked(PROMPT, params[0]),
        asked(some_ids(130, seed=2), params[1], speculate="prompt", draft_tokens=3),
        TokenRequest(some_ids(60, seed=3), replace(params[2], max_tokens=150), top_logprobs=2),
    ]
    engine = opened(models("llama")[1], where, kv_cache="f16", cache_tokens=CONTEXT + 128, prefill_chunk=32)
    alone = [answers(engine, [replace(request, speculate=None, draft_tokens=None)])[0] for request in requests]
    again = opened(models("llama")[1], where, kv_cache="f16", cache_tokens=CONTEXT + 128, prefill_chunk=32)
    assert answers(again, requests) == alone
    assert again.generator.stats().preemptions > 0
    assert answers(again, requests) == alone
    pool = again.generator.pool
    assert pool.num_free == pool.num_usable
    engine.close()
    again.close()


@pytest.mark.parametrize(
    ("where", "kv_cache"),
    [
        *(pytest.param(*t.values, kind, id=f"{t.id}-{kind}", marks=t.marks) for t in TARGETS for kind in KINDS),
        pytest.param("shim", "q8", id="shim-q8"),
    ],
)
def test_other_types_of_cache_stay_near_to_f32(where, kv_cache, models):
    """The first tokens after a shift, with what the cache's type rounds (tests/unit/ops/test_turned_keys.py: keys)."""
    model, folder = models("llama")
    ids = some_ids(191)
    engine = opened(folder, where, kv_cache=kv_cache)
    ((more, ranked, _),) = answers(engine, [asked(ids, replace(GREEDY, max_tokens=8))])
    expected = torch.log_softmax(written_out(model, ids + more[:-1])[len(ids) - 1 :], -1)
    before = abs(ranked[0][0][1] - float(expected[0][more[0]]))
    after = max(abs(found[0][1] - float(row[found[0][0]])) for row, found in zip(expected, ranked, strict=True))
    assert after <= {"f16": 0.005, "q8": 0.1, "q4": 0.5}[kv_cache]
    assert before <= after
    engine.close()


def test_what_cannot_be_shifted_is_refused_by_name(models):
    (torchs,) = [target for target in TARGETS if target.id == "torch"]
    engine = opened(models("llama-dynamic")[1], torchs.values[0])
    with pytest.raises(ConfigError, match=r"^overflow: found 'shift' with RoPE of the kind 'dynamic'"):
        answers(engine, [asked()])
    engine = opened(models("mistral")[1], torchs.values[0])
    with pytest.raises(ConfigError, match=r"^overflow: found 'shift', but all layers of this model have a sliding win"):
        answers(engine, [asked()])
    engine = opened(models("llama")[1], torchs.values[0])
    with pytest.raises(ConfigError, match=r"^shift_keep: found 65, expected at most 64 for a context of 256"):
        answers(engine, [asked(keep=65)])
    with pytest.raises(
        ConfigError, match=r"^prompt: found 193 tokens; with overflow='shift' and shift_keep=4 a context "
    ):
        answers(engine, [asked(some_ids(193))])
    engine = opened(models("llama")[1], torchs.values[0], context=127)
    with pytest.raises(ConfigError, match=r"^overflow: found 'shift' with a context of 127, expected 128 or more"):
        answers(engine, [asked(PROMPT[:9], keep=0)])


def test_options_of_a_request():
    with exl.load(device="cpu", context=128) as llm:
        options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 200}
        stopped = llm.generate("Once upon a time", **options)
        assert (stopped.finish_reason, stopped.limit) == ("length", "context")
        shifted = llm.generate("Once upon a time", **options, overflow="shift", shift_keep=0)
        assert (shifted.finish_reason, shifted.limit, shifted.num_tokens) == ("length", "max_tokens", 200)
        assert shifted.token_ids[: len(stopped.token_ids)] == stopped.token_ids
        drafts = {"speculate": "prompt", "draft_tokens": 3}
        drafted = llm.generate("Once upon a time", **options, overflow="shift", shift_keep=0, **drafts)
        assert drafted.token_ids == shifted.token_ids
        assert drafted.num_drafted > 0
        for wrong, message in (
            ({"overflow": "drop"}, "overflow: found 'drop', expected 'stop' or 'shift'"),
            ({"overflow": "shift", "shift_keep": -1}, "shift_keep: found -1, expected a number of tokens, 0 or more"),
            (
                {"overflow": "shift", "num_beams": 2},
                "num_beams: found 2 with overflow='shift', expected one",
            ),
            ({"overflow": "shift", "guidance_scale": 2.0}, "guidance_scale: found 2.0 with overflow='shift'"),
            ({"shift_keep": 4}, "shift_keep: found 4 without overflow='shift', expected both"),
            ({"overflow": "shift", "speculate": "draft"}, "speculate: found 'draft' with overflow='shift'"),
        ):
            with pytest.raises(ConfigError, match=message):
                llm.generate("Once", 3, **wrong)
    with exl.load(device="cpu", context=128, draft=BUNDLED_MODEL) as llm:  # which is not used where it cannot keep up
        found = llm.generate("Once upon a time", **options, overflow="shift", shift_keep=0)
        assert (found.token_ids, found.num_drafted) == (shifted.token_ids, 0)
