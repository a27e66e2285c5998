"""Clients that come, leave and send rubbish: seconds of what ``benchmarks.serving`` does for minutes. No timings."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving.overhead import Subject, overhead_row
from benchmarks.serving.process import server_process
from benchmarks.serving.stress import known_requests, run_stress

SMALL = serving.DATA / "stories260K"
CLIENTS = 12


@pytest.fixture(scope="module")
def report():
    known = known_requests(SMALL, 25, 1, ["Once upon a time there was a dog. It ran to the park and saw a big ball."])
    options = ("--max-sequences", "6", "--cache-tokens", "2048", "--max-queue", "100")  # pages run out now and then
    with server_process(SMALL, options) as server:
        return asyncio.run(run_stress(server, known, CLIENTS, 3.0, 2))


def test_every_stream_is_the_text_of_its_request_alone(report):
    assert report.wrong == []
    assert report.counts["answered"] > CLIENTS
    assert report.counts["left"] > 0


def test_rubbish_is_refused(report):
    refused = {name for name in report.counts if name.startswith("rubbish_")}
    assert "rubbish_400" in refused
    assert refused <= {f"rubbish_{status}" for status in (400, 404, 408, 413, 414, 422, 431, "closed")}


def test_what_was_used_comes_back(report):
    assert report.pages[0] == report.pages[1] > 0
    assert report.after.num_files <= report.before.num_files
    assert report.after.num_threads <= report.before.num_threads + 8  # the pool of threads that encode prompts
    assert report.after.rss_bytes <= report.before.rss_bytes + 20e6


def test_the_cost_of_a_server_is_told():
    row = overhead_row(Subject("small", SMALL, 512, 8), 3, 1)
    assert row["clients"] == 3
    assert row["served_over_bare"] == pytest.approx(
        row["served_tokens_per_second"] / row["bare_tokens_per_second"], rel=1e-2
    )


def test_a_report_can_be_written(report):
    row = report.row()
    assert json.loads(json.dumps(row))["wrong"] == 0
    assert row["first_p50_ms"] <= row["first_p95_ms"] <= row["first_p99_ms"]
