"""What a token reads, against sums by hand and against what streams really move; the bound, against a simulation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import load_engine
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target
from exl.memory.copies import HostCopyEngine
from exl.ops.base import LayerWeights
from exl.planning.ask import _open_shape
from exl.planning.from_headers import plan_model
from exl.planning.options import AS_IT_IS, EngineOptions
from exl.planning.plan import MemoryPlan, Placement, Tier
from exl.planning.speed import Speeds, TokenBytes
from exl.planning.traffic import token_bytes
from exl.weights.device_stream import DeviceStream, PinnedLayers

GB = 10**9
# Llama 2 7B at 4 bits in groups of 128, by hand: codes, one f16 scale per group, two norms of f32.
MATRICES = 4 * 4096 * 4096 + 3 * 4096 * 11008
LAYER = MATRICES // 2 + MATRICES // 128 * 2 + 2 * 4096 * 4
HEAD, ROW = 32000 * 4096 * 2 + 4096 * 4, 4096 * 2
KEYS_AND_VALUES = 2 * 32 * 128 * 2  # of a layer and token, f16


def seven(**options) -> MemoryPlan:
    return exl.plan(shape="llama-2-7b", **options)


def test_a_token_of_a_7b_by_hand():
    empty, full = seven(vram="8GB").tokens
    assert empty.links() == {"vram": 32 * LAYER + HEAD, "pcie": ROW}
    assert full.links() == {"vram": 32 * LAYER + HEAD + 4096 * 32 * KEYS_AND_VALUES, "pcie": ROW}
    assert [empty.depth, full.depth] == [0, 4096]
    (some,) = seven(vram="8GB", depth=100).tokens
    assert some.links()["vram"] - empty.links()["vram"] == 100 * 32 * KEYS_AND_VALUES


def test_streamed_layers_go_over_the_bus_and_through_the_memory():
    found = seven(vram="3GB", context=512)
    streamed = found.placement.num_streamed
    (empty, _) = found.tokens
    assert streamed > 4
    assert empty.links() == {"vram": 32 * LAYER + HEAD, "pcie": streamed * LAYER + ROW}
    assert empty.pcie_late == (streamed - 2) * LAYER
    assert empty.ahead == {"cuda:0": (32 - streamed) * LAYER + HEAD}


def test_layers_on_the_disk_are_read_and_then_copied():
    found = seven(vram="3GB", context=512, ram="1500MB")
    on_disk, streamed = len(found.placement.on_tier(Tier.DISK)), found.placement.num_streamed
    assert 4 < on_disk < streamed
    assert found.placement.embed is Tier.DISK
    assert found.tokens[0].links() == {
        "vram": 32 * LAYER + HEAD, "pcie": streamed * LAYER + ROW, "disk": on_disk * LAYER + ROW
    }  # fmt: skip


def test_a_window_of_attention_bounds_what_the_cache_gives():
    whole, window = (exl.plan(shape=f"mistral-7b-v0.{n}", context=8192, vram="24GB").tokens[1] for n in (2, 1))
    assert sum(whole.memory.values()) - sum(window.memory.values()) == (8192 - 4096) * 32 * (2 * 8 * 128 * 2)


def test_a_tied_head_is_read_as_a_whole():
    (empty, _) = exl.plan(shape="qwen2.5-0.5b", vram="8GB").tokens
    dense = 151936 * 896 * 2
    matrices = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
    weights = 24 * matrices * (4 + 16 / 128) / 8
    assert dense + weights < sum(empty.memory.values()) < dense + 1.05 * weights


def test_gpus_take_turns():
    found = exl.plan(shape="llama-2-7b", vram=["2GB", "8GB"], context=512, vram_speed=["100GB", "400GB"])
    (empty, _) = found.tokens
    seconds = empty.memory["cuda:0"] / (100 * GB) + empty.memory["cuda:1"] / (400 * GB)
    assert empty.seconds(found.speeds) == pytest.approx(seconds)
    assert sum(empty.memory.values()) == 32 * LAYER + HEAD


def test_the_table_in_pinned_memory_gives_a_row_over_the_bus():
    """Wherever the plan puts the embedding: no special case for who moves it."""
    plan = seven(vram="8GB", embed="device")
    assert plan.tokens[0].links() == {"vram": 32 * LAYER + HEAD + ROW}
    engine_model = input_of("llama-2-7b", "8GB")

    def reads(tier: Tier) -> TokenBytes:
        return token_bytes(engine_model, replace(plan, placement=replace(plan.placement, embed=tier)), 0)

    moved_row = reads(Tier.PINNED)
    assert moved_row.links() == {"vram": 32 * LAYER + HEAD, "pcie": ROW}
    assert moved_row.unknown(Speeds(vram={"cuda:0": GB})) == []  # so few bytes need no figure
    assert reads(Tier.DISK).links() == {"vram": 32 * LAYER + HEAD, "pcie": ROW, "disk": ROW}
    assert reads(Tier.DEVICE).links() == plan.tokens[0].links()


def input_of(shape: str, vram: str):
    with _open_shape(None, shape, None, None, AS_IT_IS) as files:
        return plan_model(files, EngineOptions(vram=vram), Target("cuda", arch=86))[1]


TINY = layer_layout(
    BlobSpec(
        (NormSpec("attn_norm", 8), NormSpec("mlp_norm", 8)),
        tuple((name, (LinearSpec((MatrixSpec(name, 8, 8, 32, "f32"),)),)) for name in ("qkv", "o", "gate_up", "down")),
    ),
    Target("cpu"),
)


class CountingEngine(HostCopyEngine):
    num_bytes = 0

    def copy(self, dst, src, after):
        self.num_bytes += len(src)
        return super().copy(dst, src, after)


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("num_resident", [0, 1, 2])
@pytest.mark.parametrize("num_streamed", [1, 2, 3, 4, 5, 7])
def test_copies_are_those_that_a_stream_makes(num_streamed, num_resident, num_buffers):
    num_layers, num_buffers = num_resident + num_streamed, min(num_buffers, num_streamed)
    blobs = {i: torch.zeros(TINY.num_bytes, dtype=torch.uint8) for i in range(num_layers)}
    resident = {i: LayerWeights.view(TINY, blobs[i]) for i in range(num_resident)}
    streamed = list(range(num_resident, num_layers))
    engine = CountingEngine()
    stream = DeviceStream(
        [TINY] * num_layers,
        resident,
        [(streamed, PinnedLayers({i: blobs[i] for i in streamed}))],
        [torch.zeros(TINY.num_bytes, dtype=torch.uint8) for _ in range(num_buffers)],
        engine,
    )

    def run_passes(count: int) -> int:
        before = engine.num_bytes
        for _ in range(count):
            stream.begin(range(num_layers))
            for i in range(num_layers):
                stream.acquire(i)
                stream.release(i)
        return engine.num_bytes - before

    run_passes(2)
    moved = run_passes(6) // 6
    stream.close()
    tiers = [(Tier.DEVICE if i in resident else Tier.PINNED, "cuda:0") for i in range(num_layers)]
    plan = MemoryPlan((), Placement(tuple(tiers), Tier.PINNED), 64, 1, num_buffers)
    model = SimpleNamespace(
        layers=[TINY] * num_layers,
        experts=[None] * num_layers,
        expert_bytes=[0] * num_layers,
        head=SimpleNamespace(fields={}, linears={"head": ()}),
        embed=SimpleNamespace(linears={"embed": (next(iter(TINY.linears["o"])),)}),
        config=SimpleNamespace(windows=[None] * num_layers),
        kv_layout=SimpleNamespace(layer_bytes=lambda num_pages: 0),
    )
    (table,) = model.embed.linears["embed"]
    row = table.fields["weight"].num_bytes // table.spec.N
    assert token_bytes(model, plan, 0).pcie - row == moved


@pytest.mark.parametrize("num_resident", range(5))
def test_reads_are_those_that_a_stream_makes(num_resident, tmp_path, monkeypatch):
    """On the CPU: a model whose packed layers are read from the disk, token after token. A reader that is late finds
    more than one layer done, chooses better which one to overwrite and reads less than planned: here it never is."""
    options = EngineOptions(resident_layers=num_resident, packed_folder=tmp_path, context=64, device="cpu")
    engine = load_engine(BUNDLED_MODEL, options)
    try:
        source, generator = engine.weights.source, engine.generator
        release = source.release

        def release_and_wait(layer_idx: int) -> None:
            release(layer_idx)
            assert source.wait_until_idle()

        monkeypatch.setattr(source, "release", release_and_wait)
        sequence = generator.begin(20)

        def run_passes(count: int) -> int:
            source.wait_until_idle()
            before = source.stats.bytes_read
            for _ in range(count):
                generator.extend(sequence, [7])
            source.wait_until_idle()
            return source.stats.bytes_read - before

        run_passes(3)
        assert run_passes(4) == 4 * engine.plan.tokens[0].disk
        generator.end(sequence)
    finally:
        engine.close()


def simulated_seconds(num_resident: int, num_streamed: int, layer: float, copy: float, head: float) -> float:
    """Of a token in a steady state. A layer takes ``layer`` to compute, ``copy`` to fetch into one of two buffers,
    which is free once its last layer was computed."""
    end_of_copy = end_of_layer = 0.0
    free = [0.0, 0.0]
    ends = []
    for token in range(40):
        end_of_layer += num_resident * layer
        for i in range(num_streamed):
            buffer = (token * num_streamed + i) % 2
            end_of_copy = max(end_of_copy, free[buffer]) + copy
            end_of_layer = max(end_of_layer, end_of_copy) + layer
            free[buffer] = end_of_layer
        end_of_layer += head
        ends.append(end_of_layer)
    return (ends[-1] - ends[19]) / 20


times = st.floats(0.01, 10)


@given(st.integers(0, 40), st.integers(4, 40), times, times, times)
@settings(max_examples=300, deadline=None)
def test_the_bound_is_a_bound_and_close(num_resident, num_streamed, layer, copy, head):
    """With speeds of one byte a second, bytes are seconds."""
    whole = (num_resident + num_streamed) * layer + head
    token = TokenBytes(
        0,
        {"cuda:0": whole},
        {"cuda:0": num_resident * layer + head},
        num_streamed * copy,
        (num_streamed - 2) * copy,
        0,
        0,
    )
    bound = token.seconds(Speeds(vram={"cuda:0": 1}, pcie={"cuda:0": 1}))
    found = simulated_seconds(num_resident, num_streamed, layer, copy, head)
    assert bound <= found * (1 + 1e-9)
    assert found <= bound + 2 * layer + 2 * copy  # where the pipeline starts and ends


def test_a_sum_where_nothing_overlaps_and_a_maximum_where_all_does():
    mostly_resident = TokenBytes(0, {"cuda:0": 110}, {"cuda:0": 100}, 100, 98, 0, 0)
    speeds = Speeds(vram={"cuda:0": 1}, pcie={"cuda:0": 1})
    assert mostly_resident.seconds(speeds) == 198
    nothing_resident = TokenBytes(0, {"cuda:0": 90}, {"cuda:0": 0}, 100, 98, 0, 0)
    assert nothing_resident.seconds(speeds) == 100
    assert nothing_resident.seconds(Speeds(vram={"cuda:0": 1}, pcie={"cuda:0": 1}, ram=0.5)) == 200  # copies read RAM


def test_speed_is_told_with_its_figures():
    found = seven(vram="3GB", context=512, vram_speed="360GB", pcie="12GB/s", depth=0)
    (token,) = found.tokens
    seconds = token.seconds(found.speeds)
    first, how = found.speed_lines
    assert first.startswith("a token reads 3.60 GB of VRAM and 1.")
    assert f"at most about {1 / seconds:.2g} tokens/s" in first or f"at most about {1 / seconds:.0f} tokens/s" in first
    assert how.startswith("a bound, not measured, from VRAM 360 GB/s and PCIe 12 GB/s; copies over PCIe run beside")
    assert found.to_json()["tokens"] == [
        {"depth": 0, "bytes": token.links(), "most_tokens_per_second": round(1 / seconds, 2)}
    ]
    sheet = seven(gpu="RTX 3060 12GB")
    assert "VRAM 360 GB/s by the data sheet" in sheet.table()


def test_the_cpu_reads_its_memory_and_the_disk():
    found = seven(ram="3GB", kv_cache="q4", disk="2GB", ram_speed="20GB", depth=0)
    (token,) = found.tokens
    assert token.links().keys() == {"ram", "disk"}
    (buffers,) = [line.num_bytes for line in found.lines if line.purpose == "stream buffers"]
    assert token.disk == found.placement.num_streamed * buffers // 2
    assert token.seconds(found.speeds) >= token.disk / (2 * GB)
    assert "RAM 20 GB/s and disk 2 GB/s" in found.speed_lines[-1]
    unknown = seven(ram="3GB", kv_cache="q4", ram_speed="20GB")
    assert unknown.speed_lines[-1] == "no bound of the speed without disk="
