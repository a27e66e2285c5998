"""Whole models through the CUDA kernels, on the host shim: against transformers, torch and themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import exl.engine
from exl import weight_memory
from exl.device_stream import HostCopyEngine
from exl.engine import Engine, load_engine
from exl.errors import KernelError, UnsupportedModelError
from exl.host_memory import HostBuffer
from exl.hub import BUNDLED_MODEL
from exl.layout import BlobSpec, LinearSpec, MatrixSpec, Target, layer_layout
from exl.memory import Tier
from exl.planning import EngineOptions
from exl.sampling import SamplingParams, sample, sampling_batch
from exl.tokenizer import Tokenizer
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend, TorchCalls, on_device
from tests.model.batches import batch_of, run
from tests.model.hf_models import decode_logits, prefill_logits
from tests.model.test_memory_plan import live_bytes
from tests.model.test_published_story import PUBLISHED
from tests.model.test_quantized import make

DENSE = Path(__file__).parents[1] / "data" / "stories260K"
STORIES = Path(__file__).parents[1] / "data" / "stories2M"
PROMPT = [1, 403, 407, 261, 378, 100, 50, 60, 70, 80, 90, 101]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@pytest.fixture(scope="module", params=["plain", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    return make_backend(request.param)


@pytest.fixture
def recorder(monkeypatch):
    """Copies of streamed layers are recorded, too: while a graph is captured they do not happen."""
    recorder = RecordingBackend(make_backend("plain"))

    class Copies(HostCopyEngine):
        def copy(self, dst, src, after):
            recorder.do(lambda: (recorder.copies.append(dst.data_ptr()), dst.copy_(src)))
            return self._Done()

    monkeypatch.setattr(weight_memory, "HostCopyEngine", Copies)
    return recorder


@pytest.fixture(scope="module")
def folder_and_model(tmp_path_factory):
    """4 bits, every linear with an order of its own; and transformers' twin."""
    path = tmp_path_factory.mktemp("own-order")
    return path, make(path, 4, 32, order="own")


@pytest.fixture(scope="module")
def folder(folder_and_model):
    return folder_and_model[0]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """4 bits without act-order."""
    path = tmp_path_factory.mktemp("no-order")
    make(path, 4, 32)
    return path


def load(folder: Path, backend, **options) -> Engine:
    return load_engine(folder, EngineOptions(**{"context": 128, "vram": "2GB"} | options), backend=backend)


def all_logits(engine: Engine, ids) -> torch.Tensor:
    return torch.cat([chunk.to("cpu", copy=True) for chunk in engine.generator.logits(ids)])


def step_logits(engine: Engine, ids) -> torch.Tensor:
    """Token by token, through the decode kernels."""
    sequence = engine.generator.begin(len(ids))
    rows = [engine.generator.extend(sequence, [token]).to("cpu", copy=True) for token in ids]
    engine.generator.end(sequence)
    return torch.cat(rows)


def tokens(engine: Engine, params: SamplingParams = GREEDY) -> list[int]:
    prompt = [token_id % engine.config.vocab_size for token_id in PROMPT]
    engine.generator.eos_ids = frozenset()
    return [token.token_id for token in engine.generator.stream(prompt, params)]


def some_ids(count: int, seed: int = 9) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def bound(expected: torch.Tensor, num_layers: int) -> float:
    """Activations are rounded to f16 where the other side has f32: normalised input, qkv, q and k or v in their pages,
    the attention's output, normalised input again and the MLP's output, seven a layer and one before the head, each by
    2^-12 of the largest value at most. Roundings are of both signs and spread over many channels; that no more than
    twice their plain sum arrives is what these models show."""
    return 2 * (7 * num_layers + 1) * 2.0**-12 * float(expected.abs().max())


# ---- the same model as elsewhere ------------------------------------------------------------------------------------


def test_stories_word_for_word_as_through_torch(backend):
    """64 greedy tokens with an f16 cache, prompt by prefill and each token by decode kernels."""
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


def test_the_bundled_story_as_through_torch(backend, monkeypatch):
    """4 bits in groups of 32. torch's own 4-bit kernel rounds to bf16: both sides multiply what codes mean in f32."""
    monkeypatch.setattr(exl.engine, "cpu_target", lambda: Target("cpu"))
    prompt = Tokenizer.from_folder(BUNDLED_MODEL, bos_id=1).encode("Once upon a time")
    params = replace(GREEDY, max_tokens=80)
    found = [token.token_id for token in load(BUNDLED_MODEL, backend).generator.stream(prompt, params)]
    torchs = load_engine(BUNDLED_MODEL, EngineOptions(device="cpu", context=128)).generator.stream(prompt, params)
    assert found == [token.token_id for token in torchs]


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
    ],
)
def test_gptq_against_transformers(backend, tmp_path, bits, group_size, options):
    """Every width, with act-order that q, k and v share and that nothing can fuse: prefill, and token by token."""
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
    """Prefill, decode steps that start before their predecessors have ended, sampling: memory between launches is
    watched, too. Reads before griddepcontrol_wait of what an earlier launch of the chain writes are reported."""
    folder, _ = folder_and_model
    engine = load(folder, make_backend(mode, 90), kv_cache="q8")
    params = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=5)
    assert len(tokens(engine, params)) == 5


