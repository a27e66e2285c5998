"""Whole models through the CUDA kernels on the host shim: against transformers and torch; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import load_engine
from exl.errors import KernelError, UnsupportedModelError
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, Target
from exl.memory.host import HostBuffer
from exl.models import decoder
from exl.ops.base import AttentionSpec, Branch, LogitsSpec, Norm
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from exl.text.tokenizer import Tokenizer
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend
from tests.model.batches import batch_of, run
from tests.model.cuda_engines import (
    DENSE,
    GREEDY,
    PROMPT,
    STORIES,
    all_logits,
    bound,
    load,
    some_ids,
    step_logits,
    tokens,
)
from tests.model.hf_models import decode_logits, prefill_logits
from tests.model.test_published_story import PUBLISHED
from tests.model.test_quantized import make

# ---- the same model as elsewhere ------------------------------------------------------------------------------------


def test_stories_word_for_word_as_through_torch(backend):
    """64 greedy tokens with an f16 cache: the prompt by prefill kernels, each token by decode kernels."""
    ours = load(STORIES, backend)
    torchs = load_engine(STORIES, EngineOptions(device="cpu", context=128))
    assert tokens(ours) == tokens(torchs)
    expected = all_logits(torchs, PROMPT)
    assert (all_logits(ours, PROMPT) - expected).abs().max() < bound(expected, 4)


def test_the_published_story_through_the_kernels(backend):
    """Dense stories260K: head size 8, 172 inner channels. 100 of the 256 published tokens."""
    engine = load(DENSE, backend)
    tokenizer = Tokenizer.from_folder(DENSE)
    story = [token.token_id for token in engine.generator.stream([1], replace(GREEDY, max_tokens=100))]
    assert PUBLISHED.startswith(tokenizer.decode(story).strip())


def test_the_bundled_story_as_through_torch(backend):
    """4 bits in groups of 32. Without torch's 4-bit kernel, which rounds to bf16: both sides use f32 weights."""
    prompt = Tokenizer.from_folder(BUNDLED_MODEL, bos_id=1).encode("Once upon a time")
    params = replace(GREEDY, max_tokens=80)
    found = [token.token_id for token in load(BUNDLED_MODEL, backend).generator.stream(prompt, params)]
    torchs = load_engine(BUNDLED_MODEL, EngineOptions(device="cpu", context=128), cpu=Target("cpu"))
    assert found == [token.token_id for token in torchs.generator.stream(prompt, params)]


@pytest.mark.parametrize(
    ("bits", "group_size", "options"),
    [
        (4, 32, {}),
        (4, -1, {"order": "own"}),
        (4, 32, {"order": "shared", "sym": True}),
        (8, 32, {"order": "own", "checkpoint_format": "gptq_v2"}),
        (3, 32, {"order": "shared"}),
        (2, 32, {}),
        (4, 32, {"order": "shared", "dynamic": {r"+:.*\.down_proj": {"bits": 8}}}),
        (4, 64, {"order": "shared", "scales_as": torch.bfloat16}),  # down_proj has 96 inputs: a shorter last group
        (3, 64, {"scales_as": torch.float32}),
    ],
)
def test_gptq_against_transformers(backend, tmp_path, bits, group_size, options):
    """Every width; act-order that q, k and v share, and act-order that prevents fusion; scales of every type; a shorter
    last group. By prefill, and token by token."""
    model = make(tmp_path, bits, group_size, **options)
    ids, engine = some_ids(21), load(tmp_path, backend)
    expected = prefill_logits(model, ids)
    assert (all_logits(engine, ids) - expected).abs().max() < bound(expected, 2)
    expected = decode_logits(model, ids, 1)
    assert (step_logits(engine, ids) - expected).abs().max() < bound(expected, 2)


@pytest.mark.parametrize("arch", [61, 75, 90])
def test_other_architectures(folder_and_model, arch):
    """Without tensor cores, without asynchronous copies, with dependent launches."""
    folder, model = folder_and_model
    ids, engine = some_ids(13), load(folder, make_backend("plain", arch))
    expected = prefill_logits(model, ids)
    assert (all_logits(engine, ids) - expected).abs().max() < bound(expected, 2)
    assert (step_logits(engine, ids) - decode_logits(model, ids, 1)).abs().max() < bound(expected, 2)


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_a_whole_pass_under_the_sanitizers(folder_and_model, mode):
    """Prefill, dependent decode steps and sampling. Memory is also checked across launches: a read before
    griddepcontrol_wait of memory that an earlier launch of the chain writes is reported."""
    folder, _ = folder_and_model
    engine = load(folder, make_backend(mode, 90), kv_cache="q8")
    params = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=5)
    assert len(tokens(engine, params)) == 5


