"""The first line of a plan, what follows it, and where it is shown."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest

import exl
from exl.errors import ExlWarning, MemoryBudgetError
from exl.layout.specs import Target
from exl.memory.host import system_ram
from exl.ops.cpu_target import COMPILED
from exl.planning import ask
from exl.planning.machine import Links, describe_machine
from exl.planning.plan import MemoryPlan, Placement, PlanLine, Tier
from exl.planning.verdict import Note
from exl.units import short_bytes
from tests.command_line import run_exl

GB = 10**9


def made(tiers: str, sizes: dict[str, float], budgets: dict[str, float], gpu: str = "") -> MemoryPlan:
    """``tiers``: a letter for each layer: d(evice), p(inned), (dis)k; ``gpu``: the number of each layer's GPU, empty:
    the CPU. Sizes and budgets in GB."""
    tier = {"d": Tier.DEVICE, "p": Tier.PINNED, "k": Tier.DISK}
    devices = [f"cuda:{n}" for n in gpu] or ["cpu"] * len(tiers)
    lines = tuple(PlanLine("all", device, int(size * GB), True) for device, size in sizes.items())
    placement = Placement(tuple((tier[x], device) for x, device in zip(tiers, devices, strict=True)))
    return MemoryPlan(lines, placement, 64, 1, 2, {device: int(size * GB) for device, size in budgets.items()})


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (made("dddd", {"cpu": 5.2}, {}), "all 4 layers in RAM; needs 5.2 GB"),
        (made("ddkk", {"cpu": 3.93}, {"cpu": 4}), "2 of 4 layers in RAM, 2 streamed from the disk; needs 3.93 of 4 GB"),
        (
            made("d" * 22 + "p" * 10, {"cuda:0": 5.9, "ram": 2.1}, {"cuda:0": 6}, "0" * 32),
            "22 of 32 layers in VRAM, 10 streamed from RAM; needs 5.9 of 6 GB of VRAM and 2.1 GB of RAM",
        ),
        (
            made("dppk", {"cuda:0": 0.9, "ram": 1.5}, {"cuda:0": 1, "ram": 2}, "0000"),
            "1 of 4 layers in VRAM, 3 streamed (2 from RAM and 1 from the disk); "
            "needs 900 MB of 1 GB of VRAM and 1.5 of 2 GB of RAM",
        ),
        (
            made("dddd", {"cuda:0": 5, "cuda:1": 3.25}, {"cuda:0": 6, "cuda:1": 6}, "0001"),
            "all 4 layers in VRAM (3 on cuda:0, 1 on cuda:1); "
            "needs 5 of 6 GB of VRAM on cuda:0 and 3.25 of 6 GB of VRAM on cuda:1",
        ),
        (
            made("pppp", {"cuda:0": 5, "ram": 1}, {"cuda:0": 4}, "0000"),
            "does not fit: lacks 1 GB of VRAM, with every layer streamed; needs 5 of 4 GB of VRAM and 1 GB of RAM",
        ),
        (
            made("kk", {"cpu": 0.5}, {"cpu": 0.499}),
            "does not fit: lacks 1 MB of RAM, with every layer streamed; needs 500 of 499 MB",
        ),
    ],
    ids=["cpu", "cpu-streamed", "gpu", "gpu-and-disk", "gpus", "gpu-lacks", "cpu-lacks"],
)
def test_verdicts(plan, expected):
    assert plan.verdict == expected
    assert plan.table().startswith(f"{expected}\n\n")
    assert repr(plan) == f"MemoryPlan({expected}; 64 tokens)"
    assert plan.to_json()["verdict"] == expected
    assert f">{expected}</b>" in plan._repr_html_()


def test_sizes_are_short():
    assert [short_bytes(n) for n in (0, 5, 6 * GB, 5_930_000_000, 12_000, 10 * GB, 100 * GB)] == [
        "0 B", "5 B", "6 GB", "5.93 GB", "12 KB", "10 GB", "100 GB"
    ]  # fmt: skip


def test_real_plans_have_a_verdict():
    assert exl.plan().verdict.startswith("all 5 layers in RAM; needs ")
    found = exl.plan(shape="llama-2-7b", vram="3GB", context=512, ram="1500MB")
    counts = found.layer_counts
    assert found.verdict.startswith(
        f"{counts['resident']} of 32 layers in VRAM, {32 - counts['resident']} streamed "
        f"({counts['pinned']} from RAM and {counts['disk']} from the disk); needs 2."
    )


def test_what_is_missing_is_said_with_what_would_fit():
    with pytest.raises(MemoryBudgetError) as caught:
        exl.plan(shape="llama-2-7b", vram="1GB")
    first, second, *_ = str(caught.value).splitlines()
    lacks = re.search(r"the budget is 1\.00 GB: ([\d.]+ .B) too little\. Would fit: vram=", first)
    assert lacks
    assert second.startswith(f"does not fit: lacks {lacks[1]} of VRAM, with every layer streamed; needs ")


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        ((24 * GB, 20 * GB), r"^needs 3\d\.\d+ GB of RAM; this machine has 24\.00 GB$"),
        ((64 * GB, 20 * GB), r"^needs 3\d\.\d+ GB of RAM; 20\.00 GB of this machine's 64\.00 GB are free now$"),
        ((64 * GB, 60 * GB), None),
        ((64 * GB, None), None),
        ((None, None), None),
    ],
)
@pytest.mark.parametrize("options", [{}, {"vram": "8GB"}], ids=["cpu", "gpu"])
def test_a_plan_larger_than_the_machine_says_so(monkeypatch, options, ram, expected):
    monkeypatch.setattr("exl.planning.notes.system_ram", lambda: ram)
    found = exl.plan(shape="llama-2-70b", kv_cache="q4", context=512, **options)
    if expected is None:
        assert found.warnings == ()
        return
    (text,) = found.warnings
    assert re.search(expected, text)
    assert f"\nwarning: {text}\n" in found.table()
    assert found.to_json()["warnings"] == [text]
    assert text.replace("'", "&#x27;") in found._repr_html_()


def test_a_budget_within_the_machine_is_no_warning(monkeypatch):
    monkeypatch.setattr("exl.planning.notes.system_ram", lambda: (24 * GB, 20 * GB))
    assert exl.plan(shape="llama-2-70b", ram="16GB", context=512).warnings == ()


def test_this_machine_tells_its_ram():
    total, available = system_ram()
    assert total is None or total > 1 << 28
    assert available is None or 0 < available <= total


@pytest.mark.parametrize(("limit", "total"), [(1 << 30, 1 << 30), (1 << 60, None), ("max", None)])
def test_a_container_has_what_it_may_use(monkeypatch, tmp_path, limit, total):
    plain, _ = system_ram()
    if plain is None:
        pytest.skip("this system does not tell its RAM")
    monkeypatch.setattr("exl.control_groups._ROOT", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    found, available = system_ram()
    assert found == total or (total is None and found >= plain)
    assert available is None or available <= found


def test_windows_tells_its_ram():
    from exl.memory.virtual import available_ram, total_ram
    from tests.host.fake_windows import FakeKernel32

    kernel32 = FakeKernel32(32 << 30)
    assert (total_ram(kernel32), available_ram(kernel32)) == (32 << 30, 16 << 30)


def test_a_context_beyond_the_models_own_warns():
    text = "a context of 600 tokens is longer than the model's own, 512 (max_position_embeddings): "
    text += "beyond it answers get worse"
    assert exl.plan(context=512).warnings == ()
    assert exl.plan(context=600).warnings == (text,)
    assert f"\nwarning: {text}\n" in run_exl("plan", "--context", "600").stdout
    assert json.loads(run_exl("plan", "--context", "600", "--json").stdout)["warnings"] == [text]
    with pytest.warns(ExlWarning, match=re.escape(text)) as caught:
        exl.load(context=600, device="cpu").close()
    assert [warning.filename for warning in caught] == [__file__]  # the line that called exl, not one inside of it
    done = run_exl("generate", "Once", "--context", "600", "--max-tokens", "2", "--device", "cpu")
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, f"exl: warning: {text}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExlWarning)
        exl.load(context=512, device="cpu").close()


def test_several_gpus_are_planned_and_not_computed_on():
    two = exl.plan(shape="llama-2-7b", vram=["2GB", "8GB"], context=512)
    assert two.warnings == ("a plan for 2 GPUs: this version of exl computes on one",)
    assert exl.plan(shape="llama-2-7b", vram=["8GB", "8GB"], context=512).warnings == ()  # one is enough


def advice(**options) -> list[str]:
    return [note.text for note in exl.plan(**options).notes if note.kind == "advice"]


def test_what_a_rounded_head_would_gain():
    """By hand: 32000 x 4096 in f16, against 8-bit codes with an f16 scale and a zero of a byte for 128 of them."""
    rounded, dense = 32000 * 4096 * (1 + 3 / 128), 32000 * 4096 * 2
    (text,) = advice(shape="llama-2-7b", vram="8GB")
    saved = re.fullmatch(r"head=8 would save ([\d.]+) MB, (\d+) % of a token's bytes", text)
    assert float(saved[1]) == pytest.approx((dense - rounded) / 1e6, abs=0.01)
    plain, with_head = (exl.plan(shape="llama-2-7b", vram="8GB", head=head).tokens[0] for head in ("file", 8))
    gained = plain.links()["vram"] - with_head.links()["vram"]
    assert float(saved[1]) == pytest.approx(gained / 1e6, abs=0.01)
    assert int(saved[2]) == round(100 * gained / plain.links()["vram"])
    assert advice(shape="llama-2-7b", vram="8GB", head=8) == []


def test_a_tied_head_gains_bytes_for_memory():
    table = 128256 * 2048 * 2
    rounded = table // 2 * (1 + 3 / 128)
    for embed, memory, more in (("auto", "RAM", table), ("device", "VRAM", rounded)):
        (text,) = advice(shape="llama-3.2-1b", vram="8GB", embed=embed)
        costs = re.fullmatch(
            rf"head=8 would save [\d.]+ MB, 2\d % of a token's bytes, for ([\d.]+) MB more of {memory}", text
        )
        assert float(costs[1]) == pytest.approx(more / 1e6, rel=0.2)


def plan_for(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for a CPU are for ``target``, whatever this machine's CPU can run."""
    machine = replace(describe_machine(None, None, None, Links()), target=target)
    monkeypatch.setattr(ask, "describe_machine", lambda *_: machine)


