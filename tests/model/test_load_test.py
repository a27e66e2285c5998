"""``exl bench --concurrency``: its figures from runs by hand, and what it asks of the engine. No timings."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import exl.bench
from exl.bench import BenchReport, BenchResult, Subject, markdown, rows_of, run_bench
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ConfigError
from exl.load_test import LoadFigures, LoadRun, LoadTest, percentile, prompt_ids
from exl.planning.options import EngineOptions
from tests.command_line import run_exl

SMALL = ("--concurrency", "3", "--pp", "20", "--tg", "5", "--repeats", "2")


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 99, 100, 101])
def test_percentiles_are_those_of_numpy(count, percent):
    values = np.random.default_rng(count).permutation(count) * 1.5
    assert percentile(list(values), percent) == np.percentile(values, percent, method="inverted_cdf")


def test_figures_of_all_runs_together():
    test = LoadTest(2, 8, 4, "prompt")
    runs = [
        LoadRun(2.0, (0.1, 0.3), (0.01, 0.02, 0.03), num_accepted=3, num_steps=5),
        LoadRun(4.0, (0.2, 0.4), (0.04,), num_accepted=6, num_steps=3),
    ]
    assert LoadFigures.of(test, runs).row() == {
        "first_p50_ms": 200.0, "first_p99_ms": 400.0, "between_p50_ms": 20.0, "between_p99_ms": 40.0,
        "accepted_per_step": 1.125,
    }  # fmt: skip
    single = LoadFigures.of(LoadTest(1, 8, 1), [LoadRun(1.0, (0.1,), (), num_steps=1)]).row()
    assert single["between_p99_ms"] is single["accepted_per_step"] is None


def test_its_rows_stand_in_one_table():
    subject = Subject("model", 4 * 10**9, "4", "cpu", 8, "q8")
    plain = LoadFigures((0.1,), (), None)
    drafted = LoadFigures((0.1, 0.3), (0.01, 0.02), 1.5)
    results = (BenchResult("a", 10, (1.0,), load=plain), BenchResult("b", 10, (1.0,), load=drafted))
    assert markdown(rows_of(BenchReport(subject, None, results, roof=1.0, peak_bytes=None))).splitlines() == [
        "| model | size | bits | device | threads | cache | test | t/s | first ms, p50 / p99 | next ms, p50 / p99 | "
        "accepted a step |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        "| model | 4.00 GB | 4 | cpu | 8 | q8 | a | 10.00 ± 0.00 | 100.00 / 100.00 | - / - | - |",
        "| model | 4.00 GB | 4 | cpu | 8 | q8 | b | 10.00 ± 0.00 | 100.00 / 300.00 | 10.00 / 20.00 | 1.50 |",
    ]


def test_prompts_differ_from_their_first_token_on():
    prompts = [prompt_ids(8, i, 512) for i in range(128)]
    assert len({ids[0] for ids in prompts}) == 128
    assert all(3 <= token_id < 512 for ids in prompts for token_id in ids)


@pytest.mark.parametrize("max_sequences", [2, 16])
def test_all_run_at_once_as_far_as_they_may_and_none_is_paused(monkeypatch, max_sequences):
    """Each request gets all of its tokens, the last one too, and each but the first comes after another."""
    seen, running = [], []
    plain = exl.bench.run_load

    def watched(engine, test):
        step = engine.generator.scheduler.step

        def stepping():
            done = step()
            running.append(len(engine.generator.scheduler.running))
            return done

        monkeypatch.setattr(engine.generator.scheduler, "step", stepping)
        run = plain(engine, test)
        seen.append((run, engine.generator.stats()))
        monkeypatch.setattr(engine.generator.scheduler, "step", step)
        return run

    monkeypatch.setattr(exl.bench, "run_load", watched)
    options = EngineOptions(device="cpu", max_sequences=max_sequences)
    report = run_bench(BUNDLED_MODEL, options, 20, 30, repeats=2, concurrency=5)
    (result,) = report.results
    assert (result.name, result.num_tokens, len(result.seconds)) == ("5 x pp20+tg30", 150, 2)
    assert len(seen) == 3  # the first one does not count
    for run, stats in seen:
        assert (len(run.first), len(run.between), run.num_steps) == (5, 5 * 29, 150)
        assert min(run.first) > 0
        assert run.seconds >= max(run.first)
        assert stats.preemptions == 0
    assert max(running) == min(5, max_sequences)
    assert len(result.load.first) == 10


def test_tokens_of_one_step_are_one_arrival():
    """A model that drafts for itself: all drafts are accepted, and come together."""
    options = EngineOptions(device="cpu", draft=BUNDLED_MODEL)
    report = run_bench(BUNDLED_MODEL, options, 20, 40, repeats=1, concurrency=1)
    (row,) = rows_of(report)
    (result,) = report.results
    assert result.name == "1 x pp20+tg40+draft"
    arrivals = 1 + len(result.load.between)
    assert row["accepted_per_step"] == pytest.approx((40 - arrivals) / arrivals, abs=1e-3)


def test_output_for_people_and_programs():
    rows = list(csv.DictReader(io.StringIO(run_exl("bench", *SMALL, "--output", "csv").stdout)))
    assert [row["test"] for row in rows] == ["3 x pp20+tg5"]
    assert float(rows[0]["first_p99_ms"]) >= float(rows[0]["first_p50_ms"]) > 0
    found = json.loads(run_exl("bench", *SMALL, "--speculate", "prompt", "--output", "json").stdout)
    assert found["results"][0]["test"] == "3 x pp20+tg5+prompt"
    assert found["results"][0]["accepted_per_step"] >= 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--concurrency", "0"], ["concurrency", "0"]),
        (["--concurrency", "2", "--pp", "0"], ["pp", "0"]),
        (["--concurrency", "2", "--depth", "5"], ["depth", "5"]),
        (["--concurrency", "2", "--context", "20"], ["context", "20", "640"]),
        (["--speculate", "prompt"], ["speculate", "concurrency"]),
        (["--concurrency", "2", "--speculate", "oracle"], ["speculate", "oracle"]),
        (["--concurrency", "2", "--speculate", "draft"], ["speculate", "draft model"]),
    ],
)
def test_bad_input_is_one_line(args, words):
    done = run_exl("bench", *args)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_a_draft_that_is_not_to_be_used_is_refused():
    with pytest.raises(ConfigError, match="speculate: found 'draft' without concurrency"):
        run_bench(BUNDLED_MODEL, EngineOptions(draft=BUNDLED_MODEL))