@pytest.mark.parametrize("kind", ["q8", "k8v4", "q4"])
@pytest.mark.parametrize("name", ["random", "stories"])
def test_quantized_caches_as_torch_has_them(backend, plain_folder, name, kind):
    """Both sides quantize by the same rules, but here the values are rounded to f16 three times before, each time by
    2^-12 of a group's largest value. A code therefore changes with a probability of that error over the step (1/127 or
    1/7 of the largest value). A changed code is off by a whole step, while quantizing itself loses step / sqrt(12) on
    average: the changes add sqrt(12 * probability) of the loss that the type has against f32."""
    ids, folder = some_ids(90), plain_folder if name == "random" else STORIES
    ours = all_logits(load(folder, backend, kv_cache=kind), ids)
    torchs = all_logits(load_engine(folder, EngineOptions(device="cpu", context=128, kv_cache=kind)), ids)
    exact = all_logits(load_engine(folder, EngineOptions(device="cpu", context=128, kv_cache="f32")), ids)
    rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
    levels = {"q8": 127, "k8v4": 127, "q4": 7}[kind]
    changed = (12 * 3 * 2.0**-12 * levels) ** 0.5 * rms(torchs - exact)
    assert rms(ours - torchs) < changed


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused_before_any_launch(backend, folder):
    recorder = RecordingBackend(backend)
    runner = load(folder, recorder, max_sequences=1).generator.runner
    good = batch_of([([5], 70, [0, 1])], decode=True)
    array = lambda *values: np.asarray(values, np.int32)  # noqa: E731
    for changes, words in (
        ({"page_table": array([0, 2])}, "sequence 0 has page 2: expected 0 to 1"),
        ({"context_len": array(129)}, "has a context of 129"),
        ({"slots": array(128)}, "slot 128 of token 70"),
        ({"slots": array(128), "num_decode_rows": 0}, "slot 128 at row 0"),
        ({"query_start": array(0, 2)}, "sequences own rows 0 to 2: expected 0 to 1 or fewer"),
        ({"slots": array(7)}, "slot 7 of token 70"),
        ({"token_ids": array(96)}, "token id 96 at row 0"),
        ({"page_table": array([0, 1, 1])}, "3 pages of a sequence"),
    ):
        with pytest.raises(KernelError, match=words):
            run(runner, replace(good, **changes))
    with pytest.raises(KernelError, match="2 sequences that decode"):
        run(runner, batch_of([([5], 0, [0]), ([6], 0, [1])], decode=True))
    with pytest.raises(KernelError, match="they end inside of one"):
        run(runner, replace(batch_of([([5, 6, 7], 0, [0])]), num_decode_rows=2))
    assert recorder.launches == []


def test_scaled_branches_and_capped_logits_as_through_torch(backend, monkeypatch):
    def logits(engine):
        return all_logits(engine, PROMPT), step_logits(engine, PROMPT)

    plain = logits(load(STORIES, backend))
    monkeypatch.setattr(decoder, "Branch", lambda *described: Branch(scale=0.3))
    monkeypatch.setattr(decoder, "LogitsSpec", lambda *described: LogitsSpec(softcap=4.0, scale=0.5))
    expected = all_logits(load_engine(STORIES, EngineOptions(device="cpu", context=128)), PROMPT)
    for found, before in zip(logits(load(STORIES, backend)), plain, strict=True):
        assert (found - expected).abs().max() < bound(expected, 4)
        assert (before - expected).abs().max() > 50 * bound(expected, 4)


def test_attention_of_other_epsilons_is_named(backend, monkeypatch):
    weight = torch.ones(load(STORIES, backend).config.head_dim)
    norms = {"q_norm": Norm(weight, 1e-5), "k_norm": Norm(weight, 1e-6)}
    monkeypatch.setattr(decoder, "AttentionSpec", lambda **values: AttentionSpec(**values | norms))
    with pytest.raises(UnsupportedModelError, match=r"norms of q and k: found epsilons 1e-05 and 1e-06"):
        all_logits(load(STORIES, backend), PROMPT)


def test_act_order_behind_dense_gate_and_up_is_named():
    dense = tuple(MatrixSpec(name, 64, 96, 16, "f16") for name in ("gate", "up"))
    down = MatrixSpec("down", 96, 64, 4, "u8", 32, order_key="x")
    spec = BlobSpec((), (("gate_up", (LinearSpec(dense, gated=True),)), ("down", (LinearSpec((down,)),))))
    with pytest.raises(UnsupportedModelError, match="down: found act-order behind a dense gate"):
        layer_layout(spec, Target("cuda", arch=86))


def test_dense_layers_need_tensor_cores():
    spec = BlobSpec((), (("o", (LinearSpec((MatrixSpec("o_proj", 64, 64, 16, "f16"),)),)),))
    with pytest.raises(UnsupportedModelError, match=r"o_proj: found dense weights, compute capability 6\.1"):
        layer_layout(spec, Target("cuda", arch=61))


def test_pinned_tables_are_what_the_plan_says(backend, four_bit, monkeypatch):
    from exl.ops import cuda_batch, cuda_sampling

    made = []

    class Counted(HostBuffer):
        def __init__(self, num_bytes, purpose):
            super().__init__(num_bytes, purpose)
            made.append(num_bytes)

    monkeypatch.setattr(cuda_batch, "HostBuffer", Counted)
    monkeypatch.setattr(cuda_sampling, "HostBuffer", Counted)
    plan = load(four_bit, backend, max_sequences=3).plan
    assert [line.num_bytes for line in plan.lines if line.purpose == "pinned tables"] == [sum(made)]
