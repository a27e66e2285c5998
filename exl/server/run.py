"""``exl serve``: uvicorn in front of the application, from the first line to the last request after SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

from exl.errors import ConfigError, ExlError
from exl.server.app import create_app
from exl.server.options import ServerOptions
from exl.server.state import Server


def serve(server: Server, say: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM; a second one does not wait. ``say`` prints a line: the address, then the plan.
    Raises ``ExlError`` if the address is taken or the first model cannot be loaded."""
    listening = listen(server.options)
    try:
        _run(run_http(server, listening, say))
    finally:
        listening.close()
        server.close()


def listen(options: ServerOptions) -> socket.socket:
    """Bound before anything is loaded, so that a port in use is told at once. Connections wait in it until then."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let two servers share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        found = f"{options.host}:{options.port}"
        raise ConfigError(f"--host, --port: cannot listen on {found}: {error.strerror or error}") from None
    return listening


def address_of(options: ServerOptions, listening: socket.socket) -> str:
    """``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"


def _run(main: Coroutine[Any, Any, None]) -> None:
    """In uvloop's event loop if it is there, which costs about half as much as asyncio's own for each piece sent."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def run_http(
    server: Server,
    listening: socket.socket,
    say: Callable[[str], None],
    began: Callable[[uvicorn.Server], None] | None = None,
) -> None:
    """Serves on a socket that listens. ``began`` is called first, with what ends it when ``should_exit`` is set."""
    options = server.options
    config = uvicorn.Config(
        create_app(server),
        log_config=None,
        access_log=False,
        lifespan="off",
        root_path=options.root_path,
        timeout_keep_alive=max(1, round(options.keep_alive)),
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        server_header=False,
    )
    http = _Http(config, server)
    if began is not None:
        began(http)
    server.models.start()
    say(f"exl: listening on {address_of(options, listening)}")
    running = asyncio.ensure_future(http.serve(sockets=[listening]))
    loading = asyncio.ensure_future(server.models.loaded())
    try:
        await asyncio.wait((running, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            served = server.models.states[0].served
            if served is not None:
                say(f"exl: {served.name}: {served.llm.plan.summary().splitlines()[0]}")
        await running
    except ExlError:
        http.should_exit = True
        await running
        raise
    finally:
        loading.cancel()


class _Http(uvicorn.Server):
    """Its first signal stops taking requests and lets those that run end; a second one ends them."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._drain is not None or (sig == signal.SIGINT and self._server.draining):
            self.force_exit = self.should_exit = True
            return
        self._server.draining = True
        loop = self._loop
        loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        """Connections are still taken meanwhile, and told 503, so that a load balancer hears why."""
        await asyncio.to_thread(self._server.models.drain, self._server.options.drain_seconds)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
