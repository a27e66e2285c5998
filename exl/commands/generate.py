from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import load_with_progress, say
from exl.commands.options import Debug, DrawOptions, LoadOptions, ModelName, ModelOption, shared_options
from exl.commands.standard_streams import print_json, read_argument, read_input
from exl.errors import ConfigError


@shared_options
def generate(
    first: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or Hugging Face repository; default: the model in exl."),
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")
    ] = None,
    model_option: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 256,
    *,
    drawing: DrawOptions,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given more than once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Continue a text.

    exl generate "Once upon a time" --max-tokens 100

    exl generate path/to/model "Once upon a time" --temperature 0.8 --seed 1

    echo "Once upon a time" | exl generate - --json
    """
    model, prompt = model_and_prompt(first, second, model_option)
    text = read_input("the prompt") if prompt == "-" else read_argument(prompt, "PROMPT")
    stops = [read_argument(item, "--stop") for item in stop or ()]
    with load_with_progress(model, loading) as llm:
        stream = llm.stream(text, max_tokens, stop=stops, **drawing.asked())
        with closing(stream):
            done = _take(stream) if as_json else _show(stream, text)
    if as_json:
        print_json(_completion_json(text, done))
        return
    say(
        f"{done.num_prompt_tokens} + {done.num_tokens} tokens, first after {done.prompt_seconds * 1e3:.0f} ms, "
        f"then {done.tokens_per_second:.1f} tokens/s ({done.finish_reason}, seed {done.seed})"
    )


def model_and_prompt(first: str | None, second: str | None, option: str | None) -> tuple[str | None, str]:
    """What ``PROMPT`` or ``MODEL PROMPT``, and ``--model``, say together. Raises ``ConfigError`` if they disagree."""
    if second is not None:
        return ModelName(first, option).name, second
    if first is not None and option is None and _is_model_folder(first):
        raise ConfigError(f"PROMPT: found {first!r}, the folder of a model, expected a text: exl generate MODEL PROMPT")
    return option, first or ""


def _is_model_folder(text: str) -> bool:
    try:
        return (Path(text).expanduser() / "config.json").is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name
        return False


def _show(stream, prompt: str):
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return stream.completion


def _take(stream):
    for _ in stream:
        pass
    return stream.completion


def _completion_json(prompt: str, done) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.num_prompt_tokens,
        "completion_tokens": done.num_tokens,
        "seed": done.seed,
        "prompt_seconds": done.prompt_seconds,
        "decode_seconds": done.decode_seconds,
        "tokens_per_second": done.tokens_per_second,
    }
