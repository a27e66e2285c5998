"""Where plans put the embedding: pinned RAM, VRAM or the disk; every line by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl
from benchmarks.synthetic import write_headers
from exl.errors import ConfigError, ExlError, MemoryBudgetError
from exl.layout.specs import Target
from exl.planning.devices import HOST
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan, Tier
from exl.planning.shapes import ModelShape
from tests.command_line import run_exl

GB = 10**9
TABLE = 32000 * 4096 * 2  # bytes of a 7B's embedding
WINDOW_ROWS = (4096 + 64) * 4096 * 2  # 16-bit rows of a window of 4096 tokens, and decode rows with drafts
TIED = Path(__file__).parents[2] / "data" / "stories260K"  # its embedding is also its head


def lines_of(plan: MemoryPlan) -> dict[tuple[str, str], int]:
    """Bytes of the embedding's lines by device and purpose. All are exact."""
    found = [line for line in plan.lines if line.purpose.startswith("embedding")]
    assert all(line.exact for line in found)
    return {(line.device, line.purpose): line.num_bytes for line in found}


def test_every_place_by_hand(seven):
    pinned, device, disk = (seven(vram="8GB", embed=embed) for embed in ("auto", "device", "disk"))
    assert lines_of(pinned) == {(HOST, "embedding"): TABLE}
    assert lines_of(device) == {("cuda:0", "embedding"): TABLE}
    # On the GPU once, in RAM twice: one is filled while the other is copied.
    rows = "embedding rows"
    assert lines_of(disk) == {("cuda:0", rows): WINDOW_ROWS, (HOST, rows): 2 * WINDOW_ROWS}
    assert [plan.placement.embed for plan in (pinned, device, disk)] == [Tier.PINNED, Tier.DEVICE, Tier.DISK]
    assert [plan.to_json()["embedding"] for plan in (pinned, device, disk)] == ["pinned", "resident", "disk"]
    assert "pinned, the GPU reads its rows" in pinned.table()
    assert "from the disk: a step waits for its ids" in disk.table()
    # VRAM is what the table has left, up to the rounding to segments of 2 MiB.
    freed = device.device_bytes("cuda:0") - pinned.device_bytes("cuda:0")
    assert abs(freed - TABLE) < 4 << 20


def test_rows_on_the_gpu_are_at_most_the_table(tmp_path):
    """A vocabulary smaller than a window has no more rows than tokens."""
    write_headers(tmp_path, ModelShape("llama", 256, 512, 2, 4, 4, 64, 320, 512))
    plan = exl.plan(tmp_path, vram="8GB", embed="disk")
    assert lines_of(plan)["cuda:0", "embedding rows"] == 320 * 256 * 2


def test_a_card_keeps_more_layers(seven):
    """What the embedding leaves is used for layers."""
    pinned, device = (seven(vram="4GB", embed=embed) for embed in ("auto", "device"))
    assert len(pinned.placement.resident) > len(device.placement.resident)


def test_the_first_of_several_gpus_reads_the_rows(seven):
    for embed, expected in (("device", "embedding"), ("disk", "embedding rows")):
        plan = seven(vram=["3GB", "8GB"], context=512, embed=embed)
        assert {name for _, name in plan.placement.layers} == {"cuda:0", "cuda:1"}
        assert [device for device, purpose in lines_of(plan) if device != HOST] == ["cuda:0"]
        assert ("cuda:0", expected) in lines_of(plan)
    assert lines_of(seven(vram=["3GB", "8GB"], context=512)) == {(HOST, "embedding"): TABLE}


def test_an_embedding_that_is_also_the_head_stays():
    options = {"vram": "2GB", "arch": 86}
    plans = [exl.plan(TIED, **options, embed=embed) for embed in ("auto", "device")]
    assert plans[0] == plans[1]
    assert plans[0].placement.embed is Tier.DEVICE
    with pytest.raises(ConfigError, match=r"embed: found 'disk', but the embedding of .*stories260K is also its head"):
        exl.plan(TIED, **options, embed="disk")
    rounded = exl.plan(TIED, **options, head=8)  # the head has its own copy
    assert rounded.placement.embed is Tier.PINNED
    assert exl.plan(TIED, **options, head=8, embed="disk").placement.embed is Tier.DISK


