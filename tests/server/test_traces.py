"""Spans by OpenTelemetry's own SDK: one for each request, within the trace of its client."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import StatusCode

from exl.errors import ConfigError
from exl.server.options import ServerOptions
from exl.server.traces import Traces
from tests.server.raw import wait_for_idle

CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 7}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # of the specification's own example


@pytest.fixture
def spans(running):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    watch = Traces(provider)
    running.server.watches.append(watch)
    yield exporter.get_finished_spans
    running.server.watches.remove(watch)


def the_span(running, spans):
    wait_for_idle(running)
    (found,) = spans()
    return found


def test_a_request_is_a_span_of_its_clients_trace(running, spans):
    began = time.perf_counter()
    reply = httpx.post(running.url + CHAT, json=ASKED, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    span = the_span(running, spans)
    took = time.perf_counter() - began
    assert span.name == "chat stories"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    usage, found = reply.json()["usage"], dict(span.attributes)
    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    assert {name for name in found if name.startswith("gen_ai.")} <= known
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.response.model"] == "stories"
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert found["http.response.status_code"] == 200
    assert found["http.route"] == CHAT
    assert found["client.address"] == "127.0.0.1"
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert [event.name for event in span.events] == ["queued", "admitted", "first token", "last token"]
    assert times[0] <= min(times[1:3])
    assert sorted(times[2:]) == times[2:]
    assert (span.end_time - span.start_time) / 1e9 <= took
    assert span.status.status_code != StatusCode.ERROR


def test_a_span_that_has_no_parent_begins_a_trace(running, spans):
    httpx.post(running.url + CHAT, json=ASKED, headers={"traceparent": "rubbish"})
    assert the_span(running, spans).parent is None


def test_a_trace_that_is_not_sampled_is_not_told(running, spans):
    httpx.post(running.url + CHAT, json=ASKED, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    wait_for_idle(running)
    assert spans() == ()


def test_a_request_that_failed_says_so(running, spans):
    with httpx.stream("POST", running.url + CHAT, json={**ASKED, "max_tokens": 480, "stream": True, "n": 8}):
        pass
    assert "cancelled" in the_span(running, spans).attributes["gen_ai.response.finish_reasons"]


def test_what_the_engine_was_not_asked_for_is_no_span(running, spans):
    httpx.get(f"{running.url}/health")
    httpx.get(f"{running.url}/metrics")
    httpx.post(running.url + CHAT, json={})
    wait_for_idle(running)
    assert spans() == ()


def test_the_framework_adds_no_spans_of_its_own(running, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    httpx.post(running.url + CHAT, json=ASKED)
    wait_for_idle(running)
    assert exporter.get_finished_spans() == ()


def test_with_trace_spans_go_to_the_processs_own_provider(running, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    watch = Traces.of(ServerOptions(trace=True))
    running.server.watches.append(watch)
    try:
        httpx.post(running.url + CHAT, json=ASKED)
        assert the_span(running, exporter.get_finished_spans).name == "chat stories"
    finally:
        running.server.watches.remove(watch)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(ConfigError, match=r"trace: found no package opentelemetry.exporter.*pip install opentel"):
        Traces.of(ServerOptions(otlp_endpoint="http://localhost:4318/v1/traces"))


def test_the_server_runs_without_the_packages():
    """Beyond what FastAPI itself imports, and as long as no traces are asked for."""
    code = """
import sys
import exl.server.run
sys.modules["opentelemetry"] = None
from exl.server.options import ServerOptions
from exl.server.traces import Traces
try:
    Traces.of(ServerOptions(trace=True))
except exl.ConfigError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("trace: found no package opentelemetry, expected it installed: pip install")
