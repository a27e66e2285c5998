"""What commands share besides their options: loading with a progress bar, one place where lines go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exl.commands.options import LoadOptions
    from exl.llm import LLM


def load_with_progress(model: str | None, options: LoadOptions, context: int | None = None) -> LLM:
    """Loads with a progress bar on standard error, if that is a terminal. torch is imported now. ``context``: if none
    was asked for."""
    from exl.llm import load

    return load(model, **options.source, **options.engine(context))


def say(line: str) -> None:
    print(line, file=sys.stderr)
