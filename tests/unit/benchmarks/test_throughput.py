"""``benchmarks/throughput.py``: its arithmetic, and that each part tells what it should. No timings."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest

from benchmarks import single_stream_child, throughput
from benchmarks.single_stream_child import Clock
from benchmarks.synthetic import write_model
from benchmarks.throughput import (
    DATA,
    PARTS,
    QUICK,
    ROOT,
    Subjects,
    accepted_a_step,
    checkout_commit,
    measure,
    spread,
    table,
)
from exl.completion import Completion
from exl.planning.shapes import SHAPES

FEW = replace(
    QUICK, single_runs=2, sequences=(1, 3), tokens=5, large_tokens=3, arriving=200, chunks=(64,), text_tokens=8
)


def test_the_spread_is_that_of_the_middle_half():
    assert spread([10.0]) == 0.0
    assert spread([1.0, 10.0, 10.0, 10.0, 10.0, 10.0, 99.0]) == 0.0
    assert spread([8.0, 10.0, 12.0]) == pytest.approx(4 / 10)


def completion(num_tokens: int, num_drafted: int, num_accepted: int) -> Completion:
    ids = tuple(range(num_tokens))
    made = Completion("", ids, "length", 1, 0, 0, 0.0, 1.0)
    return replace(made, num_drafted=num_drafted, num_accepted=num_accepted)


def test_accepted_a_step():
    """Three steps that accept 2, 0 and 1 of their drafts give 3 + 1 + 2 tokens."""
    assert accepted_a_step([completion(6, 9, 3)]) == 1.0
    assert accepted_a_step([completion(4, 0, 0)]) == 0.0
    assert accepted_a_step([completion(6, 9, 3), completion(3, 0, 0)]) == 0.5


def test_a_clock_counts_what_its_functions_take_and_not_their_callers(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(single_stream_child.time, "perf_counter", lambda: now[0])

    def later(seconds):
        now[0] += seconds
        return seconds

    def items():
        for seconds in (1.0, 2.0):
            yield later(seconds)

    clock = Clock()
    assert clock.timed(later)(3.0) == 3.0
    for _ in clock.timed_items(items)():
        later(100.0)
    assert clock.seconds == 6.0


def test_a_table_has_a_row_for_each():
    lines = table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | x |", "| 2 | y |"]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Subjects:
    large = tmp_path_factory.mktemp("large")
    shape = replace(SHAPES["smollm2-135m"], hidden_size=128, intermediate_size=256, num_layers=6, num_heads=2)
    shape = replace(shape, num_kv_heads=1, vocab_size=512)
    write_model(large, shape, group_size=64, tokenizer=DATA / "stories260K")
    return Subjects(DATA / "stories260K", DATA / "stories260K", large, ROOT, FEW)


def test_every_part_is_measured_and_kept(subjects, tmp_path, capsys):
    path = tmp_path / "found.json"
    measure(subjects, list(PARTS), path)
    said, kept = capsys.readouterr().out, json.loads(path.read_text())
    assert kept["machine"] in said
    assert kept["base"] == checkout_commit(ROOT)
    parts = kept["parts"]
    assert list(parts) == list(PARTS)
    assert [(row["model"], row["requests"]) for row in parts["batch"]] == [
        (model, count) for model in ("stories2M", "1.1B") for count in FEW.sequences
    ]
    assert {row["what"]: row["number"] for row in parts["gaps"]}["a chunk alone"] == 200 / 64 // 1 + 1
    assert [row["runs"] for row in parts["single"]] == [2] * 4
    assert all(row["host_us_a_token"] > 0 for row in parts["single"])
    assert [row["requests"] for row in parts["ram"]] == [1, 16]
    assert all(row["layers_on_disk"] > 0 for row in parts["ram"])
    assert all(row["same_texts"] for row in parts["drafts"])
    fixed = {row["what"]: row for row in parts["drafts"] if row["drafts"] == "4"}
    assert fixed["stories260K for stories2M"]["accepted_of_drafted"] == 1.0  # it drafts for itself
    assert all(math.isfinite(row["tokens_per_second"]) for part in parts.values() for row in part if "what" not in row)


def test_the_base_must_be_what_runs(tmp_path):
    with pytest.raises(SystemExit, match="found exl in"):
        throughput.Stream(tmp_path, DATA / "stories260K", {"device": "cpu"})


def test_the_child_answers_each_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["child", str(DATA / "stories260K"), json.dumps({"device": "cpu"})])
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"prompt": [1, 5], "tokens": 3}) + "\n"))
    single_stream_child.main()
    where, answer = map(json.loads, capsys.readouterr().out.splitlines())
    seconds, device, count = answer
    assert where.endswith("exl/__init__.py")
    assert 0 < device < seconds
    assert count == 3
