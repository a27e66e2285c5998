from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import load_with_progress
from exl.commands.options import Debug, DrawOptions, LoadOptions, Model, shared_options


@shared_options
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="What the model should know before the conversation.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="At most this many tokens per answer; default: 512, or half of what the context has left."),
    ] = None,
    *,
    drawing: DrawOptions,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Talk with a model. /help shows the commands.

    exl chat --model path/to/model --system "You are brief."

    echo "Tell me a story." | exl chat
    """
    from exl.chat import Chat
    from exl.commands.chat_session import ChatSession
    from exl.commands.terminal import is_terminal, run_piped, run_terminal, say_dim, say_to_stderr, write

    with load_with_progress(model, loading) as llm:
        found = llm.chat(system) if load is None else Chat.load(llm, load)
        if load is not None and system is not None:
            found.system = system
        settings = {**({} if max_tokens is None else {"max_tokens": max_tokens}), **drawing.asked()}
        say = say_dim if is_terminal() else say_to_stderr
        session = ChatSession(llm, found, write, say, settings)
        if found.notice is not None:
            say(found.notice)
        if is_terminal():
            say("/help shows the commands; Alt-Enter begins a new line; Ctrl-C stops an answer; Ctrl-D leaves")
            run_terminal(session)
        else:
            run_piped(session)
