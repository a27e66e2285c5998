"""A server that runs in a thread of the test's own process, on a free port."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

import exl
from exl.llm import LLM
from exl.server.models import Models
from exl.server.options import ServerOptions
from exl.server.run import address_of, listen, run_http
from exl.server.state import Server

T = TypeVar("T")
SECONDS = 60.0  # in which anything of a test must have happened


class RunningServer:
    """A context manager. ``load`` makes the model, by default the bundled one; ``options`` are ``ServerOptions``."""

    def __init__(
        self,
        load: Callable[[Any], LLM] | None = None,
        name: str = "stories",
        aliases: tuple[str, ...] = (),
        models: Models | None = None,
        **options: Any,
    ) -> None:
        """``models``: in the place of one model."""
        self.options = dataclasses.replace(ServerOptions(port=0), **options)
        models = Models(name, load or load_bundled, aliases) if models is None else models
        self.server = Server(self.options, models)
        self.lines: list[str] = []
        self.error: BaseException | None = None  # what ended it, if that was one
        self._http: Any = None
        self.listening = listen(self.options)
        self.url = address_of(self.options, self.listening)
        self._thread = threading.Thread(target=self._run, name="test-server")

    @property
    def llm(self) -> LLM:
        """The model that it serves."""
        served = self.server.models.states[0].served
        assert served is not None
        return served.llm

    def _run(self) -> None:
        import asyncio

        def began(http: Any) -> None:
            self._http = http

        try:
            asyncio.run(run_http(self.server, self.listening, self.lines.append, began))
        except BaseException as error:
            self.error = error

    def start(self) -> None:
        """Without waiting for the model."""
        self._thread.start()

    def ask(self, path: str) -> httpx.Response | None:
        """None: it does not answer yet."""
        try:
            return httpx.get(self.url + path, timeout=SECONDS)
        except httpx.TransportError:
            return None

    def signal(self, number: int) -> None:
        """As if the process had got a signal."""
        self._http.handle_exit(number, None)

    def wait_until_ended(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the server has not ended in {seconds} s"

    def __enter__(self) -> RunningServer:
        self.start()
        self.wait_until_loaded()
        return self

    def wait_until_loaded(self) -> None:
        for _ in range(int(SECONDS / 0.05)):
            told = self.ask("/health")
            if told is not None and told.status_code == 200:
                return
            self._thread.join(0.05)
            if not self._thread.is_alive():
                raise AssertionError(f"the server has ended: {self.error!r}")
        raise AssertionError(f"the server did not load: {self.server.models.states}")

    def __exit__(self, *exc_info: object) -> None:
        self._http.should_exit = True
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the server has not ended"
        self.listening.close()
        self.server.close()


def wait_until(happened: Callable[[], T]) -> T:
    """What ``happened`` returns, as soon as that is true."""
    until = time.monotonic() + SECONDS
    while not (value := happened()):
        assert time.monotonic() < until, "it has not happened"
        time.sleep(0.01)
    return value


def load_bundled(progress: Any) -> LLM:
    return exl.load(device="cpu", max_sequences=8, cache_tokens=8192, max_queue=64, progress=progress)