def test_with_own_kernels_a_rounded_head_gains_as_on_a_gpu(monkeypatch):
    plan_for(COMPILED, monkeypatch)
    (text,) = advice(shape="llama-2-7b")
    saved = re.fullmatch(r"head=8 would save ([\d.]+) MB, (\d+) % of a token's bytes", text)
    plain, rounded = (exl.plan(shape="llama-2-7b", head=head).tokens[0].links()["ram"] for head in ("file", 8))
    assert float(saved[1]) == pytest.approx((plain - rounded) / 1e6, abs=0.01)
    assert int(saved[2]) == round(100 * (plain - rounded) / plain)
    (text,) = advice(shape="llama-3.2-1b")  # tied: the embedding stays beside it
    assert re.fullmatch(r"head=8 would save [\d.]+ MB, 2\d % of a token's bytes, for [\d.]+ MB more of RAM", text)


def test_through_torch_a_rounded_head_gains_memory_alone(monkeypatch):
    """It multiplies panels of f32, whatever the head's bits."""
    plan_for(Target("cpu"), monkeypatch)
    (text,) = advice(shape="llama-2-7b")
    saved = re.fullmatch(r"head=8 would save ([\d.]+) MB of RAM", text)
    plain, rounded = (exl.plan(shape="llama-2-7b", head=head).exact_bytes for head in ("file", 8))
    assert float(saved[1]) == pytest.approx((plain - rounded) / 1e6, abs=0.01)
    assert advice(shape="llama-3.2-1b") == []


