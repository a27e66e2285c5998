"""``GET /metrics`` for Prometheus: what the engines say when it is asked, and what ``Journey``s have told before.

The names are tables in ``metric_names.py``; ``docs/server.md`` explains them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

import exl
from exl.engine.stats import EngineStats
from exl.errors import ExlError
from exl.llm import LLM
from exl.memory.host import proc_bytes
from exl.server import metric_names
from exl.server.histogram import TOKENS, Histogram
from exl.server.logs import ServerLog
from exl.server.residency import ModelState
from exl.server.state import Server
from exl.server.watch import Journey, Watch

BODIES: tuple[type[BaseModel], ...] = ()
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def router(server: Server) -> APIRouter:
    routes = APIRouter()
    metrics = Metrics(server)
    server.watches.append(metrics)
    registry = CollectorRegistry()  # one for each server of a process
    ProcessCollector(registry=registry)
    registry.register(metrics)

    @routes.get("/metrics", summary="Figures for Prometheus")
    async def figures(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return routes


class Metrics(Watch):
    """Also a collector of prometheus_client. All of it runs in the server's event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._models: dict[str, ModelTally] = {}
        self._http: Counter[tuple[str, str, str]] = Counter()  # method, route, status

    # ---- Watch

    def token_gap(self, journey: Journey, seconds: float, num_tokens: int) -> None:
        self._tally(journey.model).gaps.observe(seconds / num_tokens, num_tokens)

    def generated(self, journey: Journey) -> None:
        tally = self._tally(journey.model)
        tally.add(journey)
        for state in self._server.models.states:
            if state.name == journey.model:
                tally.look(state)

    def responded(self, journey: Journey) -> None:
        method = journey.method if journey.method in _METHODS else "other"
        self._http[method, journey.route, str(journey.status or 0)] += 1

    def _tally(self, model: str) -> ModelTally:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelTally()
        return found

    # ---- a collector

    def describe(self) -> Iterable[Metric]:
        return ()  # the registry would collect once to learn the names

    def collect(self) -> Iterable[Metric]:
        states = self._server.models.states
        for state in states:
            self._tally(state.name).look(state)
        yield from self._engines(metric_names.EXL, "model")
        if "vllm" in self._server.options.metrics_compat:
            yield from self._engines(metric_names.VLLM, "model_name")
        yield from _about_models(states)
        yield from self._about_server()

    def _engines(self, names: metric_names.Names, label: str) -> Iterable[Metric]:
        for name, key, text in names.gauges:
            gauge = GaugeMetricFamily(name, text, labels=[label])
            for model, tally in self._models.items():
                gauge.add_metric([model], tally.gauge(key))
            yield gauge
        for name, key, text in names.counters:
            counter = CounterMetricFamily(name, text, labels=[label])
            for model, tally in self._models.items():
                counter.add_metric([model], tally.count(key))
            yield counter
        for name, key, text in names.histograms:
            family = HistogramMetricFamily(name, text, labels=[label])
            for model, tally in self._models.items():
                histogram: Histogram = getattr(tally, key)
                family.add_metric([model], histogram.buckets(), histogram.total)
            yield family
        name, reason_label, text = names.finished
        finished = CounterMetricFamily(name, text, labels=[label, reason_label])
        for model, tally in self._models.items():
            for reason, count in tally.finished.items():
                finished.add_metric([model, names.reasons.get(reason, reason)], count)
        yield finished

    def _about_server(self) -> Iterable[Metric]:
        info = GaugeMetricFamily("exl_info", "1; the label is exl's version", labels=["version"])
        info.add_metric([exl.__version__], 1)
        yield info
        requests = CounterMetricFamily(
            "exl_http_requests", "HTTP requests that have ended", labels=["method", "route", "status"]
        )
        for key, count in self._http.items():
            requests.add_metric(key, count)
        yield requests
        yield GaugeMetricFamily("exl_http_requests_open", "HTTP requests under way", self._server.num_open)
        yield GaugeMetricFamily("exl_draining", "1: no more requests are taken", float(self._server.draining))
        lost = sum(watch.writer.num_dropped for watch in self._server.watches if isinstance(watch, ServerLog))
        yield CounterMetricFamily("exl_log_lines_dropped", "Lines of the log that could not be written", lost)
        peak = proc_bytes("self/status", "VmHWM")
        if peak is not None:
            yield GaugeMetricFamily("exl_process_peak_bytes", "Peak of resident memory, torch included", peak)
        yield from _about_devices()


