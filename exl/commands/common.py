"""What commands share: options, loading with a progress bar, one place where lines go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from exl.errors import ConfigError

if TYPE_CHECKING:
    from exl.llm import LLM

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
Vram = Annotated[
    str | None, typer.Option(help="What exl may use of the GPU: 8GB. Layers that do not fit wait in RAM. Default: all.")
]
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


def load_options(
    device: str, vram: str | None, ram: str | None, context: str | int | None, kv_cache: str
) -> dict[str, object]:
    """Keywords of ``exl.load`` and ``EngineOptions``, from what the command line has."""
    context = context if isinstance(context, int) else parse_context(context)
    return {"device": device, "vram": parse_vram(vram), "ram": ram, "context": context, "kv_cache": kv_cache}


def parse_vram(text: str | None) -> list[str] | None:
    """``parse_vram("10GB,24GB") == ["10GB", "24GB"]``."""
    return None if text is None else text.split(",")


def parse_context(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"context: found {text!r}, expected a number of tokens or auto") from None


def say(line: str) -> None:
    print(line, file=sys.stderr)
