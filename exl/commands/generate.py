from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import is_terminal, load_with_progress, say
from exl.commands.options import Debug, DrawOptions, LoadOptions, Lora, ModelName, ModelOption, Stop, shared_options
from exl.commands.prompt_status import PromptStatus
from exl.commands.standard_streams import print_json, read_argument, read_input, write
from exl.commands.word_wrap import WordWrap, columns, dimmed
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
    stop: Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    lora: Lora = None,
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
    with load_with_progress(model, loading, lora=lora) as llm, PromptStatus() as status:
        stream = llm.stream(text, max_tokens, stop=stops, prompt_progress=status.update, **drawing.asked())
        with closing(stream):
            show = None if as_json else _Continuation(text)
            try:
                for piece in stream:
                    status.clear()
                    if show is not None:
                        show.write(piece)
            except KeyboardInterrupt:
                if is_terminal(sys.stdout):
                    write("\n")  # the shell's prompt begins on a line of its own
                raise
            done = stream.completion
            if show is not None:
                show.end()
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


class _Continuation:
    """Text on standard output. A terminal gets it word-wrapped, after the prompt, which is dimmed; a pipe as it is."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._wrap = WordWrap(write, columns) if is_terminal(sys.stdout) else None

    def write(self, piece: str) -> None:
        if self._wrap is None:
            write(piece)
            return
        # Not before the first piece: while a long prompt is computed, the line belongs to its progress.
        if self._prompt:
            with dimmed():
                self._wrap.write(self._prompt)
            self._prompt = ""
        self._wrap.write(piece)

    def end(self) -> None:
        self.write("")
        write("\n")


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
