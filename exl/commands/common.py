"""What commands share: options, loading with a progress bar, one place where lines go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from exl.errors import ConfigError

if TYPE_CHECKING:
    from exl.llm import LLM

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Ram = Annotated[str | None, typer.Option(help="What exl may use: 6GB, 512MiB. Layers that do not fit are streamed.")]
Context = Annotated[str | None, typer.Option(help="Tokens for prompt and answer together, or auto: as many as fit.")]
KVCacheType = Annotated[str, typer.Option(help="Type of the cache: f32, f16, q8, k8v4 or q4.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or Hugging Face repository; default: the one in exl.")
]
Revision = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
Token = Annotated[str | None, typer.Option(help="For a private or gated repository; by default the one saved by hf.")]


def load_with_progress(model: str | None, **options: object) -> LLM:
    """Loads with a progress bar on standard error, where that is a terminal. torch is imported now."""
    from exl.llm import load

    return load(model, **options)


def parse_context(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"context: found {text!r}, expected a number of tokens or auto") from None


def say(line: str) -> None:
    print(line, file=sys.stderr)
