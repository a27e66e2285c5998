"""A model on the host shim as a GPU: decode steps as graphs, and launches that depend on the one before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.step_graph import MAX_GRAPHS, StepGraphs
from exl.errors import KernelError
from exl.llm import LLM
from exl.text.tokenizer import Tokenizer
from exl.weights import placement
from tests.host.backends import make_backend
from tests.host.recording import Launch, RecordedCopies, RecordingBackend
from tests.model.batches import batch_of, run
from tests.model.cuda_engines import GREEDY, load, some_ids, tokens


def test_replayed_steps_give_the_same_bits(backend, folder):
    """The second step is captured, later ones are replayed: everything that changes from step to step must reach the
    kernels through memory at fixed addresses."""
    recorder = RecordingBackend(backend)
    engine = load(folder, recorder)
    found = tokens(engine, replace(GREEDY, max_tokens=20))
    assert len(recorder.graphs) == 1
    assert engine.generator.runner.graphs.reason is None
    assert found == tokens(load(folder, backend), replace(GREEDY, max_tokens=20))


def test_a_graph_for_each_bucket(backend, folder):
    """3 sequences run in a batch of 4, whose last row is unused."""
    recorder = RecordingBackend(backend)
    options = {"max_sequences": 4, "cache_tokens": 512}
    captured, plain = load(folder, recorder, **options), load(folder, backend, **options)
    prompts = [some_ids(n, n) for n in (5, 9, 17)]
    for step in range(4):
        results = []
        for engine in (captured, plain):
            sequences = [(ids[step : step + 1], step, [i]) for i, ids in enumerate(prompts)]
            results.append(run(engine.generator.runner, batch_of(sequences, decode=True)))
        assert results[0].shape[0] == 3
        assert torch.equal(*results)
    assert len(recorder.graphs) == 1


def test_the_reason_of_a_failed_capture_is_the_whole_chain(recorder, four_bit):
    """CUDA ends a broken capture with its own error, which hides the first one."""
    streamed = load(four_bit, recorder, resident_layers=0)
    runner, layer = streamed.generator.runner, streamed.generator.runner.decoder.layer
    assert streamed.decode_steps.startswith("launched one by one so far")

    def fail(layer_idx, *args):
        if layer_idx == 3 and recorder.captures.active:
            try:
                raise ValueError("CUDA_ERROR_INVALID_VALUE: invalid argument")
            except ValueError as error:
                raise KernelError("linear_q on grid (9, 1, 1)") from error
        layer(layer_idx, *args)

    runner.decoder.layer = fail
    params = replace(GREEDY, max_tokens=6)
    assert tokens(streamed, params) == tokens(load(four_bit, recorder.inner), params)
    for words in ("cudaErrorStreamCaptureUnjoined", "linear_q on grid (9, 1, 1)", "CUDA_ERROR_INVALID_VALUE"):
        assert words in runner.graphs.reason
    assert "\n" not in runner.graphs.reason
    assert streamed.decode_steps == f"launched one by one: {runner.graphs.reason}"


def test_ctrl_c_inside_of_a_capture_is_heard(recorder, four_bit):
    """The interrupt is raised although the end of the capture fails and its error replaces the interrupt."""
    streamed = load(four_bit, recorder, resident_layers=0)
    runner, layer = streamed.generator.runner, streamed.generator.runner.decoder.layer

    def interrupt(layer_idx, *args):
        if layer_idx == 3 and recorder.captures.active:
            raise KeyboardInterrupt
        layer(layer_idx, *args)

    runner.decoder.layer = interrupt
    params = replace(GREEDY, max_tokens=6)
    with pytest.raises(KeyboardInterrupt):
        tokens(streamed, params)
    runner.decoder.layer = layer
    assert runner.graphs.reason is None
    assert tokens(streamed, params) == tokens(load(four_bit, recorder.inner), params)
    assert streamed.decode_steps == "replayed as graphs"


class NoDependentNodes(RecordingBackend):
    """Refuses dependent launches in a graph, as some drivers do. ``all``: every launch."""

    all = False

    def note(self, launch: Launch) -> None:
        if self.captures.active and (launch.dependent or self.all):
            raise KernelError(f"{launch.entry}: cuLaunchKernelEx failed with 801: operation not supported")
        super().note(launch)


@pytest.mark.parametrize("num_resident", [None, 0])
def test_a_capture_is_tried_again_without_dependent_launches(monkeypatch, four_bit, num_resident):
    """Later steps also run without, and a message says so."""
    recorder = NoDependentNodes(make_backend("plain", 90))
    monkeypatch.setattr(placement, "HostCopyEngine", lambda: RecordedCopies(recorder))
    engine = load(four_bit, recorder, resident_layers=num_resident)
    params = replace(GREEDY, max_tokens=6)
    expected = tokens(load(four_bit, recorder.inner), params)
    assert tokens(engine, params) == expected
    graphs = engine.generator.runner.graphs
    assert len(recorder.graphs) == 1
    assert graphs.reason is None
    assert "801: operation not supported" in graphs.note
    assert engine.decode_steps == f"replayed as graphs, {graphs.note}"
    recorder.launches.clear()
    assert tokens(engine, params) == expected
    assert recorder.launches
    assert not any(launch.dependent for launch in recorder.launches)


@pytest.mark.parametrize("num_resident", [None, 0])
def test_launches_stay_dependent_where_both_captures_fail(monkeypatch, four_bit, num_resident):
    recorder = NoDependentNodes(make_backend("plain", 90))
    recorder.all = True
    monkeypatch.setattr(placement, "HostCopyEngine", lambda: RecordedCopies(recorder))
    engine = load(four_bit, recorder, resident_layers=num_resident)
    params = replace(GREEDY, max_tokens=6)
    assert tokens(engine, params) == tokens(load(four_bit, recorder.inner), params)
    graphs = engine.generator.runner.graphs
    assert recorder.graphs == []
    assert graphs.note is None
    assert "without dependent launches: KernelError: embed: cuLaunchKernelEx failed with 801" in graphs.reason
    assert engine.generator.runner.decoder.ops.dependent
    assert any(launch.dependent for launch in recorder.launches)


def test_dependence_can_be_switched_off(four_bit):
    """``CudaOps.dependent`` works at any time. A step's first launch is never dependent: nothing precedes it."""
    recorder = RecordingBackend(make_backend("plain", 90))
    engine = load(four_bit, recorder)
    runner, batch = engine.generator.runner, batch_of([([5], 0, [0])], decode=True)
    first = run(runner, batch)
    assert not recorder.launches[0].dependent
    assert all(launch.dependent for launch in recorder.launches[1:])
    recorder.launches.clear()
    runner.decoder.ops.dependent = False
    for _ in range(3):  # captured, then replayed
        assert torch.equal(run(runner, batch), first)
    assert len(recorder.graphs) == 1
    assert not any(launch.dependent for launch in recorder.launches)


