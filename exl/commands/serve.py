from __future__ import annotations

from pathlib import Path

from exl.commands.common import say
from exl.commands.options import Debug, LoadOptions, ModelName, RareLoadOptions, shared_options
from exl.commands.serve_options import LimitOptions, ListenOptions, WatchOptions, server_options
from exl.errors import ConfigError

_LOADING = LoadOptions(max_sequences=64, cache_tokens="auto")


@shared_options
def serve(
    which: ModelName,
    *,
    listen: ListenOptions,
    limits: LimitOptions,
    watch: WatchOptions,
    loading: LoadOptions = _LOADING,
    rarely: RareLoadOptions,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, for the clients of OpenAI, Anthropic, Hugging Face and llama-server.

    exl serve path/to/model

    exl serve path/to/model --host 0.0.0.0 --port 8080 --api-key-file keys.txt
    """
    options = server_options(listen, limits, watch)
    try:
        from exl.server.run import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"exl serve needs the package {error.name}: pip install 'exl-engine[server]'") from None
    from exl.llm import LLM, load
    from exl.server.models import Models, Progress
    from exl.server.state import Server

    engine = {**loading.engine(), **rarely.engine(), "max_queue": options.max_queue}

    def load_model(tell: Progress) -> LLM:
        return load(which.name, **loading.source, **engine, progress=tell)

    names = options.served_names or (model_name(which.name),)
    run(Server(options, Models(names[0], load_model, names[1:])), say)


def model_name(name: str | None) -> str:
    """How clients call a model that has no other name: its folder's, or the repository's."""
    if name is None:
        return "stories"
    path = Path(name)
    return path.resolve().name if path.exists() else name
