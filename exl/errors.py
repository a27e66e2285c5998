"""Every error that exl raises on purpose. One message: what was found, what was expected, where."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_TORCH_ADVICE = "CUDA kernel errors might be asynchronously"  # three lines of it follow each error of torch's


class ExlError(Exception):
    """Base of all errors that a user of exl can cause or meet."""


class ConfigError(ExlError):
    """An option, argument or configuration file holds a value that makes no sense."""


class CheckpointError(ExlError):
    """A checkpoint's files are damaged, incomplete or hostile."""


class UnsupportedModelError(ExlError):
    """The model is well-formed, but asks for something that exl does not have."""


class MemoryBudgetError(ExlError):
    """What was asked for does not fit in the memory that was given."""


class QueueFullError(ExlError):
    """So many requests wait already that no more are taken (``max_queue=`` of ``exl.load``)."""


class ConstraintError(ExlError):
    """A request's text cannot go on under its constraint: too complex at this place, a token that it forbids, or no
    token left that constraint, banned tokens and banned strings together allow."""


class NotFiniteError(ExlError):
    """The model's own numbers are nan or inf: its weights are damaged, or do not fit the arithmetic."""


class KernelError(ExlError):
    """A kernel could not be compiled, or was called with arguments it must not be given."""


class DeviceLostError(ExlError):
    """The GPU answers no more: whatever is asked of it in this process fails, too."""


class NoGpuError(KernelError):
    """There is no NVIDIA GPU, or none that the driver shows: nothing is broken, and nothing has to be installed."""


def chain_of(error: BaseException) -> list[BaseException]:
    """An error, then what it was raised from or while handling, and so on."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        hidden = following.__suppress_context__ and following.__cause__ is None
        following = None if hidden else following.__cause__ or following.__context__
    return found


def with_causes(error: BaseException) -> str:
    """All of ``chain_of`` in one line: what CUDA says at a capture's end rarely names the call that failed in it."""
    texts: list[str] = []
    for item in chain_of(error):
        text = " ".join(str(item).split(_TORCH_ADVICE)[0].split())
        text = f"{type(item).__name__}: {text}" if text else type(item).__name__
        if not any(text.removeprefix(f"{type(item).__name__}: ") in earlier for earlier in texts):
            texts.append(text)
    return "; caused by ".join(texts)


class ExlWarning(UserWarning):
    """Something was wrong and exl went on with what is most likely meant."""


def warn_user(text: str) -> None:
    """Warns at the line of the program that called exl, however deep inside exl this is."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "exl":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ExlWarning, stacklevel=level)


@contextmanager
def one_line_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, an ``ExlWarning`` is one line for ``say``, without Python's place and line of code: for a command, whose
    user did not write the code."""
    earlier = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ExlWarning):
            say(f"exl: warning: {message}")
        else:
            earlier(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = earlier