@pytest.mark.gpu
def test_steps_are_replayed_on_a_gpu(folder):
    """With CUDA's own capture: a failure would only cost speed, so no other test would notice it."""
    engine = load(folder, make_backend("cupy"))
    assert len(tokens(engine)) == 64
    assert engine.generator.runner.graphs.reason is None
    assert engine.decode_steps == "replayed as graphs"


def test_a_capture_that_fails_leaves_plain_launches(backend, folder, caplog):
    recorder = RecordingBackend(backend)

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.capture = refuse
    engine = load(folder, recorder)
    assert tokens(engine, replace(GREEDY, max_tokens=6)) == tokens(load(folder, backend), replace(GREEDY, max_tokens=6))
    llm = LLM._of(folder, engine, Tokenizer.from_folder(BUNDLED_MODEL), GenerationDefaults())
    assert "decode steps launched one by one: a graph could not be captured" in repr(llm)
    assert llm.decode_steps == engine.decode_steps
    assert "launched one by one: a graph could not be captured (RuntimeError: operation not permitted" in caplog.text


def test_the_graphs_that_were_used_last_are_kept():
    """As many as ``MAX_GRAPHS``; one that was given up is captured again when its shape comes again."""
    captured = []

    def capture(step):
        captured.append(step)
        return step

    ops = SimpleNamespace(capture=capture, backend=None, dependent=False)
    graphs, ran = StepGraphs(ops, SimpleNamespace(capturable=True)), []
    steps = [partial(ran.append, i) for i in range(MAX_GRAPHS + 1)]

    def times(key: int, count: int) -> int:
        """Captures while a step of this shape runs ``count`` times."""
        before, ran_before = len(captured), len(ran)
        for _ in range(count):
            graphs.run(key, steps[key])
        assert ran[ran_before:] == [key] * count
        return len(captured) - before

    assert [times(key, 3) for key in range(MAX_GRAPHS)] == [1] * MAX_GRAPHS
    assert times(0, 1) == 0  # now key 1 was not used for the longest time
    assert times(MAX_GRAPHS, 2) == 1
    assert [times(key, 1) for key in (0, *range(2, MAX_GRAPHS + 1))] == [0] * MAX_GRAPHS
    assert times(1, 1) == 1
    assert len(graphs._replays) == MAX_GRAPHS
