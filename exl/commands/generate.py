from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from exl.commands.common import load_with_progress, say
from exl.commands.options import Debug, DrawOptions, LoadOptions, Model, shared_options
from exl.user_text import decode_text


@shared_options
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")] = "",
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 256,
    *,
    drawing: DrawOptions,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given more than once.")] = None,
    loading: LoadOptions,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Continue a text.

    exl generate "Once upon a time" --max-tokens 100

    echo "Once upon a time" | exl generate - --temperature 0.8 --seed 1 --json
    """
    text = _read_stdin() if prompt == "-" else prompt
    with load_with_progress(model, loading) as llm:
        stream = llm.stream(text, max_tokens, stop=stop or (), **drawing.asked())
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        done = stream.completion
    if as_json:
        print(json.dumps(_completion_json(text, done), ensure_ascii=False))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    say(
        f"{done.num_prompt_tokens} + {done.num_tokens} tokens, first after {done.prompt_seconds * 1e3:.0f} ms, "
        f"then {done.tokens_per_second:.1f} tokens/s ({done.finish_reason}, seed {done.seed})"
    )


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


def _read_stdin() -> str:
    """The prompt, without the one line end that echo and editors put behind it."""
    return decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
