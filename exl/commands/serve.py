from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import say
from exl.commands.options import Debug, LoadOptions, ModelName, RareLoadOptions, shared_options
from exl.errors import ConfigError

_LOADING = LoadOptions(max_sequences=64, cache_tokens="auto")


@shared_options
def serve(
    which: ModelName,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Clients must send it; may be given more than once.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key in each line.")] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What clients may call the model; may be given more than once."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="At most this many new tokens a request. Default: what the context leaves.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which an answer ends as it is. Default: none.")
    ] = None,
    tool_format: Annotated[
        str, typer.Option(help="How the model writes tool calls. Default: as its chat template does.")
    ] = "auto",
    reasoning_format: Annotated[
        str, typer.Option(help="How the model marks its reasoning. Default: as its chat template does.")
    ] = "auto",
    *,
    loading: LoadOptions = _LOADING,
    rarely: RareLoadOptions,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, for the clients of OpenAI, Anthropic, Hugging Face and llama-server.

    exl serve path/to/model

    exl serve path/to/model --host 0.0.0.0 --port 8080 --api-key-file keys.txt
    """
    from exl.server.options import ServerOptions

    options = ServerOptions(
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *_keys(api_key_file)),
        served_names=tuple(served_model_name or ()),
        max_queue=max_queue,
        max_tokens=max_tokens,
        timeout=timeout,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
    )
    try:
        from exl.server.run import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"exl serve needs the package {error.name}: pip install 'exl-engine[server]'") from None
    from exl.llm import LLM, load
    from exl.parse.choose import check_formats
    from exl.server.models import Models, Progress
    from exl.server.state import Server

    check_formats(tool_format, reasoning_format)
    engine = {**loading.engine(), **rarely.engine(), "max_queue": max_queue}

    def load_model(tell: Progress) -> LLM:
        return load(which.name, **loading.source, **engine, progress=tell)

    names = options.served_names or (model_name(which.name),)
    formats = {"tool_format": tool_format, "reasoning_format": reasoning_format}
    run(Server(options, Models(names[0], load_model, names[1:], **formats)), say)


def model_name(name: str | None) -> str:
    """How clients call a model that has no other name: its folder's, or the repository's."""
    if name is None:
        return "stories"
    path = Path(name)
    return path.resolve().name if path.exists() else name


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: {path}: {getattr(error, 'strerror', None) or error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"--api-key-file: {path}: found no key, expected one in each line")
    return found
