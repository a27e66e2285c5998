"""Options of ``exl serve`` beside those of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from exl.commands.key_file import read_keys
from exl.errors import ConfigError
from exl.server.options import ServerOptions
from exl.units import parse_bytes

_DEFAULTS = ServerOptions()
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Clients must send it; may be given more than once. Other users can see it in ps."
    ),
]
KeyFile = Annotated[Path | None, typer.Option(metavar="PATH", help="A file with one key in each line.")]
Names = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="What clients may call the model; may be given more than once."),
]
Seconds = "SECONDS"


@dataclass(frozen=True)
class ListenOptions:
    """Where the server is, and who may ask."""

    host: Host = _DEFAULTS.host
    port: Port = _DEFAULTS.port
    api_key: Keys = None
    api_key_file: KeyFile = None
    served_model_name: Names = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages from there may ask; may be given more than once; * is all."),
    ] = None
    root_path: Annotated[
        str, typer.Option(metavar="PATH", help="The prefix under which a proxy publishes the server: /exl.")
    ] = _DEFAULTS.root_path
    tls_cert: Annotated[Path | None, typer.Option(metavar="PATH", help="A certificate, as PEM.")] = None
    tls_key: Annotated[Path | None, typer.Option(metavar="PATH", help="Its key, without a password.")] = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Raises ``ConfigError`` for a file that cannot be read."""
        kept = () if self.api_key_file is None else read_keys(self.api_key_file, "one in each line")
        return (*(self.api_key or ()), *kept)


@dataclass(frozen=True)
class LimitOptions:
    """What a client may ask for, and how long it may take."""

    max_queue: Annotated[int, typer.Option(metavar="N", help="Requests that may wait; more get 429.")] = (
        _DEFAULTS.max_queue
    )
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="At most this many new tokens a request. Default: what the context leaves."),
    ] = None
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="A request's body: 413 beyond.")] = "16MiB"
    max_connections: Annotated[int, typer.Option(metavar="N", help="Connections at once; more get 503.")] = (
        _DEFAULTS.max_connections
    )
    timeout: Annotated[
        float | None, typer.Option(metavar=Seconds, help="When an answer ends as it is. Default: never.")
    ] = None
    header_timeout: Annotated[float, typer.Option(metavar=Seconds, help="In which headers must come.")] = (
        _DEFAULTS.header_timeout
    )
    body_timeout: Annotated[float, typer.Option(metavar=Seconds, help="In which more of a body must come.")] = (
        _DEFAULTS.body_timeout
    )
    write_timeout: Annotated[
        float, typer.Option(metavar=Seconds, help="After which a client that reads nothing is given up.")
    ] = _DEFAULTS.write_timeout
    keep_alive: Annotated[float, typer.Option(metavar=Seconds, help="That an idle connection stays open.")] = (
        _DEFAULTS.keep_alive
    )
    drain_seconds: Annotated[
        float, typer.Option(metavar=Seconds, help="That SIGTERM leaves to answers that have begun.")
    ] = _DEFAULTS.drain_seconds


@dataclass(frozen=True)
class WatchOptions:
    """What the server tells of itself."""

    log_format: Annotated[str, typer.Option(metavar="NAME", help="text or json.")] = _DEFAULTS.log_format
    log_file: Annotated[Path | None, typer.Option(metavar="PATH", help="Default: standard error.")] = None
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts are in the log, too.")] = False
    metrics_compat: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="vllm: /metrics has vLLM's names, too.")
    ] = None
    trace: Annotated[bool, typer.Option("--trace", help="Spans go to the OpenTelemetry provider of this process.")] = (
        False
    )
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Spans go to this OpenTelemetry collector: http://host:4318/v1/traces."),
    ] = None


@dataclass(frozen=True)
class ServedOptions:
    """Which models, and how their answers are read."""

    models_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Each folder in it with a config.json is a model, loaded when asked for."),
    ] = None
    idle_unload: Annotated[
        float | None, typer.Option(metavar=Seconds, help="Unload a model without requests for so long.")
    ] = None
    tool_format: Annotated[
        str, typer.Option(metavar="NAME", help="How the model writes tool calls; auto: as its chat template does.")
    ] = _DEFAULTS.tool_format
    reasoning_format: Annotated[
        str, typer.Option(metavar="NAME", help="How the model marks its reasoning; auto: as its chat template does.")
    ] = _DEFAULTS.reasoning_format


def server_options(
    listen: ListenOptions, limits: LimitOptions, watch: WatchOptions, served: ServedOptions
) -> ServerOptions:
    """Raises ``ConfigError`` that names the option."""
    try:
        max_body = parse_bytes(limits.max_body)
    except ConfigError as error:
        raise ConfigError(f"max_body: {error}") from None
    return ServerOptions(
        host=listen.host,
        port=listen.port,
        api_keys=listen.keys,
        served_names=tuple(listen.served_model_name or ()),
        cors_origins=tuple(listen.cors_origin or ()),
        root_path=listen.root_path,
        tls_cert=listen.tls_cert,
        tls_key=listen.tls_key,
        **(vars(limits) | {"max_body": max_body}),
        **(vars(watch) | {"metrics_compat": tuple(watch.metrics_compat or ())}),
        **vars(served),
    )
