"""Who looks on: metrics, traces and logs hear of each request here, and of nothing else."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Journey:
    """One request's way through the server. Times are seconds of ``time.perf_counter``."""

    request_id: str
    route: str  # the path as the server defines it, without a client's own words
    method: str = ""
    path: str = ""  # as the client wrote it
    client: str = ""  # its address
    model: str = ""
    prompt: str | None = None  # with --log-prompts
    arrived: float = field(default_factory=time.perf_counter)
    submitted: float | None = None  # to the engine
    began: float | None = None  # its first sequence was admitted
    first: float | None = None  # its first token came
    last: float | None = None
    ended: float | None = None
    num_prompt: int = 0  # tokens
    num_cached: int = 0  # of those, taken from the cache
    num_generated: int = 0  # of all choices
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reasons: tuple[str, ...] = ()  # the engine's: "stop", "length", "cancelled"; one for each choice
    status: int | None = None
    error: str | None = None
    model_wait: float = 0.0  # seconds that it waited for its model to be loaded, or free to be
    loaded_model: bool = False  # it was one of those for whom the model was loaded
    traceparent: str | None = None  # the header of a client that traces (w3.org/TR/trace-context)


# Of the HTTP request that runs: what serves it need not be handed its journey through every call.
CURRENT_JOURNEY: ContextVar[Journey | None] = ContextVar("journey", default=None)


class Watch:
    """Called in the server's event loop, so none may wait. Who inherits from it leaves out what it need not hear."""

    def token_gap(self, journey: Journey, seconds: float, num_tokens: int) -> None:
        """Tokens of a request came so long after those before them."""

    def generated(self, journey: Journey) -> None:
        """The engine has ended a request; ``finish_reasons`` and counts are filled in."""

    def responded(self, journey: Journey) -> None:
        """The last byte is sent, or the client has left; called once for each HTTP request. ``submitted`` is None if
        the engine was not asked."""
