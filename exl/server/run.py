"""``exl serve``: uvicorn in front of the application, from the first line to the last request after SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

from exl.errors import ConfigError, ExlError
from exl.memory.host import trim_heap
from exl.server.app import create_app
from exl.server.connections import MAX_HEAD_BYTES, allow_many_files, protocol_class, watch_connections
from exl.server.gate import is_loopback
from exl.server.logs import ServerLog
from exl.server.options import ServerOptions
from exl.server.state import Server
from exl.server.traces import Traces

_EXIT_SECONDS = 10.0  # how long the process may take when all connections are closed
_IDLE_SECONDS = 1.0  # without a request, after which memory is given back
_CLOSE_SECONDS = 5  # how long a client may take for the end of its answer, when all answers have ended


def serve(server: Server, say: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM; a second one does not wait. ``say`` prints a line: the address, then the plan.
    Raises ``ExlError`` if the address is taken, a file of ``options`` is wrong, or the first model cannot be loaded."""
    options = server.options
    check_tls(options)
    listening = listen(options)
    # What is imported by now stays: the collector that runs when a model is unloaded need not look through it, while
    # others' requests wait for it.
    gc.collect()
    gc.freeze()
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        stack.callback(listening.close)
        log = ServerLog(options)
        stack.callback(log.close)
        stack.enter_context(log.loggers())
        server.watches.append(log)
        if options.trace or options.otlp_endpoint is not None:
            traces = Traces.of(options)
            stack.callback(traces.close)
            server.watches.append(traces)
        allow_many_files()

        def tell(line: str) -> None:
            if options.log_format == "json" and options.log_file is None:
                log.line("info", line.removeprefix("exl: "))  # so that all of standard error is JSON
                return
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
                say(line)

        async def main() -> None:
            try:
                await run_http(server, listening, tell)
            finally:
                if server.draining:
                    _end_within(_EXIT_SECONDS)

        _run(main())


def check_tls(options: ServerOptions) -> None:
    """Raises ``ConfigError`` if the certificate and its key cannot be used."""
    if options.tls_cert is None or options.tls_key is None:
        return
    for name, path in (("tls_cert", options.tls_cert), ("tls_key", options.tls_key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}: {path}: {error.strerror or error}") from None
    try:
        # A key with a password would be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        found = f"{options.tls_cert}, {options.tls_key}"
        text = f"tls_cert, tls_key: {found}: {error}; expected a certificate and its key without a password, as PEM"
        raise ConfigError(text) from None


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
    """In uvloop's event loop if it is there: it costs less for each piece that is sent."""
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
        http=protocol_class(options),
        h11_max_incomplete_event_size=4 * MAX_HEAD_BYTES,  # so that the protocol's own bound is met first
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        forwarded_allow_ips="127.0.0.1",  # whose X-Forwarded-For is believed
        timeout_keep_alive=options.keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        server_header=False,
    )
    http = _Http(config, server)
    if began is not None:
        began(http)
    server.models.start()
    watching = [asyncio.ensure_future(work) for work in (watch_connections(http), return_memory(server, _IDLE_SECONDS))]
    running = asyncio.ensure_future(http.serve(sockets=[listening]))
    await asyncio.sleep(0)  # from here on a signal is the server's
    say(f"exl: listening on {address_of(options, listening)}")
    if not options.api_keys and not is_loopback(options.host):
        say("exl: warning: there is no API key, so whoever reaches this address may ask: see --api-key-file")
    if options.models_dir is not None:
        say(f"exl: {len(server.models.states)} models to ask for, with those of {options.models_dir}")
    loading = asyncio.ensure_future(server.models.loaded())
    try:
        await asyncio.wait((running, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            first = server.models.default
            if first is not None and first.served is not None:
                say(f"exl: {first.name}: {first.served.llm.plan.summary().splitlines()[0]}")
        await running
    except ExlError:
        http.should_exit = True
        await running
        if not server.draining:  # else that is why loading ended
            raise
    finally:
        for task in (loading, *watching):
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def return_memory(server: Server, seconds: float, trim: Callable[[], None] = trim_heap) -> None:
    """Bodies, prompts and answers leave the heap in pieces, which the allocator keeps for later ones. When nobody asks
    any more, they go back to the system: the next model, or another program, may need them."""
    done = server.num_requests
    while True:
        before = server.num_requests
        await asyncio.sleep(seconds)
        if server.num_open == 0 and done != before == server.num_requests:
            done = before
            await asyncio.to_thread(trim)


class _Http(uvicorn.Server):
    """Its first signal stops taking requests and lets those that run end; a second one ends them."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        """In the event loop that will run it."""
        super().__init__(config)
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._drains: list[asyncio.Task[None]] = []

    def handle_exit(self, sig: int, frame: object) -> None:
        again = self._server.draining
        self._server.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, 0.0 if again else self._server.options.drain_seconds)

    def _begin_drain(self, seconds: float) -> None:
        self._drains.append(asyncio.ensure_future(self._drained(seconds)))

    async def _drained(self, seconds: float) -> None:
        """Connections are still taken meanwhile, and told 503, so that a load balancer hears why."""
        self.force_exit = seconds == 0
        await asyncio.to_thread(self._server.models.drain, seconds)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)


def _end_within(seconds: float) -> None:
    """A thread that loads a model or compiles a grammar cannot be ended; the process does not wait longer for it."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
