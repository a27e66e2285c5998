"""How far a long prompt has come: a line on standard error that disappears when the answer begins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from exl.commands.common import is_terminal
from exl.commands.word_wrap import terminal_columns
from exl.request_options import PromptProgress

_DELAY = 0.5  # seconds before the line appears: most prompts are read by then
_PAUSE = 0.1  # seconds between two updates


class PromptStatus:
    """A context manager; ``update`` is for ``prompt_progress=``. Shows nothing unless standard error is a terminal."""

    def __init__(self, check: Callable[[], None] | None = None) -> None:
        """``check``: called at every update; what it raises ends the request."""
        self._check = check
        self._watched = is_terminal(sys.stderr)
        self._began = self._drawn = time.monotonic()
        self._width = 0  # of what is shown

    def update(self, progress: PromptProgress) -> None:
        if self._check is not None:
            self._check()
        now = time.monotonic()
        if not self._watched or now - self._began < _DELAY or (self._width and now - self._drawn < _PAUSE):
            return
        self._drawn = now
        self._show(
            f"reading the prompt: {progress.tokens:,} of {progress.total:,} tokens "
            f"(layer {progress.layer} of {progress.num_layers})"
        )

    def wait(self, text: str) -> None:
        """Shows what is waited for; "": only looks whether the user has had enough."""
        if self._check is not None:
            self._check()
        if text and self._watched and time.monotonic() - self._began >= _DELAY:
            self._show(text)

    def clear(self) -> None:
        """Removes the line. The answer begins, or there will be none."""
        if self._width:
            self._show("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def _show(self, text: str) -> None:
        text = text[: terminal_columns(sys.stderr) - 1]
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def __enter__(self) -> PromptStatus:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.clear()