@pytest.mark.parametrize("value", ["pinned", "gpu", "", None, True, 8])
def test_other_values_are_refused(folder_7b, value):
    with pytest.raises(ConfigError, match=r"embed: found .*, expected one of auto, device, disk") as caught:
        exl.plan(folder_7b, vram="8GB", embed=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", ["device", "disk"])
def test_a_cpu_has_no_other_place(folder_7b, value):
    expected = f"embed: found '{value}', which is for a GPU; a CPU has the embedding in RAM: expected 'auto'"
    with pytest.raises(ConfigError, match=expected):
        exl.plan(folder_7b, embed=value)
    with pytest.raises(ConfigError, match=expected):
        exl.load(TIED, "cpu", embed=value)
    plan = exl.plan(folder_7b)
    assert lines_of(plan) == {("cpu", "embedding"): TABLE}
    assert plan.placement.embed is Tier.DEVICE


def test_short_ram_is_for_layers_first(seven):
    """A layer that is read from the disk costs much more time than a row that is."""
    plan = seven(vram="3700MB", ram="1GB", max_sequences=1)
    assert plan.fits
    assert plan.placement.on_tier(Tier.DISK)
    assert plan.placement.embed is Tier.DISK
    forced = seven(vram="3700MB", ram="1GB", max_sequences=1, embed="device")
    assert len(plan.placement.on_tier(Tier.DISK)) < len(forced.placement.on_tier(Tier.DISK))


def test_where_ram_is_short_and_vram_is_not_the_embedding_is_on_the_gpu(seven):
    """Both would keep all layers: the disk is the last choice."""
    least = seven(vram="12GB", embed="device").device_bytes(HOST)
    plan = seven(vram="12GB", ram=least)
    assert plan.fits
    assert plan.placement.embed is Tier.DEVICE
    assert seven(vram="12GB", ram=least + TABLE).placement.embed is Tier.PINNED


@pytest.mark.parametrize(("limit", "expected"), [(100 << 20, Tier.DEVICE), (300 << 20, Tier.PINNED)])
def test_what_may_not_be_locked_is_not_in_pinned_ram(seven, monkeypatch, limit, expected):
    monkeypatch.setattr("exl.planning.from_headers.pinned_limit", lambda: limit)
    plan = seven(vram="12GB")
    assert plan.placement.embed is expected
    assert not plan.placement.num_streamed


@given(st.integers(20, 120), st.one_of(st.none(), st.integers(3, 60)), st.one_of(st.none(), st.integers(0, 40)))
@settings(max_examples=40, deadline=None)
def test_auto_is_never_worse_than_a_place_of_ones_choice(folder_7b, vram, ram, limit):
    """It fits whenever one of them does, and reads and streams no more layers."""
    with pytest.MonkeyPatch.context() as patch, open_model(folder_7b) as files:
        locked = None if limit is None else limit * GB // 10
        patch.setattr("exl.planning.from_headers.pinned_limit", lambda: locked)
        found = {}
        for embed in ("auto", "device", "disk"):
            options = EngineOptions(
                vram=vram * GB // 10, ram=None if ram is None else ram * GB // 10, context=1024, embed=embed
            )
            try:
                placement = plan_model(files, options, Target("cuda", arch=86))[0].placement
            except MemoryBudgetError:
                continue
            found[embed] = len(placement.on_tier(Tier.DISK)), placement.num_streamed
    assert ("auto" in found) >= bool(found)
    for cost in found.values():
        assert found["auto"] <= cost


def test_what_does_not_fit_in_vram_says_that_it_need_not_be_there(seven):
    least = seven(vram="4GB", context=512, resident_layers=0)
    budget = least.device_bytes("cuda:0")
    with pytest.raises(ExlError, match="embed='auto'"):
        seven(vram=budget, context=512, embed="device")
    assert seven(vram=budget, context=512).fits


def test_the_command_has_the_option(folder_7b):
    done = run_exl("plan", folder_7b, "--vram", "8GB", "--embed", "device", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["embedding"] == "resident"
    refused = run_exl("plan", folder_7b, "--vram", "8GB", "--embed", "cpu")
    assert refused.returncode == 1
    assert "embed: found 'cpu', expected one of auto, device, disk" in refused.stderr
    for command in ("generate", "chat", "bench", "eval"):
        assert "--embed" in run_exl(command, "--help").stdout
