"""LoRA adapters beside the weights against transformers with the same adapter merged into them in f64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import exl
from exl.engine import admission
from exl.engine.build import Engine, load_engine
from exl.engine.cache_files import load_cache, save_cache
from exl.engine.compose import Piece, batch_of
from exl.engine.manual import ManualSequence
from exl.engine.request import TokenRequest
from exl.engine.ticket import Answer, Ticket
from exl.errors import ConfigError, UnsupportedModelError
from exl.ops.cpu_target import COMPILED, torch_target
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.model.cpu_targets import needs_kernels, with_both
from tests.model.cuda_engines import some_ids
from tests.model.hf_models import CASES, Case, build, decode_logits, prefill_logits, save
from tests.model.test_quantized import make as make_quantized
from tests.reference.adapter_twin import make

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
TRAINED = Path(__file__).parents[1] / "data" / "adapter"
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
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
    "cohere2": ALL,
    "olmo2": ALL,  # no norm before its blocks
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
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


def test_experts_are_refused_by_name(models, tmp_path):
    _, folder, adapter, _ = models("mixtral")
    expert = "model.layers.1.block_sparse_moe.experts.3.w1"
    adapter = replace(adapter, tensors={**adapter.tensors, expert: (torch.ones(4, 64), torch.ones(96, 4))})
    message = rf"{expert}\.lora_A\.weight': found a change to a module of some/base that is none of those .* layers: "
    with pytest.raises(UnsupportedModelError, match=message + r"self_attn\.k_proj, .*self_attn\.v_proj$"):
        load(folder, torch_target(), lora={"a": adapter.save(tmp_path)})


# --- quantized weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["none", "shared"])
@with_both
def test_beside_quantized_weights(cpu, order, tmp_path):
    """The weights keep their codes; what is added is added to what they mean."""
    model = make_quantized(tmp_path / "model", 4, 32, order=order)
    adapter = make(model, ALL, ranks={"q_proj": 3, "layers.1.mlp.down_proj": 17}, alphas={"v_proj": 2.0}, rslora=True)
    merged = adapter.merged(model)
    engine = load(
        tmp_path / "model",
        cpu,
        lora={"a": adapter.save(tmp_path / "a")},
        **({"arithmetic": "f32"} if cpu.compiled else {}),
    )
    expected = prefill_logits(merged, IDS)
    assert (expected - prefill_logits(model, IDS)).abs().max() > 500 * TOLERANCE
    assert (all_logits(engine, "a") - expected).abs().max() <= TOLERANCE
    if cpu.compiled:  # torch multiplies decode rows in bf16
        difference = (token_by_token(engine, "a") - decode_logits(merged, IDS, NUM_PROMPT)).abs().max()
        assert difference <= TOLERANCE


@with_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_adapters_keep_the_files_type(dtype, cpu, models, tmp_path):
    model, folder, _, _ = models("llama")
    adapter = make(model, ["q_proj", "down_proj"], layers=[0, 2])
    rounded = {name: (a.to(dtype).float(), b.to(dtype).float()) for name, (a, b) in adapter.tensors.items()}
    engine = load(folder, cpu, lora={"a": adapter.save(tmp_path, dtype)})
    assert {lora.A.fields["weight"].dtype for lora in engine.adapters.loras[2]["qkv"][0]} == {dtype}
    assert engine.adapters.loras[1] == {}
    adapter.tensors = rounded
    assert (all_logits(engine, "a") - prefill_logits(adapter.merged(model), IDS)).abs().max() <= TOLERANCE


@with_both
def test_an_adapter_that_peft_trained_and_peft_computed(cpu):
    """``scripts/write_adapter.py``: the logits are peft's own, with the adapter beside the weights."""
    expected = load_file(TRAINED / "expected.safetensors")
    engine = load(STORIES, cpu, lora={"a": TRAINED})
    found = torch.cat([chunk.clone() for chunk in engine.generator.logits(expected["ids"].tolist(), "a")])
    plain = torch.cat([chunk.clone() for chunk in engine.generator.logits(expected["ids"].tolist())])
    assert (plain - expected["logits"]).abs().max() > 1.0
    assert (found - expected["logits"]).abs().max() <= TOLERANCE


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A quantized model with a norm before each linear, and three adapters of other ranks and modules."""
    folder = tmp_path_factory.mktemp("several")
    model = make_quantized(folder / "model", 4, 32)
    adapters = {
        "a": make(model, ALL, r=4, seed=1),
        "b": make(model, ["q_proj", "v_proj"], r=16, seed=2),
        "c": make(model, ["o_proj", "up_proj", "down_proj"], r=3, seed=3),
    }
    return folder / "model", {name: adapter.save(folder / name) for name, adapter in adapters.items()}


COMPANY = (None, "a", "c", "a", None, "b")


def _rows(engine: Engine) -> list[Piece]:
    """A decode row of each sequence of ``COMPANY``, whose prompts are in the cache."""
    generator, rows = engine.generator, []
    for i, lora in enumerate(COMPANY):
        ids = some_ids(9 + 3 * i, seed=20 + i)
        sequence = ManualSequence(generator.pool.allocate(1), lora=generator.adapter_number(lora))
        generator.extend(sequence, ids[:-1])
        sequence.ids.append(ids[-1])
        rows.append(sequence.row())
    return rows


def _steps(engine: Engine, rows: list[Piece]) -> torch.Tensor:
    """The step's logits, four times: by the last one it was recorded, if it can be."""
    found = [engine.generator.runner.step(batch_of(rows), []).clone() for _ in range(4)]
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0]


