from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import load_with_progress
from exl.commands.options import Debug, DrawOptions, LoadOptions, ModelName, Stop, shared_options
from exl.commands.standard_streams import read_argument


@shared_options
def chat(
    which: ModelName,
    system: Annotated[str | None, typer.Option(help="What the model should know before the conversation.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="At most this many tokens per answer; default: 512, or half of what the context has left."),
    ] = None,
    overflow: Annotated[
        str,
        typer.Option(
            metavar="WAY", help="When the context is full. drop-oldest: the oldest turns are no longer shown; or error."
        ),
    ] = "drop-oldest",
    *,
    drawing: DrawOptions,
    stop: Stop = None,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Talk with a model. /? shows the commands.

    exl chat path/to/model --system "You are brief."

    echo "Tell me a story." | exl chat
    """
    from exl.chat import Chat
    from exl.commands.chat_session import other_model
    from exl.commands.terminal import run_chat

    system = None if system is None else read_argument(system, "--system")
    stops = [read_argument(item, "--stop") for item in stop or ()]
    with load_with_progress(which.name, loading) as llm:
        chat = llm.chat(system, overflow=overflow) if load is None else Chat.load(llm, load, overflow=overflow)
        if load is not None and system is not None:
            chat.system = system
        settings = {**({} if max_tokens is None else {"max_tokens": max_tokens}), **drawing.asked()}
        if stops:
            settings["stop"] = stops
        run_chat(llm, chat, settings, other_model(chat, str(load), llm), overflow=overflow)
