"""exl bench: its counts against sums by hand; its output as a table, a file or one clear error line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from dataclasses import replace

import pytest

import exl.bench
from exl.bench import BenchReport, BenchResult, Subject, markdown, model_name, read_bandwidth, rows_of, run_bench
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.commands.bench import bench
from exl.engine.build import load_engine
from exl.errors import ConfigError, KernelError
from exl.ops.cpu_target import cpu_target, torch_target
from exl.planning.options import EngineOptions
from exl.threads import thread_limit
from tests.command_line import run_exl
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend

SUBJECT = Subject("a|b", 4 * 10**9, "4", "cpu", 8, "q8")


def run(*args: str) -> subprocess.CompletedProcess:
    return run_exl("bench", *args)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return run_bench(BUNDLED_MODEL, EngineOptions(), num_prompt=40, num_generated=9, depth=70, repeats=3)


def test_tests_are_named_as_llama_bench_names_them(report):
    assert [(r.name, r.num_tokens, len(r.seconds)) for r in report.results] == [("pp40@d70", 40, 3), ("tg9@d70", 9, 3)]
    assert all(seconds > 0 for r in report.results for seconds in r.seconds)


def test_bytes_of_a_token_by_hand(report):
    """The bundled model: 5 layers of 64 channels, 8 heads over 4 for K and V, 192 inner channels."""
    generated = report.results[1]
    matrices = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192
    assert generated.bytes_a_token > 5 * matrices // 2
    # The plan's layer bytes are an upper bound: they include the exact scales and zeros that only prompts read.
    lines = {line.purpose: line.num_bytes for line in report.plan.lines}
    cache = 5 * 2 * 4 * 8 * 2 * (70 + 9 // 2)
    assert generated.bytes_a_token <= lines["resident layers"] + lines["embedding"] + cache
    assert report.results[0].bytes_a_token is None


def test_mean_deviation_and_share():
    result = BenchResult("tg10", 10, (1.0, 2.0, 4.0), bytes_a_token=100)
    assert result.speeds == (10.0, 5.0, 2.5)
    assert result.mean == pytest.approx(17.5 / 3)
    assert result.deviation == pytest.approx(3.818813, rel=1e-5)
    assert BenchResult("tg1", 1, (1.0,)).deviation == 0
    report = BenchReport(SUBJECT, None, (result,), roof=1000.0, peak_bytes=None)
    assert report.share_of_roof(result) == pytest.approx(100 * 17.5 / 3 / 1000)
    assert rows_of(report)[0]["share_of_roof"] == round(100 * 17.5 / 3 / 1000, 3)


def test_rows_can_be_pasted():
    """llama-bench's columns, in one line of Markdown; a row of a file has them too."""
    rows = rows_of(BenchReport(SUBJECT, None, (BenchResult("tg10", 10, (1.0, 2.0)),), roof=1.0, peak_bytes=None))
    assert markdown(rows).splitlines() == [
        "| model | size | bits | device | threads | cache | test | t/s |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |",
        "| a\\|b | 4.00 GB | 4 | cpu | 8 | q8 | tg10 | 7.50 ± 3.54 |",
    ]
    assert list(rows[0])[:7] == ["model", "size", "bits", "device", "threads", "cache", "test"]


def test_a_row_says_what_was_measured(report):
    row = rows_of(report)[0]
    assert {name: row[name] for name in ("model", "bits", "device", "cache")} == {
        "model": BUNDLED_MODEL.name, "bits": "4", "device": "cpu", "cache": "f16"
    }  # fmt: skip
    assert row["threads"] == thread_limit()
    lines = {line.purpose: line.num_bytes for line in report.plan.lines}
    assert row["size"] == sum(lines[name] for name in ("embedding", "resident layers", "head and final norm"))


def test_models_are_named_as_they_were_asked_for(tmp_path):
    assert model_name(None, BUNDLED_MODEL) == model_name(str(BUNDLED_MODEL), BUNDLED_MODEL) == BUNDLED_MODEL.name
    assert model_name(str(BUNDLED_MODEL / "model.safetensors"), BUNDLED_MODEL / "model.safetensors") == "model"
    assert model_name("owner/name", tmp_path / "snapshots" / "0123abc") == "owner/name"


def test_peak_is_within_the_plan(report):
    if report.peak_bytes is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert report.peak_bytes <= report.plan.num_bytes


def test_the_roof_is_a_bandwidth():
    assert 1e8 < read_bandwidth() < 1e13


def test_output_for_people_and_programs():
    small = ("--pp", "20", "--tg", "4", "--repeats", "2")
    table = run(*small)
    assert table.stdout.splitlines()[0].startswith("| model | size | bits | ")
    assert "planned" in table.stderr
    rows = list(csv.DictReader(io.StringIO(run(*small, "--output", "csv").stdout)))
    assert [row["test"] for row in rows] == ["pp20", "tg4"]
    found = json.loads(run(*small, "--pp", "0", "--output", "json").stdout)
    assert [row["test"] for row in found["results"]] == ["tg4"]
    assert found["planned_bytes"] > 0


def test_how_decode_steps_ran_is_told(monkeypatch, capsys):
    """On the host shim as a GPU, with a capture that fails in the way of CUDA."""
    recorder = RecordingBackend(make_backend("plain"))

    def broken(run):
        try:
            raise KernelError("embed: a kernel that cannot be captured")
        finally:
            raise RuntimeError("the capture was invalidated")

    recorder.capture = broken
    monkeypatch.setattr(exl.bench, "choose_device", lambda options: (replace(options, vram="1GB"), recorder))
    for output in ("json", "table"):
        bench(model=str(BUNDLED_MODEL), pp=0, tg=4, repeats=1, output=output)
        shown = capsys.readouterr()
        text = json.loads(shown.out)["decode_steps"] if output == "json" else shown.err
        assert "launched one by one" in text
        assert "the capture was invalidated" in text
        assert "a kernel that cannot be captured" in text


def test_steps_are_recorded_by_exls_own_kernels_alone(report):
    assert report.decode_steps == ("recorded, one call each" if cpu_target().compiled else None)
    engine = load_engine(BUNDLED_MODEL, EngineOptions(device="cpu"), cpu=torch_target())
    assert engine.decode_steps is None
    engine.close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--pp", "-1"], ["pp", "-1"]),
        (["--repeats", "0"], ["repeats", "0"]),
        (["--output", "xml"], ["output", "xml"]),
        (["--context", "20"], ["context", "20", "512"]),
        (["--ram", "banana"], ["ram", "banana"]),
    ],
)
def test_bad_input_is_one_line(args, words):
    done = run(*args)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_a_depth_below_zero_is_refused():
    with pytest.raises(ConfigError, match="depth: found -2"):
        run_bench(BUNDLED_MODEL, EngineOptions(), depth=-2)
