"""A model on the host shim as a GPU: launches per step, rows in batches, streamed layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exl.kernels.params import Params
from exl.planning.plan import Tier
from exl.sampling import sample
from exl.sampling_params import SamplingParams
from tests.draws import draws_of
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend, TorchCalls, on_device
from tests.host.shim import HostShim, ShimBackend
from tests.live_bytes import live_bytes
from tests.model.batches import batch_of, run
from tests.model.cuda_engines import (
    GREEDY,
    all_logits,
    load,
    some_ids,
    tokens,
)
from tests.model.test_quantized import make

# ---- one decode step ------------------------------------------------------------------------------------------------


def launches_of_a_step(backend, folder: Path) -> tuple[list[str], list[str]]:
    """The kernels, and torch's operations on the device, of one step, after its tables were staged."""
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
    """No allocation, copy or synchronisation: torch makes only views."""
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


def arguments_built(monkeypatch) -> list[int]:
    """A list that grows by one per argument block, of a launch in a program or of a single launch."""
    built = []

    def counted(args, varying=None) -> Params:
        built.append(len(args))
        return Params(args, varying)

    for module in ("exl.kernels.program", "tests.host.recording"):
        monkeypatch.setattr(f"{module}.Params", counted)
    return built


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_second_pass_builds_no_argument(backend, tmp_path, monkeypatch, rows):
    """Prompts and steps, with act-order. All layers use the argument blocks that one layer built."""
    make(tmp_path, 4, 32, order="shared")
    recorder = RecordingBackend(backend)
    engine = load(tmp_path, recorder)
    runner, pages = engine.generator.runner, [0, 1]
    built = arguments_built(monkeypatch)
    results = []
    for start, ids in ((0, some_ids(rows)), (0, some_ids(rows)), (0, some_ids(rows, 5))):
        before, launched = len(built), len(recorder.launches)
        results.append(run(runner, batch_of([(ids, start, pages)])))
        launched = len(recorder.launches) - launched
        if len(results) == 1:
            assert len(built) - before == launched - (launched - 2) // 2  # of embedding, head, and one of two layers
        else:
            assert len(built) == before
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_batches_of_as_many_rows_go_through_programs_of_their_own(backend, folder):
    """Six rows in every arrangement, in turn in one engine: the same results as in a fresh engine."""
    ids, pages = some_ids(6), [[i] for i in range(6)]
    one = batch_of([(ids, 0, [0])])
    arrangements = [
        one,
        replace(one, logit_rows=np.array([0, 1, 5], np.int32)),
        batch_of([(ids, 0, [0])], decode=True),
        batch_of([(ids[:3], 0, [2]), (ids[3:], 0, [3])]),
        batch_of([([token_id], 0, page) for token_id, page in zip(ids, pages, strict=True)], decode=True),
        replace(batch_of([(ids[:1], 0, [4]), (ids[1:], 0, [5])]), num_decode_rows=1),
    ]
    options = {"max_sequences": 6, "context": 64, "cache_tokens": 6 * 64}
    fresh = [run(load(folder, backend, **options).generator.runner, batch) for batch in arrangements]
    runner = load(folder, backend, **options).generator.runner
    for i in [*range(6), *range(5, -1, -1)]:
        assert torch.equal(run(runner, arrangements[i]), fresh[i]), i


def test_staging_is_one_copy(backend, plain_folder):
    """Ids, slots, pages and angles of a pass go to the device in one copy."""
    ops = load(plain_folder, backend).generator.runner.decoder.ops
    batch = batch_of([(some_ids(3), 0, [0])])
    ops.stage([batch])
    with TorchCalls() as calls:
        ops.stage([batch, batch])
    assert calls.names.count("copy_") == 1


def test_memory_that_an_earlier_model_wrote_may_hold_weights(four_bit):
    """Each pass begins with a copy, which starts after all earlier launches: what they wrote, wherever it was, may be
    read early."""
    shim = HostShim("plain")
    backend = ShimBackend(shim, 90)
    engine = load(four_bit, backend)
    found = tokens(engine, replace(GREEDY, max_tokens=3))
    shim.note_launch([(0, 1 << 63, 0, True, False)], dependent=True)
    assert tokens(engine, replace(GREEDY, max_tokens=3)) == found


def test_the_generator_runs_ahead_and_says_the_same(backend, folder):
    """Sampled tokens with a penalty, an end in the middle, an abandoned answer: the same tokens as from a loop that
    reads each token before the next step."""
    engine = load(folder, backend)
    generator, ids = engine.generator, some_ids(12)
    params = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=4, max_tokens=24)
    expected, seen = [], set(ids)
    sequence = generator.begin(40)
    logits = generator.extend(sequence, ids)
    for step in range(24):
        batch = draws_of([(params, step, sorted(seen))])
        expected.append(sample(logits.cpu(), batch).ids[0])
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
    """Logits of a sequence's last 8 tokens: one by one, 8 at once, and together with other sequences."""
    engine = load(folder, backend, kv_cache=kind, max_sequences=3, cache_tokens=3 * 128)
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
    """A decode row's bits do not change if a prompt is in the batch, and the prompt's logits are those it has alone."""
    engine = load(folder, backend, max_sequences=2, cache_tokens=2 * 128)
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
    (token_id,) = ops.sample(logits.to(ops.device), draws_of([(SamplingParams(temperature=0.0), 0, [])])).read().ids
    assert token_id == int(logits.argmax())
    chained = run(runner, batch_of([([-1], 10, [0])], decode=True))
    assert torch.equal(chained, run(runner, batch_of([([token_id], 10, [0])], decode=True)))