@pytest.mark.parametrize("kind", ["q8", "k8v4", "q4"])
def test_quantized_caches_as_torch_has_them(backend, plain_folder, kind):
    """Codes and scales mean the same on both sides, but what they are made of is rounded to f16 here: three times on
    its way, each by 2^-12 of a group's largest value, so that a code comes out another one with a probability of that
    over its step, 1/127 or 1/7. Such a change is a whole step, where quantizing itself loses step / sqrt(12) in the
    mean: it makes sqrt(12 * probability) of the loss that the type has against f32."""
    ids = some_ids(90)
    ours = all_logits(load(plain_folder, backend, kv_cache=kind), ids)
    torchs = all_logits(load_engine(plain_folder, EngineOptions(device="cpu", context=128, kv_cache=kind)), ids)
    exact = all_logits(load_engine(plain_folder, EngineOptions(device="cpu", context=128, kv_cache="f32")), ids)
    rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
    levels = {"q8": 127, "k8v4": 127, "q4": 7}[kind]
    changed = (12 * 3 * 2.0**-12 * levels) ** 0.5 * rms(torchs - exact)
    assert rms(ours - torchs) < changed


# ---- one decode step ------------------------------------------------------------------------------------------------


def launches_of_a_step(backend, folder: Path) -> tuple[list[str], list[str]]:
    """Kernels, and torch's operations on the device, of one step after the tables were staged."""
    recorder = RecordingBackend(backend)
    engine = load(folder, recorder)
    runner = engine.generator.runner
    batch = batch_of([([5], 0, [0])], decode=True)
    run(runner, batch)
    ops = runner.decoder.ops
    ops.stage([batch])
    recorder.launches.clear()
    h = runner._residual[:1]
    with TorchCalls() as calls:
        runner.decoder.embed(runner._embed, h)
        runner._through_layers([h])
        runner.decoder.head(runner._final_norm, runner._head, h, runner._logits)
    return [launch.entry for launch in recorder.launches], on_device(calls.names)


def test_a_decode_step_is_five_launches_a_layer_and_nothing_else(backend, plain_folder):
    """No allocation, no copy, no synchronisation: torch makes views and no more."""
    launches, calls = launches_of_a_step(backend, plain_folder)
    layer = ["linear_q", "attention_decode", "linear_q", "linear_q", "linear_q"]
    assert launches == ["embed", *layer, *layer, "linear_dense"]
    assert calls == []


def test_act_order_costs_two_launches_more(backend, tmp_path):
    make(tmp_path, 4, 32, order="shared")
    launches, calls = launches_of_a_step(backend, tmp_path)
    layer = ["rms_norm", "linear_q", "attention_decode", "linear_q", "rms_norm", "linear_q", "linear_q"]
    assert launches == ["embed", *layer, *layer, "linear_dense"]
    assert calls == []


def test_staging_is_one_copy(backend, plain_folder):
    """Ids, slots, pages and angles of a pass go to the device in one piece."""
    ops = load(plain_folder, backend).generator.runner.decoder.ops
    batch = batch_of([(some_ids(3), 0, [0])])
    ops.stage([batch])
    with TorchCalls() as calls:
        ops.stage([batch, batch])
    assert calls.names.count("copy_") == 1


def test_the_generator_runs_ahead_and_says_the_same(backend, folder):
    """Sampled tokens with a penalty, an end in the middle, an answer that is given up: as a loop that reads each token
    before the next step would have them."""
    engine = load(folder, backend)
    generator, ids = engine.generator, some_ids(12)
    params = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=4, max_tokens=24)
    expected, seen = [], set(ids)
    sequence = generator.begin(40)
    logits = generator.extend(sequence, ids)
    for step in range(24):
        batch = sampling_batch([(params, step, sorted(seen))])
        expected.append(int(sample(logits.cpu(), batch)[0]))
        seen.add(expected[-1])
        logits = generator.extend(sequence, expected[-1:])
    generator.end(sequence)
    generator.eos_ids = frozenset()
    assert [token.token_id for token in generator.stream(ids, params)] == expected
    generator.eos_ids = frozenset({expected[10]})
    stopped = list(generator.stream(ids, params))
    last = expected.index(expected[10])
    assert [token.token_id for token in stopped] == expected[: last + 1]
    assert [token.finish_reason for token in stopped] == [None] * last + ["stop"]
    answer = generator.stream(ids, params)
    first = [next(answer).token_id for _ in range(3)]
    answer.close()
    assert first == expected[:3]
    assert generator.pool.num_free == generator.pool.num_pages


