from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import load_with_progress
from exl.commands.options import Debug, DrawOptions, LoadOptions, ModelName, shared_options
from exl.commands.standard_streams import read_argument


@shared_options
def chat(
    which: ModelName,
    system: Annotated[str | None, typer.Option(help="What the model should know before the conversation.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens per answer.")] = 512,
    *,
    drawing: DrawOptions,
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
    with load_with_progress(which.name, loading) as llm:
        chat = llm.chat(system) if load is None else Chat.load(llm, load)
        if load is not None and system is not None:
            chat.system = system
        settings = {"max_tokens": max_tokens, **drawing.asked()}
        run_chat(llm, chat, settings, None if load is None else other_model(str(load), llm))