def test_pages_are_copied_without_an_index(backend, folder):
    """An index tensor would be copied to the device in every layer, and the host would wait for it."""
    runner = load(folder, backend, cache_tokens=2 * 128).generator.runner
    ids = some_ids(30)
    run(runner, batch_of([(ids[:29], 0, [0])]))
    expected = run(runner, batch_of([(ids[29:], 29, [0])], decode=True))
    with TorchCalls() as calls:
        runner.kv.copy_pages([0, 1], [3, 2])
    assert on_device(calls.names) == ["copy_"] * 2  # each of all layers
    assert torch.equal(run(runner, batch_of([(ids[29:], 29, [3])], decode=True)), expected)
    for src, dst in (([0, 1], [1, 2]), ([0, 1], [2])):
        with pytest.raises(ValueError, match="expected as many others"):
            runner.kv.copy_pages(src, dst)


# ---- placement of layers --------------------------------------------------------------------------------------------


def budget(folder: Path, backend, num_resident: int) -> int:
    """A VRAM budget that holds this many layers."""
    return load(folder, backend, resident_layers=num_resident).plan.device_bytes("cuda:0")


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.DISK])
def test_streamed_layers_give_the_same_bits(backend, four_bit, tmp_path, tier):
    options = {"resident_layers": 1 if tier is Tier.DISK else 2, "packed_folder": tmp_path, "embed": "device"}
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


def test_the_first_launch_of_a_layer_that_was_copied_waits(recorder, four_bit):
    """Otherwise it could read weights before their copy has ended. Holds both when a program is recorded and when it is
    started again. If all layers are resident, no launch waits."""
    for options, first in (({"resident_layers": 0}, False), ({}, True)):
        engine = load(four_bit, recorder, **options)
        for _ in range(3):
            recorder.launches.clear()
            run(engine.generator.runner, batch_of([(some_ids(5), 0, [0])]))
            waits = [launch.dependent for launch in recorder.launches]
            assert waits == [True, *[first, *[True] * 5] * engine.config.num_layers, True]
    engine.generator.runner.decoder.ops.fence()  # although the same launch was started without a wait before
    recorder.launches.clear()
    run(engine.generator.runner, batch_of([(some_ids(5), 0, [0])]))
    assert [launch.dependent for launch in recorder.launches] == [False, *waits[1:]]


def test_replays_find_the_buffers_at_rest(recorder, four_bit):
    """A second request, whose prompt is launched plainly between replays; and a step after a pass that was given up in
    its middle, which has left other layers in the buffers."""
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
    """On replay layers are copied again, in their turn: in between, the buffers hold other layers."""
    streamed = load(four_bit, recorder, resident_layers=0)
    params = replace(GREEDY, max_tokens=8)
    assert tokens(streamed, params) == tokens(load(four_bit, recorder.inner), params)
    assert len(recorder.graphs) == 1
    recorder.copies.clear()
    for work in recorder.graphs[0]:
        work()
    assert len(recorder.copies) == 4
    assert len(set(recorder.copies)) == streamed.plan.num_buffers == 2


def test_more_streamed_layers_than_buffers_are_replayed(recorder, four_bit):
    """Two shapes of steps, so that the second capture, too, comes after replays of the first. Copies are recorded with
    events that obey CUDA's rules: what was recorded in a capture cannot be waited for outside of it."""
    streamed = load(four_bit, recorder, resident_layers=0, max_sequences=2)
    resident = load(four_bit, recorder.inner, max_sequences=2)
    assert len(streamed.plan.placement.layers) == 4 > streamed.plan.num_buffers == 2
    for step in range(5):
        for count in (1, 2):
            batch = batch_of([([5 + step], step, [i]) for i in range(count)], decode=True)
            found = [run(engine.generator.runner, batch) for engine in (streamed, resident)]
            assert torch.equal(*found)
    assert len(recorder.graphs) == 2
    assert streamed.generator.runner.graphs.reason is None


@pytest.mark.gpu
def test_more_streamed_layers_than_buffers_are_replayed_on_a_gpu(four_bit):
    """The same with CUDA's own events and graphs, several requests one after the other."""
    backend = make_backend("cupy")
    streamed, resident = load(four_bit, backend, resident_layers=0), load(four_bit, backend)
    assert len(streamed.plan.placement.layers) == 4 > streamed.plan.num_buffers == 2
    for _ in range(3):
        assert tokens(streamed) == tokens(resident)
    assert streamed.generator.runner.graphs.reason is None


def test_exact_lines_are_what_is_alive(backend, four_bit):
    before = live_bytes()
    engine = load(four_bit, backend)
    lines = [line for line in engine.plan.lines if line.exact and line.device == "cuda:0"]
    lines += [line for line in engine.plan.lines if line.purpose == "embedding"]  # a tensor of the GPU, in RAM
    assert len(lines) == len({(line.device, line.purpose) for line in lines})
    lines = [line for line in lines if line.purpose != "rounding to segments"]
    assert live_bytes() - before == sum(line.num_bytes for line in lines)
    assert len(tokens(engine)) == 64
    assert live_bytes() - before == sum(line.num_bytes for line in lines)
