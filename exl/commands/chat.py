from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import (
    Context,
    Debug,
    Device,
    KVCacheType,
    Model,
    Ram,
    Revision,
    Token,
    Vram,
    load_options,
    load_with_progress,
)


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="What the model should know before the conversation.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own, else greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most likely tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens p times as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens seen are less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers, on the same machine.")] = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    revision: Revision = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Talk with a model. /help shows the commands.

    exl chat --model path/to/model --system "You are brief."

    echo "Tell me a story." | exl chat
    """
    from exl.chat import Chat
    from exl.commands.chat_session import ChatSession
    from exl.commands.terminal import is_terminal, run_piped, run_terminal, say_dim, say_to_stderr, write

    asked = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options = load_options(device, vram, ram, context, kv_cache)
    with load_with_progress(model, revision=revision, token=token, **options) as llm:
        found = llm.chat(system) if load is None else Chat.load(llm, load)
        if load is not None and system is not None:
            found.system = system
        say = say_dim if is_terminal() else say_to_stderr
        settings = {name: value for name, value in asked.items() if value is not None}
        session = ChatSession(llm, found, write, say, settings)
        if found.notice is not None:
            say(found.notice)
        if is_terminal():
            say("/help shows the commands; Alt-Enter begins a new line; Ctrl-C stops an answer; Ctrl-D leaves")
            run_terminal(session)
        else:
            run_piped(session)
