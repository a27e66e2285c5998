from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from exl.commands.common import (
    Context,
    Debug,
    Device,
    KVCacheType,
    Model,
    Ram,
    Revision,
    Token,
    Vram,
    load_options,
    load_with_progress,
    say,
)
from exl.errors import ConfigError


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")] = "",
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own, else greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most likely tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens p times as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens seen are less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text, on the same machine.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given more than once.")] = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    revision: Revision = None,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Continue a text.

    exl generate "Once upon a time" --max-tokens 100

    echo "Once upon a time" | exl generate - --temperature 0.8 --seed 1 --json
    """
    text = _read_stdin() if prompt == "-" else prompt
    options = load_options(device, vram, ram, context, kv_cache)
    with load_with_progress(model, revision=revision, token=token, **options) as llm:
        stream = llm.stream(
            text,
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
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
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8: {error}") from None