# ---- rows and their batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "q4"])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_among_new_tokens(backend, folder, kind):
    """Logits of a sequence's last 8 tokens, one by one, as 8 at once, and beside other sequences."""
    engine = load(folder, backend, kv_cache=kind, max_sequences=3)
    runner = engine.generator.runner
    ids, others = some_ids(73, 1), [some_ids(20, 2), some_ids(5, 3)]
    pages, other_pages = [3, 1], [[0], [5]]
    run(runner, batch_of([(ids[:65], 0, pages)]))
    for new, page in zip(others, other_pages, strict=True):
        run(runner, batch_of([(new[:-1], 0, page)]))
    alone = torch.cat([run(runner, batch_of([([ids[65 + i]], 65 + i, pages)], decode=True)) for i in range(8)])
    together = batch_of([(ids[65:], 65, pages)], decode=True)
    together = run(runner, replace(together, logit_rows=np.arange(8, dtype=np.int32)))
    assert torch.equal(alone, together)
    mixed = [(ids[72:], 72, pages), (others[0][-1:], 19, other_pages[0]), (others[1][-1:], 4, other_pages[1])]
    assert torch.equal(run(runner, batch_of(mixed, decode=True))[0], alone[7])
    assert torch.equal(run(runner, batch_of(mixed[::-1], decode=True))[2], alone[7])


def test_decode_and_prefill_rows_in_one_batch(backend, folder):
    """A decode row's bits do not change beside a prompt, and the prompt's logits are those that it has alone."""
    engine = load(folder, backend, max_sequences=2)
    runner = engine.generator.runner
    first, prompt = some_ids(31, 4), some_ids(40, 5)
    run(runner, batch_of([(first[:-1], 0, [2])]))
    step = run(runner, batch_of([(first[-1:], 30, [2])], decode=True))
    alone = run(runner, batch_of([(prompt, 0, [1])]))
    both = run(runner, replace(batch_of([(first[-1:], 30, [2]), (prompt, 0, [0])]), num_decode_rows=1))
    assert torch.equal(both[0], step[0])
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-5)


def test_the_next_step_takes_its_token_from_the_device(backend, folder):
    engine = load(folder, backend)
    runner, ids = engine.generator.runner, some_ids(10)
    ops = runner.decoder.ops
    logits = run(runner, batch_of([(ids, 0, [0])]))
    runner.decoder.ops.stage(())
    (token_id,) = ops.sample(
        logits.to(ops.device), sampling_batch([(SamplingParams(temperature=0.0), 0, [])])
    ).token_ids()
    assert token_id == int(logits.argmax())
    chained = run(runner, batch_of([([-1], 10, [0])], decode=True))
    assert torch.equal(chained, run(runner, batch_of([([token_id], 10, [0])], decode=True)))


# ---- graphs ---------------------------------------------------------------------------------------------------------


def test_replayed_steps_give_the_same_bits(backend, folder):
    """The second step is captured, the others are replayed: all that changes from step to step must reach the kernels
    through memory at fixed addresses."""
    recorder = RecordingBackend(backend)
    engine = load(folder, recorder)
    found = tokens(engine, replace(GREEDY, max_tokens=20))
    assert len(recorder.graphs) == 1
    assert engine.generator.runner._graphs.reason is None
    assert found == tokens(load(folder, backend), replace(GREEDY, max_tokens=20))


def test_a_graph_for_each_bucket(backend, folder):
    """3 sequences run in a batch of 4, whose last row belongs to nobody."""
    recorder = RecordingBackend(backend)
    captured, plain = load(folder, recorder, max_sequences=4), load(folder, backend, max_sequences=4)
    prompts = [some_ids(n, n) for n in (5, 9, 17)]
    for step in range(4):
        results = []
        for engine in (captured, plain):
            sequences = [(ids[step : step + 1], step, [i]) for i, ids in enumerate(prompts)]
            results.append(run(engine.generator.runner, batch_of(sequences, decode=True)))
        assert results[0].shape[0] == 3
        assert torch.equal(*results)
    assert len(recorder.graphs) == 1