@with_both
def test_a_row_has_its_bits_in_any_company(cpu, several):
    folder, adapters = several
    engine = load(folder, cpu, lora=adapters, cache_tokens=1024)
    rows = _rows(engine)
    together = _steps(engine, rows)
    for i, row in enumerate(rows):
        assert torch.equal(_steps(engine, [row])[0], together[i]), COMPANY[i]
    backwards = _steps(engine, rows[::-1])
    assert torch.equal(backwards.flip(0), together)
    alone = load(folder, cpu, lora={"c": adapters["c"]}, cache_tokens=1024)  # another number, other neighbours
    generator = alone.generator
    sequence = ManualSequence(generator.pool.allocate(1), lora=0)
    generator.extend(sequence, rows[2].sequence.ids[:-1])
    sequence.ids.append(rows[2].sequence.ids[-1])
    assert torch.equal(_steps(alone, [sequence.row()])[0], together[2])


@with_both
def test_a_row_without_an_adapter_has_the_bits_of_a_model_without_any(cpu, several):
    folder, adapters = several
    engine, plain = load(folder, cpu, lora=adapters, cache_tokens=1024), load(folder, cpu, cache_tokens=1024)
    together = _steps(engine, _rows(engine))
    generator = plain.generator
    for i in (0, 4):
        ids = some_ids(9 + 3 * i, seed=20 + i)
        sequence = ManualSequence(generator.pool.allocate(1))
        generator.extend(sequence, ids[:-1])
        sequence.ids.append(ids[-1])
        assert torch.equal(_steps(plain, [sequence.row()])[0], together[i])
    assert torch.equal(all_logits(engine, None), all_logits(plain, None))


@pytest.mark.parametrize("hidden", [72, 88])
def test_rows_that_begin_anywhere_in_memory(hidden, tmp_path):
    """Torch's products of a vector depend on where it begins: rows of 72 numbers begin at other places alone."""
    case = Case("llama-odd", "llama", {"hidden_size": hidden, "head_dim": 18, "intermediate_size": 104})
    model = build(case)
    adapters = {name: make(model, ALL, r=r, seed=r).save(tmp_path / name) for name, r in (("a", 3), ("b", 5), ("c", 7))}
    engine = load(save(model, tmp_path / "model"), torch_target(), lora=adapters, cache_tokens=1024)
    rows = _rows(engine)
    together = _steps(engine, rows)
    for i, row in enumerate(rows):
        assert torch.equal(_steps(engine, [row])[0], together[i]), COMPANY[i]


@needs_kernels
def test_steps_with_adapters_repeat_no_chunk(several, monkeypatch):
    """They add in place, so a chunk that a late thread does once more would add twice."""
    from exl.ops.compiled_ops import CompiledOps

    folder, adapters = several
    engine = load(folder, COMPILED, lora=adapters, cache_tokens=1024)
    recorded, record = [], CompiledOps._record

    def spy(ops, step, arena=None):
        found = record(ops, step, arena)
        recorded.append((ops._now.batch.lora_runs != (), found.program.repeats))
        return found

    monkeypatch.setattr(CompiledOps, "_record", spy)
    rows = _rows(engine)
    for some in (rows[:2], rows[:1]):
        for _ in range(3):
            engine.generator.runner.step(batch_of(some), [])
    assert set(recorded) == {(True, False), (False, True)}


def test_equal_prompts_of_two_adapters_do_not_wait_for_each_other(several):
    """Neither will find what the other computes."""
    folder, adapters = several
    ids = some_ids(100, seed=5)
    for loras, num_running in ((("a", "b", None), 3), (("a", "a", "a"), 1)):
        generator = load(folder, torch_target(), lora=adapters, cache_tokens=1024, prefill_chunk=64).generator
        for lora in loras:
            request = TokenRequest(ids, GREEDY, lora=lora)
            generator.scheduler.submit(Ticket(request, [Answer(0, 1)], None, generator.adapter_number(lora)))
        generator.scheduler.step()
        assert len(generator.scheduler.running) == num_running


