"""OpenTelemetry: one span for each request, with the attributes that its conventions for generative AI name
(opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans).

Its packages are imported only if traces were asked for. A span is made when its request has ended, with the times that
its ``Journey`` has noted, so that tracing costs nothing on the way of a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import exl
from exl.errors import ConfigError
from exl.server.options import ServerOptions
from exl.server.watch import Journey, Watch

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}  # others that generate: "text_completion"
_EVENTS = {
    "submitted": "queued",
    "began": "admitted",
    "first": "first token",
    "last": "last token",
}  # by Journey's field
_HOW = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"


class Traces(Watch):
    def __init__(self, provider: Any, close: Callable[[], None] = lambda: None) -> None:
        """``provider``: an OpenTelemetry ``TracerProvider``. ``close``: called at the end."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("exl.server", exl.__version__)
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()
        self.close = close

    @classmethod
    def of(cls, options: ServerOptions) -> Traces:
        """With ``otlp_endpoint``, spans go there in batches, from a thread; with ``trace`` alone, to the provider that
        the process has (as ``opentelemetry-instrument`` makes it). Raises ``ConfigError`` if a package is missing."""
        try:
            from opentelemetry import trace

            if options.otlp_endpoint is None:
                return cls(trace.get_tracer_provider())
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(f"trace: found no package {error.name}, expected it installed: {_HOW}") from None
        provider = TracerProvider(resource=Resource.create({"service.name": "exl"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=options.otlp_endpoint)))
        return cls(provider, provider.shutdown)

    def responded(self, journey: Journey) -> None:
        if journey.submitted is None:
            return  # /health and /metrics are asked for all day
        to_unix = time.time_ns() - round(time.perf_counter() * 1e9)

        def at(moment: float) -> int:
            return round(moment * 1e9) + to_unix

        headers = {} if journey.traceparent is None else {"traceparent": journey.traceparent}
        operation = _OPERATIONS.get(journey.route, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {journey.model}",
            context=self._propagator.extract(headers),
            kind=self._kind,
            attributes=_attributes(journey, operation),
            start_time=at(journey.arrived),
        )
        for name, event in _EVENTS.items():
            moment = getattr(journey, name)
            if moment is not None:
                span.add_event(event, timestamp=at(moment))
        if journey.error is not None or (journey.status or 0) >= 500:
            span.set_status(self._failed)
        span.end(end_time=at(time.perf_counter()))


def _attributes(journey: Journey, operation: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "exl",
        "gen_ai.request.model": journey.model,
        "gen_ai.response.model": journey.model,
        "gen_ai.response.id": journey.request_id,
        "gen_ai.response.finish_reasons": journey.finish_reasons,
        "gen_ai.usage.input_tokens": journey.num_prompt,
        "gen_ai.usage.output_tokens": journey.num_generated,
        "gen_ai.usage.cache_read.input_tokens": journey.num_cached,
        "http.request.method": journey.method,
        "http.route": journey.route,
        "http.response.status_code": journey.status or 0,
        "client.address": journey.client.rpartition(":")[0],
    }
    if journey.first is not None:
        found["gen_ai.response.time_to_first_chunk"] = journey.first - journey.arrived
    if journey.error is not None:
        found["error.type"] = str(journey.status)
    return found
