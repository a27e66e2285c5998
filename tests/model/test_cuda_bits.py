"""All ways to run a step on a GPU give the same bits, for every width, order and type of cache: launched one by one or
replayed as a graph, with or without dependent launches, layers resident or streamed.

The host shim runs a sample of the cases, on a backend whose graphs are lists of launches; a GPU runs all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions
from exl.planning.plan import Tier
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend
from tests.model.cuda_engines import all_logits, some_ids, step_logits, tokens
from tests.model.placed_model import NUM_LAYERS

KINDS = ("f16", "q8", "k8v4", "q4")
# bits, act-order, cache type
CASES = [
    *((4, "own", kind) for kind in KINDS),
    *((4, "none", kind) for kind in KINDS),
    *((bits, order, "f16") for bits in (2, 3, 8) for order in ("none", "shared", "own")),
    (4, "shared", "q4"),
    (2, "own", "q4"),
    (3, "none", "k8v4"),
    (8, "shared", "q8"),
]
WAYS = [(dependent, graphs) for dependent in (False, True) for graphs in (False, True)]


def on_modes(cases: list[tuple], sample: list[tuple]) -> list:
    """``sample`` on the shim as an H100, which has dependent launches; all cases on a GPU."""
    return [("plain", *case) for case in sample] + [
        pytest.param("cupy", *case, marks=pytest.mark.gpu) for case in cases
    ]


def backend_of(mode: str):
    """A backend that has graphs, also on the host."""
    backend = make_backend(mode, 90)
    return RecordingBackend(backend) if mode == "plain" else backend


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, quantized):
    """A function: (bits, order, layers) -> a folder, each written once."""
    made: dict[tuple, Path] = {}

    def make(bits: int, order: str, num_layers: int = 2) -> Path:
        key = bits, order, num_layers
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"bits{bits}-{order}-{num_layers}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quantized, "LAYERS", num_layers)
                quantized.make(made[key], bits, 32, order=order)
        return made[key]

    return make


def load(folder: Path, backend, dependent: bool = True, graphs: bool = True, **options) -> Engine:
    options = EngineOptions(**{"context": 128, "vram": "2GB"} | options)
    return load_engine(folder, options, backend=backend, dependent=dependent, graphs=graphs)


def assert_replayed(engine: Engine, num_graphs: int = 1) -> None:
    """No capture failed, and steps were replayed from graphs."""
    graphs = engine.generator.runner.graphs
    assert graphs.reason is None
    assert len(graphs._replays) == num_graphs


@pytest.mark.parametrize(("mode", "bits", "order", "kind"), on_modes(CASES, [(4, "own", "f16")]))
def test_graphs_and_dependent_launches_change_no_bit(checkpoint, mode, bits, order, kind):
    """70 steps, more than a page, so that tables change after the graph was captured."""
    folder, ids = checkpoint(bits, order), some_ids(70)
    found = {}
    for dependent, graphs in WAYS:
        engine = load(folder, backend_of(mode), dependent, graphs, kv_cache=kind)
        try:
            found[dependent, graphs] = step_logits(engine, ids)
            if graphs:
                assert_replayed(engine)
        finally:
            engine.close()
    plain = found[False, False]
    assert torch.isfinite(plain).all()
    assert len({row.numpy().tobytes() for row in plain}) == len(ids)
    for way, logits in found.items():
        assert torch.equal(logits, plain), f"dependent, graphs = {way}: {(logits != plain).any(1).nonzero()[:4]}"


STREAMED = [
    *((4, "none", kind) for kind in KINDS),
    *((4, "own", kind) for kind in ("f16", "q4")),
    *((bits, "shared", "f16") for bits in (2, 3, 8)),
]


@pytest.mark.parametrize(("mode", "bits", "order", "kind"), on_modes(STREAMED, [(4, "own", "f16")]))
def test_streamed_without_a_resident_layer_changes_no_bit(checkpoint, mode, bits, order, kind):
    """Four layers pass through two buffers in every replayed step. Prompts between the replays leave other layers in
    the buffers; answers sampled with a seed come out alike, too."""
    folder, ids = checkpoint(bits, order, NUM_LAYERS), some_ids(30)
    options = {"kv_cache": kind, "max_sequences": 1}
    resident = load(folder, make_backend(mode, 90), graphs=False, **options)
    backend = make_backend(mode, 90)  # test_cuda_graphs.py tests graphs with recorded copies
    streamed = load(folder, backend, resident_layers=0, **options)
    try:
        assert len(streamed.plan.placement.on_tier(Tier.PINNED)) == NUM_LAYERS > streamed.plan.num_buffers
        expected = all_logits(resident, ids), step_logits(resident, ids), tokens(resident)
        for _ in range(2):
            assert torch.equal(all_logits(streamed, ids), expected[0])
            assert torch.equal(step_logits(streamed, ids), expected[1])
            assert tokens(streamed) == expected[2]
        if mode == "cupy":
            assert_replayed(streamed)
    finally:
        streamed.close()
        resident.close()


@pytest.mark.parametrize("mode", ["plain", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_streamed_beside_resident_layers_changes_no_bit(checkpoint, mode):
    """One layer stays, three pass through the buffers; nothing depends on early starts."""
    folder, ids = checkpoint(4, "own", NUM_LAYERS), some_ids(20)
    found = []
    for resident_layers, dependent in ((None, False), (1, True), (1, False)):
        options = {} if resident_layers is None else {"resident_layers": resident_layers}
        engine = load(folder, make_backend(mode, 90), dependent, **options)
        try:
            found.append(step_logits(engine, ids))
        finally:
            engine.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
