from __future__ import annotations

from exl.commands.common import say
from exl.commands.options import Debug, LoadOptions, Loras, ModelName, RareLoadOptions, parse_loras, shared_options
from exl.commands.serve_options import LimitOptions, ListenOptions, ServedOptions, WatchOptions, server_options
from exl.errors import ConfigError

_LOADING = LoadOptions(max_sequences=64, cache_tokens="auto")


@shared_options
def serve(
    which: ModelName,
    *,
    listen: ListenOptions,
    limits: LimitOptions,
    watch: WatchOptions,
    served: ServedOptions,
    loading: LoadOptions = _LOADING,
    rarely: RareLoadOptions,
    lora: Loras = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, for the clients of OpenAI, Anthropic, Hugging Face and llama-server.

    exl serve path/to/model

    exl serve path/to/model --host 0.0.0.0 --port 8080 --api-key-file keys.txt
    """
    options = server_options(listen, limits, watch, served)
    try:
        from exl.server.run import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"exl serve needs the package {error.name}: pip install 'exl-engine[server]'") from None
    from exl.parse.choose import check_formats
    from exl.server.assemble import models_of
    from exl.server.state import Server

    check_formats(options.tool_format, options.reasoning_format)
    engine = {**loading.engine(), **rarely.engine(), "max_queue": options.max_queue, "lora": parse_loras(lora)}
    run(Server(options, models_of(which.name, options, {**engine, **loading.source})), say)