@dataclasses.dataclass
class ModelTally:
    """All of one model, also of those times that it was loaded before."""

    queue: Histogram = dataclasses.field(default_factory=Histogram)
    first: Histogram = dataclasses.field(default_factory=Histogram)
    gaps: Histogram = dataclasses.field(default_factory=Histogram)
    total: Histogram = dataclasses.field(default_factory=Histogram)
    prompts: Histogram = dataclasses.field(default_factory=lambda: Histogram(TOKENS))
    answers: Histogram = dataclasses.field(default_factory=lambda: Histogram(TOKENS))
    finished: Counter[str] = dataclasses.field(default_factory=Counter)  # answers by the engine's finish_reason
    asked: int = 0  # tokens of prompts
    cached: int = 0
    _llm: LLM | None = None
    _now: EngineStats | None = None  # of the model that is loaded; the last that was heard of it
    _before: Counter[str] = dataclasses.field(default_factory=Counter)  # sums over the models that were loaded before

    def add(self, journey: Journey) -> None:
        """A request that has ended."""
        self.asked += journey.num_prompt
        self.cached += journey.num_cached
        self.finished.update(journey.finish_reasons)
        self.prompts.observe(journey.num_prompt)
        self.answers.observe(journey.num_generated)
        if journey.began is not None and journey.submitted is not None:
            self.queue.observe(max(0.0, journey.began - journey.submitted))
        if journey.first is not None:
            self.first.observe(journey.first - journey.arrived)
        if journey.last is not None:
            self.total.observe(journey.last - journey.arrived)

    def look(self, state: ModelState) -> None:
        """At the counts of the model that is loaded now. They begin anew with each loading; what is told never does."""
        llm = None if state.served is None else state.served.llm
        if llm is not self._llm:
            if self._now is not None:
                self._before.update(dataclasses.asdict(self._now))
            self._llm, self._now = llm, None
        if llm is not None:
            try:
                self._now = llm.stats()
            except ExlError:  # it is being closed
                return

    def count(self, key: str) -> float:
        own = getattr(self, key, None)
        return own if own is not None else self._before[key] + getattr(self._now, key, 0)

    def gauge(self, key: str) -> float:
        return float(getattr(self._now, key, 0))


def _about_models(states: Iterable[ModelState]) -> Iterable[Metric]:
    loaded = GaugeMetricFamily("exl_model_loaded", "1: the model is in memory", labels=["model"])
    share = GaugeMetricFamily("exl_model_loaded_ratio", "The share of its bytes that is loaded", labels=["model"])
    plan = GaugeMetricFamily(
        "exl_plan_bytes", "What the memory plan says, by memory; bounds are at most so much", labels=[*_PLAN_LABELS]
    )
    info = GaugeMetricFamily("exl_model_info", "1; the labels say what is loaded", labels=["model", *_INFO_LABELS])
    for state in states:
        loaded.add_metric([state.name], float(state.served is not None))
        share.add_metric([state.name], state.share)
        if state.served is None:
            continue
        llm = state.served.llm
        sums: Counter[tuple[str, str]] = Counter()
        for line in llm.plan.lines:
            sums[line.device, "exact" if line.exact else "bound"] += line.num_bytes
        for (memory, kind), num_bytes in sums.items():
            plan.add_metric([state.name, memory, kind], num_bytes)
        bits = "dense" if llm.quant is None else str(llm.quant.bits)
        info.add_metric([state.name, llm.config.family, bits, str(state.served.context)], 1)
    return loaded, share, plan, info


_PLAN_LABELS = ("model", "memory", "kind")
_INFO_LABELS = ("family", "bits", "context")


def _about_devices() -> Iterable[Metric]:
    """Without values where there is no GPU in use: the names of ``/metrics`` are the same everywhere."""
    peak = GaugeMetricFamily("exl_device_peak_bytes", "Peak of a GPU's memory that torch has taken", labels=["device"])
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            peak.add_metric([f"cuda:{index}"], torch.cuda.max_memory_reserved(index))
    yield peak
