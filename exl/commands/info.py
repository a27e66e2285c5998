from __future__ import annotations

import sys
import textwrap
from typing import Annotated

import typer

from exl.commands.common import is_terminal
from exl.commands.options import Debug, ModelName, ModelOption, Revision, Token, shared_options
from exl.commands.standard_streams import print_json
from exl.commands.word_wrap import terminal_columns


@shared_options
def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or Hugging Face repository; without one: this machine."),
    ] = None,
    model_option: ModelOption = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a model is; or, without one, versions, the GPU and what is missing.

    A model's weights are not read, and those of a Hugging Face repository are not downloaded.

    exl info

    exl info path/to/model
    """
    model, numbers = ModelName(model, model_option).name, {}
    if model is None:
        from exl.commands.system_info import describe_system

        facts = describe_system()
    else:
        from exl.commands.model_facts import describe_model_files

        found = describe_model_files(model, revision, token)
        facts, numbers = found.shown, found.numbers
    if as_json:
        print_json(facts | numbers)
    else:
        print(_table(facts))


def _table(facts: dict[str, str]) -> str:
    """A line for each fact; in a terminal, values are wrapped beside their names."""
    width = max(map(len, facts)) + 2
    room = max(30, terminal_columns(sys.stdout) - width) if is_terminal(sys.stdout) else 10**6
    lines = []
    for name, value in facts.items():
        first, *more = textwrap.wrap(value, room, break_on_hyphens=False) or [""]
        lines += [f"{name:<{width}}{first}", *(" " * width + line for line in more)]
    return "\n".join(lines)
