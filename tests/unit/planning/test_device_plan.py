"""Plans for GPUs, without a GPU: budgets, placement, the order in which layers are moved, and the plan's lines."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl
import exl.engine.build
from benchmarks.synthetic import write_headers
from exl.errors import ConfigError, MemoryBudgetError, UnsupportedModelError
from exl.layout.layers import linear_layout, tile_layout
from exl.layout.specs import LinearSpec, MatrixSpec, Target
from exl.layout.tiles import TileLayout
from exl.planning.devices import HOST, STARTED_LINES, segment_bytes, started_bytes, usable_bytes
from exl.planning.html import COLORS
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan, Placement, PlanLine, Tier
from exl.planning.shapes import SHAPES, ModelShape
from exl.units import format_bytes
from tests.command_line import run_exl

SM86 = Target("cuda", arch=86)
GB = 10**9


def lines_of(found, device):
    return {line.purpose: line.num_bytes for line in found.lines if line.device == device}


def test_a_7b_by_hand(seven):
    """Every number by hand from the model's shapes: 4-bit symmetric codes and one f16 scale per group of 128."""
    found = seven(vram="8GB", kv_cache="q4")
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    norms = 32 * 2 * 4096 * 4
    lines = lines_of(found, "cuda:0")
    assert lines["resident layers"] == weights // 2 + weights // 128 * 2 + norms
    assert "embedding" not in lines
    assert lines_of(found, HOST)["embedding"] == 32000 * 4096 * 2
    assert lines["head and final norm"] == 32000 * 4096 * 2 + 4096 * 4
    # 9,216 bytes per head and page of 64 tokens, at q4 and 128 channels.
    assert lines["KV cache"] == 32 * 32 * (4096 // 64) * 9216
    assert lines["residual stream"] == (4096 + 64) * 4096 * 4  # a prompt's window, and decode rows with drafts
    assert found.placement.num_streamed == 0
    assert found.fits
    assert found.budgets == {"cuda:0": 8 * GB}


def test_slabs_are_rounded_as_torch_does():
    """c10/cuda/CUDACachingAllocator: small blocks share 2 MiB, up to 10 MiB get 20 MiB, others round to 2 MiB."""
    MiB = 1 << 20
    expected = {0: 0, 1: 2, MiB: 2, MiB + 1: 20, 10 * MiB - 1: 20, 10 * MiB: 10, 10 * MiB + 1: 12, 100 * MiB: 100}
    assert {size: segment_bytes(size) for size in expected} == {size: n * MiB for size, n in expected.items()}


BUDGETS = st.lists(st.integers(1, 60), min_size=1, max_size=3)  # in 100 MB


@given(BUDGETS, st.one_of(st.none(), st.integers(3, 50)), st.integers(1, 2000), st.sampled_from(["f16", "q8", "q4"]))
@settings(max_examples=60, deadline=None)
def test_every_layer_has_one_place_and_no_budget_is_exceeded(seven, sizes, ram, context, kv_cache):
    vram = [size * GB // 10 for size in sizes]
    options = {"vram": vram, "ram": None if ram is None else ram * GB // 10, "context": context, "kv_cache": kv_cache}
    try:
        found = seven(**options)
    except MemoryBudgetError:
        return
    layers = found.placement.layers
    assert len(layers) == 32
    names = [name for _, name in layers]
    assert names == sorted(names)
    assert set(names) <= {f"cuda:{i}" for i in range(len(vram))}
    tiers = [tier for tier, _ in layers]
    order = [Tier.DEVICE, Tier.PINNED, Tier.DISK]
    assert tiers == sorted(tiers, key=order.index)  # resident first, then pinned, then on disk
    for i, size in enumerate(vram):
        assert found.device_bytes(f"cuda:{i}") <= size
    if ram is not None:
        assert found.device_bytes(HOST) <= ram * GB // 10
    # Every byte of every layer is on a line, and each layer's cache is on a GPU.
    with_layers = ("resident layers", "KV cache")
    blob = 202_375_168 // 2 + 202_375_168 // 128 * 2 + 2 * 4096 * 4
    held = {purpose: sum(line.num_bytes for line in found.lines if line.purpose == purpose) for purpose in with_layers}
    assert held["KV cache"] == 32 * found.num_pages * 32 * head_page_bytes(kv_cache)
    assert held.get("resident layers", 0) == tiers.count(Tier.DEVICE) * blob
    assert lines_of(found, HOST).get("pinned layers", 0) == tiers.count(Tier.PINNED) * blob


def head_page_bytes(kind: str) -> int:
    return {"f16": 2 * 64 * 128 * 2, "q8": 2 * 64 * (128 + 8), "q4": 2 * 64 * (64 + 8)}[kind]


@given(st.integers(20, 60), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_more_memory_never_streams_more(seven, tenth_of_gb, more):
    few, many = (seven(vram=n * GB // 10, context=512) for n in (tenth_of_gb, tenth_of_gb + more))
    assert many.placement.num_streamed <= few.placement.num_streamed


@pytest.mark.parametrize("limit", [0, 1 * GB, 2 * GB, 100 * GB])
def test_what_may_not_be_pinned_is_on_the_disk(seven, monkeypatch, limit):
    """Windows allows about half of the RAM to be page-locked. All locked bytes count, and the plan says so."""
    unlimited = seven(vram="3700MB")
    monkeypatch.setattr("exl.planning.from_headers.pinned_limit", lambda: limit)
    found = seven(vram="3700MB")
    assert found.fits
    assert len(found.placement.resident) == len(unlimited.placement.resident)
    locked = sum(line.num_bytes for line in found.lines if line.device == HOST and line.exact)
    pinned_layers = len(found.placement.on_tier(Tier.PINNED))
    (note,) = [line.note for line in found.lines if line.purpose == "pinned layers"] or [""]
    if limit == 100 * GB:
        assert found == unlimited
        assert "pinned" not in note
        return
    assert pinned_layers < len(unlimited.placement.on_tier(Tier.PINNED))
    assert len(found.placement.on_tier(Tier.DISK)) == found.placement.num_streamed - pinned_layers
    if limit == 0:
        assert pinned_layers == 0
        return
    layer = lines_of(found, HOST)["pinned layers"] // pinned_layers
    assert limit - layer < locked <= limit
    assert note == f"{pinned_layers} of 32, {format_bytes(limit)} may be pinned"


def test_one_layer_more_would_not_fit(seven):
    """The plan uses its budget: one more resident layer would exceed it, or two if an odd number cannot be streamed."""
    found = seven(vram="3GB", context=512)
    assert 0 < found.placement.num_streamed < 32
    resident = 32 - found.placement.num_streamed
    more = 1 + (found.placement.num_streamed - 1) % 2
    layer = lines_of(found, "cuda:0")["resident layers"] // resident
    assert found.device_bytes("cuda:0") <= 3 * GB < found.device_bytes("cuda:0") + more * layer


def test_gpus_are_filled_in_order(seven):
    found = seven(vram=["2GB", "8GB"], context=512)
    names = [name for _, name in found.placement.layers]
    assert 0 < names.count("cuda:0") < names.count("cuda:1")
    assert found.placement.num_streamed == 0
    assert "embedding" not in lines_of(found, "cuda:1")
    assert "head and final norm" not in lines_of(found, "cuda:0")
    # One GPU is enough: the second is not used.
    assert {name for _, name in seven(vram=["8GB", "8GB"], context=512).placement.layers} == {"cuda:0"}


def test_a_tied_head_is_a_copy_on_the_last_gpu():
    """The first GPU has the embedding, the last one the head: the same weights, on both."""
    table = 151936 * 2048 * 2
    one, two = (exl.plan(shape="qwen2.5-3b", vram=vram, context=512) for vram in ("8GB", ["2GB", "8GB"]))
    assert [lines_of(one, "cuda:0")[name] for name in ("embedding", "head and final norm")] == [table, 2048 * 4]
    assert lines_of(two, "cuda:0")["embedding"] == table
    assert lines_of(two, "cuda:1")["head and final norm"] == table + 2048 * 4


def test_the_largest_context_that_fits_without_streaming(seven):
    found = seven(vram="6GB", context="auto")
    assert found.fits
    assert not found.placement.num_streamed
    assert found.context < 4096
    tokens = found.context + 64
    assert seven(vram="6GB", context=tokens).placement.num_streamed > 0


def test_what_cannot_fit_says_what_would(seven):
    with pytest.raises(MemoryBudgetError, match=r"vram='\d+MB' or more") as error:
        seven(vram="1GB")
    enough = int(str(error.value).split("vram='")[1].split("MB")[0])
    assert seven(vram=f"{enough}MB").fits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vram": "banana"}, ["vram", "banana"]),
        ({"vram": []}, ["vram", "empty"]),
        ({"vram": "8GB", "device": "cpu"}, ["vram", "cpu"]),
        ({"device": "tpu"}, ["tpu", "'cuda'"]),
        ({"vram": ["8GB", "x"]}, ["vram", "'x'"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        EngineOptions(**options)
    assert all(word in str(error.value) for word in words)


def test_f32_pages_are_the_cpus(seven):
    with pytest.raises(ConfigError, match="'f32'"):
        seven(vram="24GB", kv_cache="f32")


@pytest.mark.parametrize(("head_dim", "taken"), [(36, False), (40, True), (256, True), (264, False)])
def test_head_sizes_that_no_kernel_reads_are_named(tmp_path, head_dim, taken):
    write_headers(tmp_path, ModelShape("llama", 256, 512, 2, 32, 32, head_dim, 320, 4096))
    exl.plan(tmp_path)  # the CPU takes all
    expected = nullcontext() if taken else pytest.raises(ConfigError, match=f"head size of {head_dim}, a GPU takes")
    with expected:
        exl.plan(tmp_path, vram="8GB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [{"vram": "8GB"}, {"device": "cuda"}])
def test_a_gpu_that_is_not_there_is_named_before_anything_is_loaded(options):
    (asked,) = options.values()
    with pytest.raises(ConfigError, match=f"{asked}'?: found no GPU that exl can use"):
        exl.load(**options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("K", "N", "group"), [(4096, 4096, 128), (288, 72, 32), (11008, 4100, 64), (704, 24, 256), (320, 24, 320)]
)
@pytest.mark.parametrize(
    ("gated", "scale_dtype", "symmetric"), [(False, "f16", True), (True, "f16", False), (True, "f32", False)]
)
def test_a_linear_takes_what_its_tiles_take(bits, K, N, group, gated, scale_dtype, symmetric):
    names, order = (("g", "u") if gated else ("m",)), "order"
    parts = tuple(MatrixSpec(n, K, N, bits, "u8", group, True, order, symmetric, scale_dtype) for n in names)
    spec = LinearSpec(parts, gated)
    layout, tiles = linear_layout(spec, SM86), tile_layout(spec)
    assert tiles.num_tiles == math.ceil(N / 8 if gated else N / 16)
    fields = layout.fields
    assert fields["codes"].num_bytes == tiles.codes_bytes == tiles.num_tiles * 16 * padded(K, bits) * bits // 8
    # Per row a group takes a scale of 2 or 4 bytes, and half a byte of zero point (8 bits: one byte).
    zeros = 0 if symmetric else 16 if bits == 8 else 8
    groups = -(-padded(K, bits) // group)
    assert fields["qparams"].num_bytes == tiles.num_tiles * groups * ({"f16": 2, "f32": 4}[scale_dtype] * 16 + zeros)
    assert fields["bias"].shape == (16 * tiles.num_tiles,)
    assert fields["channel_map"].shape == (K,)
    ends = [0, *(field.offset + field.num_bytes for field in fields.values())]
    assert all(field.offset >= end for field, end in zip(fields.values(), ends, strict=False))
    assert ends[-1] <= layout.num_bytes < ends[-1] + 64


def padded(K: int, bits: int) -> int:
    stage = {2: 256, 3: 256, 4: 128, 8: 128}[bits]
    return -(-K // stage) * stage


def test_symmetric_matrices_store_no_zeros():
    def fields(symmetric):
        spec = LinearSpec((MatrixSpec("m", 4096, 4096, 4, "u8", 128, symmetric=symmetric),))
        return linear_layout(spec, SM86).fields

    assert fields(False)["qparams"].num_bytes - fields(True)["qparams"].num_bytes == 4096 // 16 * 32 * 8


def test_dense_weights_are_bf16_where_tensor_cores_take_it():
    spec = LinearSpec((MatrixSpec("d", 64, 32, 16, "bf16"),))
    assert linear_layout(spec, SM86).fields["weight"].dtype == "bf16"
    assert linear_layout(spec, Target("cuda", arch=75)).fields["weight"].dtype == "f16"


def test_a_group_that_no_kernel_takes_is_named():
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.q: group size 96"):
        linear_layout(LinearSpec((MatrixSpec("layers.0.q", 192, 32, 4, "u8", 96),)), SM86)
    assert TileLayout(4, 192, 32, 192, True).num_groups == 2  # one group is allowed, and padded


def test_the_command_prints_a_hypothetical_card(tmp_path):
    write_headers(tmp_path / "70b", SHAPES["llama-2-70b"], num_shards=15)
    command = ["plan", tmp_path / "70b", "--vram", "24GB,24GB", "--ram", "32GB"]
    done = run_exl(*command, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["budgets"] == {"cuda:0": 24 * GB, "cuda:1": 24 * GB, "ram": 32 * GB}
    assert found["layers"] == {"resident": 80, "pinned": 0, "disk": 0}
    table = run_exl(*command).stdout
    assert "resident layers" in table
    assert "cuda:1" in table
    assert table.count("fits") == 3


def test_a_notebook_sees_a_bar_for_each_memory(folder_7b):
    found = exl.plan(folder_7b, vram=["2GB", "8GB"], context=512)
    html = found._repr_html_()
    parts = re.findall(r'class="exl-part" title="([^"]+)" style="width: ([\d.]+)%; (background: [^"]+)"', html)
    assert [title.split(":")[0] for title, _, _ in parts] == [line.purpose for line in found.lines]
    shares = [
        100 * line.num_bytes / found.budgets.get(line.device, found.device_bytes(line.device)) for line in found.lines
    ]
    assert [float(width) for _, width, _ in parts] == pytest.approx(shares, abs=1e-3)
    assert ["gradient" not in fill for _, _, fill in parts] == [line.exact for line in found.lines]  # hatched: a bound
    for line in found.lines:
        assert f"{'' if line.exact else '≤ '}{format_bytes(line.num_bytes)}</td>" in html
    assert "<b>cuda:1</b>" in html
    assert "of 8.00 GB" in html
    assert "does not fit" not in html
    assert str(found) == found.table()


def test_every_purpose_has_its_colour(folder_7b):
    plans = [exl.plan(ram="1GB", resident_layers=3), exl.plan(folder_7b, vram="4GB", context=512)]
    plans.append(exl.plan(folder_7b, vram="2GB", ram="2GB", context=512))
    purposes = {line.purpose for plan in plans for line in plan.lines}
    assert {"pinned layers", "pinned read buffers", "stream buffers", "loading", "tokenizer"} <= purposes
    assert purposes <= COLORS.keys()


def test_a_bar_that_is_too_long_says_so_and_text_is_escaped():
    lines = (PlanLine("<KV> & more", "cpu", 75, True, '"note"'), PlanLine("temporaries", "cpu", 25, False))
    html = MemoryPlan(lines, Placement(()), 64, 1, 0, {"cpu": 80})._repr_html_()
    assert "&lt;KV&gt; &amp; more" in html
    assert "<KV>" not in html
    assert "does not fit" in html
    assert re.findall(r"width: ([\d.]+)%;", html)[:2] == ["75.000", "25.000"]  # shares of the sum: no part is cut off


def test_the_function_and_the_command_agree(folder_7b):
    done = run_exl("plan", folder_7b, "--vram", "6GB", "--kv-cache", "q4")
    assert done.stdout == exl.plan(folder_7b, vram="6GB", kv_cache="q4").table() + "\n"


def test_some_of_the_free_memory_is_left_alone(folder_7b):
    """512 MiB; 1 GiB on Windows. The context and cuBLAS already have their memory then, and the plan counts it."""
    plan = exl.plan(folder_7b, vram="24GB", arch=90)
    lines = [line.num_bytes for line in plan.lines if line.purpose in STARTED_LINES]
    assert len(lines) == 2
    assert sum(lines) == started_bytes(90) == (500 + 32) << 20
    assert started_bytes(89) == (508 << 20) + (128 << 10)
    for system, margin in (("linux", 512 << 20), ("win32", 1 << 30)):
        usable = usable_bytes(8 * GB, 90, system)
        others = usable - sum(lines)  # still to be allocated
        assert others == 8 * GB - margin
        assert usable_bytes(100 << 20, 90, system) >= 1


def test_a_plan_is_held_against_what_is_free_now(folder_7b, monkeypatch):
    """The check leaves out context and cuBLAS, because they are already allocated when free memory is read."""
    plan = exl.plan(folder_7b, vram="24GB", arch=89, context=1024)
    gpu = SimpleNamespace(device=torch.device("cuda", 0), arch=89)
    needed = plan.device_bytes("cuda:0") - started_bytes(89)
    for free in (needed, needed - 1):
        monkeypatch.setattr(exl.engine.build, "free_bytes", lambda device, free=free: (free, 24 * GB))
        with nullcontext() if free == needed else pytest.raises(MemoryBudgetError, match="a smaller vram="):
            exl.engine.build._check_device(plan, gpu)
