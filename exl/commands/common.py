"""What commands share besides their options: progress bars, loading, and printing to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl.commands.options import LoadOptions
    from exl.llm import LLM


def load_with_progress(
    model: str | None, options: LoadOptions, context: int | None = None, lora: str | None = None
) -> LLM:
    """Loads a model, with a progress bar if standard error is a terminal. Imports torch. ``context``: the default if
    the user gave none. ``lora``: the folder of an adapter."""
    from exl.load_model import load

    return load(model, lora=lora, **options.source, **options.engine(context))


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


class WorkBar:
    """A bar on standard error with the share of the work that is done and the time left; nothing without a terminal.

    The time left follows from the mean rate since the first call of ``update``: what is done by then, by a run that is
    resumed, says nothing about the rate. A rate over the last seconds would jump between steps of different kinds.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic, console: Any = None) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.percentage:.0f}%"),
            progress.TextColumn("{task.fields[left]}"),
        )
        console = Console(stderr=True) if console is None else console
        self._bar = progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=None, left="")
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self.seconds_left: float | None = None  # None: not known yet

    def __enter__(self) -> WorkBar:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, what: str) -> None:
        now = self._clock()
        began, before = self._first = self._first or (now, done)
        if done > before:
            self.seconds_left = (now - began) * (total - done) / (done - before)
        left = "" if self.seconds_left is None else f"{_hours(self.seconds_left)} left"
        self._bar.update(self._task, completed=done, total=total, description=what, left=left)


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
