"""``/metrics`` by prometheus_client's own parser: what it says is what was done, and it never goes back."""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import Histogram as ReferenceHistogram
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from exl.engine.stats import EngineStats
from exl.server.histogram import SECONDS, Histogram
from exl.server.metric_names import EXL
from exl.server.metrics import ModelTally
from exl.server.residency import ModelState
from exl.server.watch import Journey, Watch
from tests.server.raw import wait_for_idle
from tests.server.running import RunningServer, load_bundled

CHAT = "/v1/chat/completions"


def asked(i: int, **fields) -> dict:
    return {"messages": [{"role": "user", "content": f"Tell me of dog {i}."}], "max_tokens": 7, **fields}


def test_pages_of_windows_are_told_and_the_fuller_kind_is_what_is_used():
    counted = dict.fromkeys((field.name for field in dataclasses.fields(EngineStats)), 0)
    tally = ModelTally()

    def gauges(**pages: int) -> dict[str, float]:
        now = EngineStats(**counted | pages)
        tally.look(SimpleNamespace(served=SimpleNamespace(llm=SimpleNamespace(stats=lambda: now))))
        return {name: tally.gauge(key) for name, key, _ in EXL.gauges}

    assert gauges()["exl_cache_used_ratio"] == 0
    one = gauges(pages_total=8, pages_free=6)
    assert (one["exl_cache_used_ratio"], one["exl_cache_window_pages"]) == (0.25, 0)
    two = gauges(pages_total=8, pages_free=6, window_pages_total=4, window_pages_free=1)
    assert two["exl_cache_used_ratio"] == 0.75
    assert (two["exl_cache_window_pages"], two["exl_cache_window_pages_free"]) == (4, 1)


class Figures(dict):
    """Values by name and labels."""

    def __init__(self, url: str) -> None:
        reply = httpx.get(f"{url}/metrics")
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/plain; version=")
        self.families = list(text_string_to_metric_families(reply.text))
        for family in self.families:
            for sample in family.samples:
                key = (sample.name, *sorted(sample.labels.items()))
                assert key not in self, f"{key} is told twice"
                self[key] = sample.value

    def of(self, name: str, **labels) -> float:
        return self.get((name, *sorted(labels.items())), 0.0)

    def of_model(self, name: str, **labels) -> float:
        return self.of(name, model="stories", **labels)


@pytest.fixture
def fresh():
    with RunningServer(metrics_compat=("vllm",)) as server:
        yield server


def test_figures_are_what_was_done(fresh):
    replies = [httpx.post(fresh.url + CHAT, json=asked(i, seed=i)) for i in range(4)]
    replies.append(httpx.post(fresh.url + CHAT, json=asked(9, n=3, min_p=0.1, temperature=1.0, seed=1)))
    replies.append(httpx.post(fresh.url + CHAT, json=asked(9, n=0)))
    usage = [reply.json().get("usage") for reply in replies]
    assert usage.pop() is None
    wait_for_idle(fresh)
    prompt = sum(one["prompt_tokens"] for one in usage)
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
    generated = sum(one["completion_tokens"] for one in usage)
    assert generated == 4 * 7 + 3 * 7

    found = Figures(fresh.url)
    assert found.of_model("exl_prompt_tokens_total") == prompt
    assert found.of_model("exl_generated_tokens_total") == generated
    assert found.of_model("exl_prefix_tokens_total") >= cached
    assert found.of_model("exl_prompt_tokens_computed_total") == prompt - cached
    assert found.of_model("exl_answers_total", finish_reason="length") == 4 + 3
    assert found.of_model("exl_request_seconds_count") == 5
    assert found.of_model("exl_time_to_first_token_seconds_count") == 5
    assert found.of_model("exl_queue_seconds_count") == 5
    assert found.of_model("exl_request_prompt_tokens_sum") == prompt
    assert found.of_model("exl_request_generated_tokens_sum") == generated
    gaps = found.of_model("exl_inter_token_seconds_count")
    assert 0 < gaps <= generated - 7  # each choice's first has none before it, nor have those that come with it
    assert found.of_model("exl_sequences_running") == found.of_model("exl_sequences_waiting") == 0
    assert found.of_model("exl_cache_pages") == 8192 / 64 == found.of_model("exl_cache_pages_free")
    assert found.of_model("exl_model_loaded") == 1
    http = {"method": "POST", "route": CHAT}
    assert found.of("exl_http_requests_total", **http, status="200") == 5
    assert found.of("exl_http_requests_total", **http, status="400") == 1
    assert found.of("exl_http_requests_open") == 1  # the one that asks
    plan = fresh.llm.plan
    exact = found.of_model("exl_plan_bytes", memory="cpu", kind="exact")
    assert (exact, found.of_model("exl_plan_bytes", memory="cpu", kind="bound")) == (
        plan.exact_bytes,
        plan.num_bytes - plan.exact_bytes,
    )
    for name, value in (
        ("vllm:prompt_tokens_total", prompt),
        ("vllm:generation_tokens_total", generated),
        ("vllm:prefix_cache_queries_total", prompt),
        ("vllm:prefix_cache_hits_total", cached),
        ("vllm:e2e_request_latency_seconds_count", 5),
        ("vllm:inter_token_latency_seconds_count", gaps),
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
    ):
        assert found.of(name, model_name="stories") == value, name
    assert found.of("vllm:request_success_total", model_name="stories", finished_reason="length") == 7