def test_a_capture_that_fails_leaves_plain_launches(backend, folder, caplog):
    recorder = RecordingBackend(backend)

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.capture = refuse
    found = tokens(load(folder, recorder), replace(GREEDY, max_tokens=6))
    assert found == tokens(load(folder, backend), replace(GREEDY, max_tokens=6))
    assert "launched one by one: a graph could not be captured (operation not permitted" in caplog.text


# ---- where layers are -----------------------------------------------------------------------------------------------


def budget(folder: Path, backend, num_resident: int) -> int:
    """VRAM that keeps so many layers."""
    return load(folder, backend, resident_layers=num_resident).plan.device_bytes("cuda:0")


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.DISK])
def test_streamed_layers_give_the_same_bits(backend, four_bit, tmp_path, tier):
    options = {"resident_layers": 1 if tier is Tier.DISK else 2, "packed_folder": tmp_path}
    if tier is Tier.DISK:
        whole = load(four_bit, backend, **options).plan.device_bytes("ram")
        options["ram"] = whole - 1000
    streamed = load(four_bit, backend, **options)
    assert streamed.plan.placement.on_tier(tier)
    try:
        ids = some_ids(30)
        resident = load(four_bit, backend)
        assert torch.equal(all_logits(streamed, ids), all_logits(resident, ids))
        assert tokens(streamed) == tokens(resident)
    finally:
        streamed.close()


def test_replays_find_the_slots_at_rest(recorder, four_bit):
    """A second request, whose prompt is launched plainly between replays; and a step after a pass that was given up in
    its middle, which has left other layers in the slots."""
    streamed, resident = load(four_bit, recorder, resident_layers=0), load(four_bit, recorder.inner)
    params = replace(GREEDY, max_tokens=6)
    expected = tokens(resident, params)
    assert tokens(streamed, params) == expected
    assert tokens(streamed, params) == expected
    runner, layer = streamed.generator.runner, streamed.generator.runner.decoder.layer

    def give_up(layer_idx, *args):
        if layer_idx == 2:
            raise KeyboardInterrupt
        layer(layer_idx, *args)

    runner.decoder.layer = give_up
    with pytest.raises(KeyboardInterrupt):
        tokens(streamed, params)
    runner.decoder.layer = layer
    one = batch_of([([5], 0, [0])], decode=True)
    assert torch.equal(run(runner, one), run(resident.generator.runner, one))
    assert len(recorder.graphs) == 1


def test_a_capture_that_is_interrupted_leaves_no_layer_for_another(recorder, four_bit):
    streamed = load(four_bit, recorder, resident_layers=0)
    capture = recorder.capture

    def interrupted(run):
        capture(run)
        raise KeyboardInterrupt

    recorder.capture = interrupted
    params = replace(GREEDY, max_tokens=6)
    with pytest.raises(KeyboardInterrupt):
        tokens(streamed, params)
    recorder.capture = capture
    assert tokens(streamed, params) == tokens(load(four_bit, recorder.inner), params)


def test_copies_of_streamed_layers_are_part_of_the_graph(recorder, four_bit):
    """On replay layers are copied again, in their turn: in between, the slots hold other layers."""
    streamed = load(four_bit, recorder, resident_layers=0)
    params = replace(GREEDY, max_tokens=8)
    assert tokens(streamed, params) == tokens(load(four_bit, recorder.inner), params)
    assert len(recorder.graphs) == 1
    recorder.copies.clear()
    for work in recorder.graphs[0]:
        work()
    assert len(recorder.copies) == 4
    assert len(set(recorder.copies)) == streamed.plan.num_slots == 2


def test_exact_lines_are_what_is_alive(backend, four_bit):
    before = live_bytes()
    engine = load(four_bit, backend)
    lines = [line for line in engine.plan.lines if line.exact and line.device == "cuda:0"]
    lines = [line for line in lines if line.purpose != "rounding to segments"]
    assert live_bytes() - before == sum(line.num_bytes for line in lines)
    assert len(tokens(engine)) == 64
    assert live_bytes() - before == sum(line.num_bytes for line in lines)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused_before_any_launch(backend, folder):
    recorder = RecordingBackend(backend)
    runner = load(folder, recorder).generator.runner
    good = batch_of([([5], 70, [0, 1])], decode=True)
    array = lambda *values: np.asarray(values, np.int32)  # noqa: E731
    for changes, words in (
        ({"page_table": array([0, 2])}, "sequence 0 has page 2: expected 0 to 1"),
        ({"context_len": array(129)}, "has a context of 129"),
        ({"slots": array(128)}, "slot 128 at row 0"),
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
