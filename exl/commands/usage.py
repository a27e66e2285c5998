"""What was typed, judged: numbers that show what was found, options and commands that nobody has.

typer's own messages name neither the value nor, reliably, what was meant; and they change between its releases.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from copy import copy
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from typer.models import ArgumentInfo

from exl.commands.options import parameter_hints
from exl.errors import ConfigError

_METAVARS = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT", Path: "PATH"}
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")


def judge_numbers(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` for typer: numbers are read by exl, so that the error shows what was typed; and the help names what
    an option takes by a short word."""
    signature = inspect.signature(command)
    hints = parameter_hints(command)
    parameters = []
    for parameter in signature.parameters.values():
        annotation = hints[parameter.name]
        kind = _type_of(annotation)
        if kind in _METAVARS:
            plain, info, *rest = get_args(annotation)
            info = copy(info)  # the original may belong to several commands
            is_argument = isinstance(info, ArgumentInfo)
            info.metavar = info.metavar or (parameter.name.upper() if is_argument else _METAVARS[kind])
            if kind in (int, float):
                names = [name for name in info.param_decls or () if name.startswith("--")]
                shown = names[0] if names else "--" + parameter.name.replace("_", "-")
                info.parser = number_parser(kind, shown)
            annotation = Annotated[(plain, info, *rest)]
        parameters.append(parameter.replace(annotation=annotation))

    @wraps(command)
    def run(*args: Any, **values: Any) -> None:
        command(*args, **values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def _type_of(annotation: Any) -> Any:
    """The type of an option's values, without the None that stands for an option not given."""
    if get_origin(annotation) is not Annotated:
        return None
    plain = get_args(annotation)[0]
    if get_origin(plain) in (Union, types.UnionType):
        plain = next(iter(set(get_args(plain)) - {type(None)}), None)
    return plain


def number_parser(kind: type, name: str) -> Callable[[Any], Any]:
    """A function from what was typed after the option ``name`` to a number. It raises ``ConfigError``."""

    def parse(text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            if kind is int:
                if not _WHOLE.fullmatch(text.strip()):
                    raise ValueError
                return int(text)
            return float(text)
        except ValueError:
            shown = text if len(text) <= 60 else text[:60] + "..."
            expected = "a whole number, such as 1000" if kind is int else "a number, such as 0.8"
            raise ConfigError(f"{name}: found {shown!r}, expected {expected}") from None

    return parse


def explain_usage(error: Exception) -> str:
    """The message for one of typer's usage errors: what was typed, and what may have been meant."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    path = getattr(context, "command_path", "exl")
    extra = re.search(r"unexpected extra arguments? \((.*)\)|unexpected extra argument\(s\) \((.*)\)", str(error))
    if extra is not None:
        found = extra[1] or extra[2]
        return f"{path}: found more arguments than it takes: {found}; put quotes around a text of several words"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and command is not None:
        return _explain_option(option, command, path)
    message = error.format_message()  # type: ignore[attr-defined]
    unknown = re.match(r"No such command '(.*?)'\.", message)
    if unknown is not None and hasattr(command, "commands"):
        typed = unknown[1]
        return f"{typed}: no such command{_meant(typed, command.commands) or f'; {path} --help shows them'}"
    return message


def _explain_option(option: str, command: Any, path: str) -> str:
    known = _options(command)
    message = f"{option}: no such option of {path}"
    commands = getattr(command, "commands", {})
    having = [name for name, sub in commands.items() if option in _options(sub)]
    if having:
        return f"{message}; options follow the command: {path} {having[0]} {option} ..."
    return f"{message}{_meant(option, known) or f'; {path} --help shows them'}"


def _options(command: Any) -> list[str]:
    return ["--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))]


def _meant(typed: str, known: Any) -> str:
    close = get_close_matches(typed.lower(), list(known), n=2, cutoff=0.6)
    if not close:
        close = [name for name in known if typed.lstrip("-") and name.lstrip("-").startswith(typed.lstrip("-"))][:2]
    return f": did you mean {' or '.join(close)}?" if close else ""


def help_text(command: Callable[..., None]) -> tuple[str, str]:
    """A command's docstring -> its first sentence, and the whole with its examples kept as they are written.

    A paragraph of the docstring that begins with a command is an example.
    """
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    examples = [text for text in paragraphs if text.startswith(("exl ", "echo "))]
    words = [text for text in paragraphs if text not in examples]
    if examples:
        lines = [f"  {line}" for example in examples for line in _continued(example)]
        words.append("\n".join(["\b", "Examples:", *lines]))  # \b: click keeps these lines
    return words[0].replace("\n", " "), "\n\n".join(words)


def _continued(example: str) -> list[str]:
    """A command on lines of at most 74 characters, as a shell reads them."""
    lines = [""]
    for word in re.split(r" (?=--)", example):
        if lines[-1] and len(lines[-1]) + len(word) > 71:
            lines[-1] += " \\"
            lines.append("    " + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return lines