def test_times_are_those_that_the_client_sees(fresh):
    class Noted(Watch):
        def generated(self, journey: Journey) -> None:
            self.journey = journey

    noted = Noted()
    fresh.server.watches.append(noted)
    reply = httpx.post(fresh.url + CHAT, json=asked(1, max_tokens=60))
    found = Figures(fresh.url)
    seconds = found.of_model("exl_request_seconds_sum")
    first = found.of_model("exl_time_to_first_token_seconds_sum")
    gaps = found.of_model("exl_inter_token_seconds_sum")
    assert 0 < first < seconds <= reply.elapsed.total_seconds()
    assert first + gaps == pytest.approx(seconds)
    assert seconds == pytest.approx(noted.journey.last - noted.journey.arrived)


def test_counts_go_up_and_cancelled_answers_count_too(running):
    before = Figures(running.url)
    with httpx.stream("POST", running.url + CHAT, json=asked(1, max_tokens=480, n=8, stream=True)) as reply:
        lines = reply.iter_lines()  # dropping it would close the stream
        next(lines)
        during = Figures(running.url)
        assert during.of_model("exl_sequences_running") == 8
        assert during.of_model("exl_cache_used_ratio") > 0
    wait_for_idle(running)
    after = Figures(running.url)
    key = ("exl_answers_total", ("finish_reason", "cancelled"), ("model", "stories"))
    assert after[key] == before.get(key, 0) + 8
    for family in after.families:
        for sample in family.samples:
            name = (sample.name, *sorted(sample.labels.items()))
            if family.type in ("counter", "histogram") and name in before:
                assert after[name] >= before[name], name


def test_without_vllms_names_there_are_none(running):
    assert not [key for key in Figures(running.url) if key[0].startswith("vllm")]


def test_each_server_of_a_process_has_figures_of_its_own(running, fresh):
    httpx.post(fresh.url + CHAT, json=asked(1))
    assert Figures(fresh.url).of_model("exl_request_seconds_count") == 1


def test_counts_stay_when_a_model_is_unloaded_and_loaded_again(fresh):
    httpx.post(fresh.url + CHAT, json=asked(1))
    wait_for_idle(fresh)
    state: ModelState = fresh.server.models.states[0]
    served = state.served
    state.served, state.status = None, "unloaded"
    gone = Figures(fresh.url)
    assert gone.of_model("exl_generated_tokens_total") == 7
    assert gone.of_model("exl_model_loaded") == 0
    assert gone.of_model("exl_cache_pages") == 0
    again = load_bundled(None)
    old, served.llm = served.llm, again
    try:
        state.served, state.status = served, "loaded"
        assert Figures(fresh.url).of_model("exl_generated_tokens_total") == 7
        httpx.post(fresh.url + CHAT, json=asked(1))
        wait_for_idle(fresh)
        assert Figures(fresh.url).of_model("exl_generated_tokens_total") == 14
    finally:
        old.close()


def test_bytes_of_streamed_layers_are_counted(tmp_path):
    def load(progress):
        import exl

        return exl.load(device="cpu", max_sequences=4, resident_layers=1, packed_folder=tmp_path, progress=progress)

    with RunningServer(load=load) as server:
        httpx.post(server.url + CHAT, json=asked(1))
        once = Figures(server.url).of_model("exl_layer_read_bytes_total")
        httpx.post(server.url + CHAT, json=asked(2))
        assert Figures(server.url).of_model("exl_layer_read_bytes_total") > once > 0


def test_openmetrics_is_told_if_it_is_asked_for(running):
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    reply = httpx.get(f"{running.url}/metrics", headers=headers)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    found = list(openmetrics.text_string_to_metric_families(reply.text))
    assert "exl_generated_tokens" in {family.name for family in found}


def test_a_histogram_is_prometheus_own():
    draw = random.Random(5)
    ours, theirs = Histogram(), ReferenceHistogram("x", "x", buckets=SECONDS, registry=None)
    for _ in range(500):
        value = draw.choice([*SECONDS, draw.uniform(0, 20), 0.0, 5000.0])
        ours.observe(value)
        theirs.observe(value)
    ours.observe(0.3, 7)
    for _ in range(7):
        theirs.observe(0.3)
    samples = next(iter(theirs.collect())).samples
    expected = [(sample.labels["le"], sample.value) for sample in samples if sample.name == "x_bucket"]
    assert ours.buckets() == expected
    assert ours.total == pytest.approx(next(sample.value for sample in samples if sample.name == "x_sum"))


def test_figures_can_be_asked_for_while_requests_run(running):
    """Many times, by several clients, during an answer: each is whole."""
    errors = []

    def read() -> None:
        try:
            for _ in range(10):
                Figures(running.url)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(5):
        assert httpx.post(running.url + CHAT, json=asked(i, max_tokens=60)).status_code == 200
    for thread in threads:
        thread.join(60)
    assert not errors


def test_the_page_explains_every_name(fresh):
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    explained = set(re.findall(r"`(?:vllm:)?(\w+)`", text))
    for family in text_string_to_metric_families(httpx.get(f"{fresh.url}/metrics").text):
        if not family.name.startswith(("process_", "python_")):
            name = family.name.removeprefix("vllm:") + ("_total" if family.type == "counter" else "")
            assert name in explained, name
    assert not [name for name in explained if name.startswith("exl_") and name not in names_of(fresh.url)]


def names_of(url: str) -> set[str]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}