@with_both
def test_requests_of_several_adapters_at_once(cpu, several):
    """Each answer is that of the request alone, and adapters answer differently."""
    folder, adapters = several
    prompts = [some_ids(5 + 7 * i, seed=i) for i in range(len(COMPANY))]

    def requests():
        return [TokenRequest(ids, GREEDY, lora=lora) for ids, lora in zip(prompts, COMPANY, strict=True)]

    engine = load(folder, cpu, lora=adapters, cache_tokens=1024)
    handles = [engine.generator.submit(request) for request in requests()]
    together = [handle.result()[0].token_ids for handle in handles]
    for request, found in zip(requests(), together, strict=True):
        fresh = load(folder, cpu, lora=adapters)
        assert fresh.generator.submit(request).result()[0].token_ids == found
    plain = [engine.generator.submit(TokenRequest(ids, GREEDY)).result()[0].token_ids for ids in prompts]
    assert [i for i in range(len(COMPANY)) if plain[i] == together[i]] == [0, 4]


# --- what the cache knows --------------------------------------------------------------------------------------------


def _answers(engine: Engine, loras) -> list[tuple[list[int], int]]:
    ids = some_ids(80, seed=5)
    answers = [engine.generator.submit(TokenRequest(ids, GREEDY, lora=lora)).result()[0] for lora in loras]
    return [(answer.token_ids, answer.num_reused) for answer in answers]


def test_a_prefix_is_never_found_under_another_adapter(several, monkeypatch):
    folder, adapters = several
    cpu = torch_target()
    cold = {lora: _answers(load(folder, cpu, lora=adapters), [lora])[0][0] for lora in (None, "a", "b")}
    order = ("a", "b", None, "a", "b", None)
    engine = load(folder, cpu, lora=adapters, cache_tokens=1024, prefill_chunk=64)
    found = _answers(engine, order)
    assert [ids for ids, _ in found] == [cold[lora] for lora in order]
    assert [reused for _, reused in found] == [0, 0, 0, 64, 64, 64]
    engine.generator.pool.check([])
    monkeypatch.setattr(admission, "_SALT", 0)  # without the adapter in the key
    found = _answers(load(folder, cpu, lora=adapters, cache_tokens=1024, prefill_chunk=64), order)
    assert [ids for ids, _ in found] != [cold[lora] for lora in order]


def test_a_saved_cache_is_for_the_adapters_that_made_it(several, tmp_path):
    folder, adapters = several
    options = {"lora": adapters, "cache_tokens": 1024, "prefill_chunk": 64}
    order = ("a", None, "b")
    engine = load(folder, torch_target(), **options)
    expected = _answers(engine, order[:2])
    save_cache(engine, folder, tmp_path / "kept")
    other = load(folder, torch_target(), **options)
    assert load_cache(other, folder, tmp_path / "kept") >= 160
    found = _answers(other, order)
    assert [ids for ids, _ in found[:2]] == [ids for ids, _ in expected]
    assert [reused for _, reused in found] == [64, 64, 0]
    for changed in ({}, {"b": adapters["b"], "a": adapters["a"], "c": adapters["c"]}):
        other = load(folder, torch_target(), **options | {"lora": changed})
        with pytest.raises(ConfigError, match="'adapters': found"):
            load_cache(other, folder, tmp_path / "kept")


# --- the plan --------------------------------------------------------------------------------------------------------


@with_both
def test_the_plan_counts_adapters_exactly(cpu, several):
    folder, adapters = several
    engine, plain = load(folder, cpu, lora=adapters), load(folder, cpu)
    (line,) = [line for line in engine.plan.lines if line.purpose == "adapters"]
    assert line.exact
    assert line.note == "a, b, c"
    assert line.num_bytes == engine.adapters.num_bytes
    tensors = {name: load_file(path / "adapter_model.safetensors") for name, path in adapters.items()}
    least = sum(tensor.nbytes for some in tensors.values() for tensor in some.values())
    assert least <= line.num_bytes <= least + 64 * sum(map(len, tensors.values())) + 3 * 4096
    others = {line.purpose: line.num_bytes for line in plain.plan.lines}
    more = {line.purpose for line in engine.plan.lines if line.num_bytes != others.get(line.purpose, 0)}
    assert more <= {"adapters", "scratch of operations", "loading"}


