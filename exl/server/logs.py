"""The server's log: one line for each request when it has ended, and what exl and uvicorn have to say; as text or JSON.

Lines name no key and no prompt; prompts only with ``--log-prompts``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

from exl.server.log_writer import LogWriter
from exl.server.options import ServerOptions
from exl.server.watch import Journey, Watch

_LOGGERS = ("exl", "uvicorn.error", "asyncio")
_QUIET_ROUTES = ("/health", "/metrics")  # asked for all day by machines
_MAX_PROMPT_CHARS = 20_000


class ServerLog(Watch):
    def __init__(self, options: ServerOptions) -> None:
        """Raises ``ConfigError`` if the log file cannot be opened."""
        self.writer = LogWriter(options.log_file)
        self._as_json = options.log_format == "json"

    @contextlib.contextmanager
    def loggers(self) -> Iterator[None]:
        """Inside, what this process's loggers of exl and uvicorn say comes here and nowhere else."""
        handler = _Handler(self)
        with contextlib.ExitStack() as undo:
            for name in _LOGGERS:
                logger = logging.getLogger(name)
                undo.callback(_set, logger, logger.level, logger.propagate)
                undo.callback(logger.removeHandler, handler)
                logger.addHandler(handler)
                # uvicorn tells each start and end as "info".
                _set(logger, logging.INFO if name == "exl" else logging.WARNING, False)
            yield

    def close(self) -> None:
        self.writer.close()

    def line(self, level: str, message: str, facts: dict[str, Any] | None = None, when: float | None = None) -> None:
        """One line; ``facts`` are keys of the JSON object, or ``key=value`` behind the message."""
        when = time.time() if when is None else when
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
        stamp = f"{second}.{int(when % 1 * 1000):03}Z"
        facts = dict(facts or {})
        if self._as_json:
            found = {"time": stamp, "level": level, "message": message, **facts}
            self.writer.write(json.dumps(found, ensure_ascii=False, default=str))
            return
        more = str(facts.pop("traceback", "")).splitlines()
        words = [stamp, level.upper(), _one_line(message), *(f"{k}={_word(v)}" for k, v in facts.items())]
        self.writer.write("\n    ".join([" ".join(words), *map(_one_line, more)]))

    # ---- Watch

    def responded(self, journey: Journey) -> None:
        if journey.route in _QUIET_ROUTES and journey.status in (200, 503):
            return
        level = "error" if (journey.status or 0) == 500 else "info"
        self.line(level, "request", facts_of(journey))


def facts_of(journey: Journey) -> dict[str, Any]:
    """What is known of a request that has ended, without what does not apply to it. Milliseconds."""
    known = journey.route != "unknown"
    found: dict[str, Any] = {
        "id": journey.request_id,
        "client": journey.client,
        "method": journey.method,
        "route": journey.route if known else journey.path[:200],
        "status": journey.status,
        "total_ms": _milliseconds(journey.arrived, time.perf_counter()),
    }
    if journey.submitted is not None:
        found |= {
            "model": journey.model,
            "prompt_tokens": journey.num_prompt,
            "cached_tokens": journey.num_cached,
            "generated_tokens": journey.num_generated,
            "finish": ",".join(journey.finish_reasons),
            "queue_ms": _milliseconds(journey.submitted, journey.began),
            "ttft_ms": _milliseconds(journey.arrived, journey.first),
        }
        if journey.num_drafted:
            found |= {"drafted_tokens": journey.num_drafted, "accepted_tokens": journey.num_accepted}
    if journey.error is not None:
        found["error"] = journey.error[:500]
    if journey.prompt is not None:
        found["prompt"] = journey.prompt[:_MAX_PROMPT_CHARS]
    return {key: value for key, value in found.items() if value is not None}


def _milliseconds(start: float, stop: float | None) -> float | None:
    return None if stop is None else round((stop - start) * 1e3, 1)


def _one_line(text: str) -> str:
    """Line ends and control characters as JSON writes them: what a client sends cannot look like another line."""
    return text if text.isprintable() else json.dumps(text, ensure_ascii=True)[1:-1]


def _word(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text and text else json.dumps(text)


def _set(logger: logging.Logger, level: int, propagate: bool) -> None:
    logger.setLevel(level)
    logger.propagate = propagate


class _Handler(logging.Handler):
    def __init__(self, log: ServerLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            facts: dict[str, Any] = {"logger": record.name}
            if record.exc_info:
                facts |= {"traceback": logging.Formatter().formatException(record.exc_info)}
            self._log.line(record.levelname.lower(), record.getMessage(), facts, record.created)
        except Exception:
            self._log.writer.num_dropped += 1