@pytest.mark.parametrize(("options", "place"), [({"vram": "4100MB"}, "VRAM"), ({"ram": "3400MB"}, "RAM")])
def test_a_rounded_head_may_make_room_for_layers(options, place):
    plain, rounded = (
        len(exl.plan(shape="llama-2-7b", context=512, head=head, **options).placement.resident) for head in ("file", 8)
    )
    assert plain < rounded < 32
    (text,) = advice(shape="llama-2-7b", context=512, **options)
    assert text.endswith(f"keep {rounded - plain} more layer{'s' if rounded - plain > 1 else ''} in {place}")


def test_a_small_share_is_not_worth_a_line():
    assert advice(shape="llama-2-70b", vram="48GB") == []


def test_html_says_all_of_it_and_escapes_it():
    found = exl.plan(shape="llama-2-13b", gpu="RTX 3060 12GB", context=5000)
    html = found._repr_html_()
    for text in (found.verdict, *found.warnings, *found.speed_lines, *(note.text for note in found.notes)):
        assert text.replace("'", "&#x27;").replace('"', "&quot;") in html
    assert html.index("exl-verdict") < html.index("exl-part") < html.index("exl-speed")
    notes = (Note("warning", "<b>"), Note("advice", "<i>"))
    hostile = replace(made("dd", {"cpu": 1}, {}), notes=notes)._repr_html_()
    assert "&lt;b&gt;" in hostile
    assert "<i>" not in hostile
    # Text has the page's own colour, so that it is legible on light and dark pages; only red is set, for what fails.
    assert set(re.findall(r"(?<![-\w])color: ([^;\"]+)", html)) == {"inherit"}  # without it, some pages reset a table's
    failed = made("kk", {"cpu": 0.5}, {"cpu": 0.4})._repr_html_()
    assert set(re.findall(r"(?<![-\w])color: ([^;\"]+)", failed)) == {"inherit", "#e5484d"}