@with_both
def test_adapters_stay_where_layers_are_streamed(cpu, several, tmp_path):
    folder, adapters = several
    resident = load(folder, cpu, lora=adapters)
    streamed = load(folder, cpu, lora=adapters, resident_layers=0, packed_folder=tmp_path)
    assert streamed.plan.placement.num_streamed == 2
    for lora in (None, "a", "c"):
        assert torch.equal(all_logits(streamed, lora), all_logits(resident, lora))
        assert torch.equal(token_by_token(streamed, lora), token_by_token(resident, lora))
    streamed.close()


# --- what people call ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    with exl.load(STORIES, "cpu", lora=TRAINED, context=256) as llm:
        yield llm


def test_one_folder_is_for_all_requests(stories):
    with exl.load(STORIES, "cpu", context=256) as plain, exl.load(STORIES, "cpu", lora=[TRAINED], context=256) as named:
        assert stories.adapters == named.adapters == ("adapter",)
        text = "Once upon a time"
        with_it, without = stories.generate(text, 12).text, plain.generate(text, 12).text
        assert with_it != without
        assert stories.generate(text, 12, lora=False).text == without
        assert stories.generate(text, 12, lora="adapter").text == with_it
        assert named.generate(text, 12).text == without
        assert named.generate(text, 12, lora="adapter").text == with_it
        ids = plain.encode(text)
        assert torch.equal(stories.logits(ids, lora=False), plain.logits(ids))
        assert not torch.equal(stories.logits(ids), plain.logits(ids))
        assert torch.equal(named.embed(text, lora="adapter"), stories.embed(text))
        assert not torch.equal(named.embed(text), stories.embed(text))
        assert torch.equal(named.submit_embed(text, lora="adapter").result(), stories.embed(text)[0])
        _scores_are_the_adapters(stories, named, plain)
        chat, other = named.chat(lora="adapter"), stories.chat()
        assert chat.send("Tell a story.", 12).text == other.send("Tell a story.", 12).text
        assert chat.retry(12, lora=False).text == plain.chat().send("Tell a story.", 12).text
        with pytest.raises(ConfigError, match="lora: found 'poems', the model has none: it was loaded without lora="):
            plain.generate(text, lora="poems")
        with pytest.raises(ConfigError, match="lora: found 'poems', the model has 'adapter'"):
            named.chat(lora="poems")
        with pytest.raises(ConfigError, match="lora: found 3, expected the name of an adapter, or False"):
            named.generate(text, lora=3)


def _scores_are_the_adapters(stories: exl.LLM, named: exl.LLM, plain: exl.LLM) -> None:
    ids = plain.encode("Once upon a time there was a dog.")
    pair = (ids[:5], ids[5:])
    expected = torch.log_softmax(stories.logits(ids[:-1]).double(), -1)[4:].gather(1, torch.tensor(ids[5:])[:, None])
    (found,), (of_model,) = stories.score([pair]), plain.score([pair])
    assert found.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-3)
    assert abs(found.total - of_model.total) > 0.1
    assert stories.score([pair], lora=False)[0].logprobs == named.score([pair])[0].logprobs == of_model.logprobs
    assert stories.submit_score(*pair).result().logprobs == found.logprobs
    assert named.submit_score(*pair, lora="adapter").result().logprobs == found.logprobs
    assert stories.identity() != named.identity()  # whose predictions differ where no adapter is named
    with pytest.raises(ConfigError, match="lora: found 'poems', the model has 'adapter'"):
        named.score([pair], lora="poems")


def test_every_kind_of_request_goes_through_the_adapter(stories):
    """Beams, several answers, guidance, drafts and log-probabilities: as of the model that has the adapter merged."""
    text = "Once upon a time"
    plain = stories.generate(text, 16).text
    assert stories.generate(text, 16, speculate="prompt").text == plain
    one = stories.generate(text, 8, n=2, top_logprobs=0, prompt_logprobs=0)
    ids = [*stories.encode(text), *one.token_ids]
    expected = torch.log_softmax(stories.logits(ids).double(), -1)
    start = len(ids) - len(one.token_ids)
    for i, found in enumerate(one.logprobs):
        assert found.logprob == pytest.approx(float(expected[start + i - 1, one.token_ids[i]]), abs=1e-3)
    for i in range(1, start):
        assert one.prompt_logprobs[i].logprob == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-3)
    assert stories.generate(text, 8, num_beams=3).text != stories.generate(text, 8, num_beams=3, lora=False).text
    guided = stories.generate(text, 8, guidance_scale=3.0, negative_prompt="The")
    assert guided.text != stories.generate(text, 8, guidance_scale=3.0, negative_prompt="The", lora=False).text
    assert guided.text == stories.generate(text, 8, guidance_scale=3.0, negative_prompt="The", lora="adapter").text
