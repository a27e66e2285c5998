from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exl.commands.chat_partner import LocalModel, Partner, ServerModel
from exl.commands.common import is_terminal, load_with_progress, say
from exl.commands.key_file import read_keys
from exl.commands.options import Debug, DrawOptions, LoadOptions, Lora, ModelName, Stop, shared_options
from exl.commands.prompt_status import PromptStatus
from exl.commands.standard_streams import read_argument
from exl.errors import ConfigError

if TYPE_CHECKING:
    from exl.remote_chat import RemoteModel


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
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Talk with a model of this server, http://127.0.0.1:8000, and load none."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="With --url: a file whose first line is the server's API key.")
    ] = None,
    *,
    drawing: DrawOptions,
    stop: Stop = None,
    lora: Lora = None,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Talk with a model. /? shows the commands.

    exl chat path/to/model --system "You are brief."

    echo "Tell me a story." | exl chat

    exl chat --url http://127.0.0.1:8000
    """
    from exl.commands.chat_session import other_model
    from exl.commands.terminal import run_chat

    system = None if system is None else read_argument(system, "--system")
    stops = [read_argument(item, "--stop") for item in stop or ()]
    settings = {**({} if max_tokens is None else {"max_tokens": max_tokens}), **drawing.asked()}
    if stops:
        settings["stop"] = stops
    with contextlib.ExitStack() as stack:
        partner: Partner
        if url is not None:
            for option in dataclasses.fields(loading):
                if getattr(loading, option.name) != option.default:
                    raise loaded_elsewhere("--" + option.name.replace("_", "-"))
            if lora is not None:
                raise loaded_elsewhere("--lora")
            partner = ServerModel(connect(url, api_key_file, which.name))
        elif api_key_file is not None:
            raise ConfigError("--api-key-file: goes along with --url, which was not given")
        else:
            partner = LocalModel(stack.enter_context(load_with_progress(which.name, loading, lora=lora)))
        chat = partner.new_chat(system, overflow) if load is None else partner.load_chat(str(load), overflow)
        if load is not None and system is not None:
            chat.system = system
        run_chat(partner, chat, settings, other_model(chat, str(load), partner), overflow=overflow)


def loaded_elsewhere(option: str) -> ConfigError:
    """The refusal of an option that only a model takes that is loaded here."""
    return ConfigError(f"{option}: found it with --url, whose server has loaded its model: expected one of the two")


def connect(url: str, key_file: Path | None, name: str | None) -> RemoteModel:
    """A server's model; waits until it is loaded, and tells so. Raises ``ExlError``."""
    from exl.remote_chat import RemoteModel

    key = None if key_file is None else read_keys(key_file, "one in its first line")[0]
    with PromptStatus() as status:
        told = False

        def wait(text: str) -> None:
            nonlocal told
            status.wait(text)
            if not told and not is_terminal(sys.stderr):
                say(f"exl: {text}")
                told = True

        return RemoteModel.connect(url, key, name, wait)
