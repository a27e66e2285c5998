"""A progress bar for loading: bytes, rate, time left; in a terminal by rich, in a notebook by plain HTML.

If loading takes less than half a second, nothing is shown.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from exl.errors import ConfigError
from exl.units import format_bytes

Progress = Callable[[int, int], None]  # bytes done so far, total bytes

_DELAY = 0.5  # seconds before a bar appears
_PAUSE = 0.1  # seconds between two updates of a notebook's bar


@contextmanager
def shown_progress(progress: bool | Progress | None, title: str) -> Iterator[Progress | None]:
    """Yields the function to call with progress, or None.

    ``progress``: a function: itself; True: a bar; False: None; None: a bar in a notebook or a terminal, else None.
    Raises ``ConfigError`` for anything else.
    """
    if progress is not None and not isinstance(progress, bool):
        if not callable(progress):
            raise ConfigError(f"progress: found {progress!r}, expected True, False or a function of (done, total)")
        yield progress
        return
    in_notebook = _in_notebook()
    if progress is False or (progress is None and not in_notebook and not _on_terminal()):
        yield None
        return
    bar = NotebookBar(title) if in_notebook else TerminalBar(title)
    try:
        yield bar.update
    finally:
        bar.close()


def _in_notebook() -> bool:
    """Whether this is a kernel that shows HTML: Jupyter, Colab, VS Code. Does not import IPython."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _on_terminal() -> bool:
    """Whether standard error is a terminal; services and windowed programs have none at all, or a closed one."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


class TerminalBar:
    """A bar on standard error. When done, it disappears from a terminal, and stays if stderr is a file. If it cannot be
    written, loading goes on without it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._bar: Any = None
        self._failed = False

    def update(self, done: int, total: int) -> None:
        if self._failed or (self._bar is None and time.monotonic() - self._began < _DELAY):
            return
        with self._tolerant():
            if self._bar is None:
                self._start()
            self._bar.update(self._task, completed=done, total=total)

    def _start(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=_on_terminal())
        self._task = self._bar.add_task(self._title, total=None)
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            with self._tolerant():
                self._bar.stop()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: standard error was closed meanwhile
            self._failed = True


class NotebookBar:
    """One output of the cell, updated in place. When done, it becomes a line with bytes, seconds and rate."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._drawn = time.monotonic()
        self._handle: Any = None
        self._done = self._total = 0

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        now = time.monotonic()
        if now - self._drawn < (_DELAY if self._handle is None else _PAUSE):
            return
        self._drawn = now
        share = done / total if total else 0.0
        elapsed = now - self._began
        left = f", {elapsed * (1 - share) / share:.0f} s left" if share else ""
        self._show(
            f'<progress value="{done}" max="{max(total, 1)}" style="width: 20em; vertical-align: middle"></progress> '
            f"{format_bytes(done)} of {format_bytes(total)}, {self._rate(elapsed)}{left}"
        )

    def close(self) -> None:
        if self._handle is not None:
            elapsed = time.monotonic() - self._began
            self._show(f"{format_bytes(self._done)} in {elapsed:.1f} s, {self._rate(elapsed)}")

    def _rate(self, elapsed: float) -> str:
        return f"{format_bytes(int(self._done / elapsed) if elapsed else 0)}/s"

    def _show(self, text: str) -> None:
        from IPython.display import HTML, display

        picture = HTML(f"<div>{html.escape(self._title)}: {text}</div>")
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
