"""What commands share besides their options: loading with a progress bar, and printing to standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl.commands.options import LoadOptions
    from exl.llm import LLM


def load_with_progress(model: str | None, options: LoadOptions, context: int | None = None) -> LLM:
    """Loads a model, with a progress bar if standard error is a terminal. Imports torch. ``context``: the default if
    the user gave none."""
    from exl.llm import load

    return load(model, **options.source, **options.engine(context))


def say(line: str) -> None:
    """Prints a line to standard error; to nowhere if there is none, where ``print`` would take standard output."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def is_terminal(stream: object) -> bool:
    """Whether a standard stream is there, open, and a terminal."""
    try:
        return stream is not None and stream.isatty()  # type: ignore[attr-defined]
    except ValueError:  # closed
        return False
