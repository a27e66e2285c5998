"""Vectors for texts: a model's own states, pooled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from exl.checkpoint.header import shown
from exl.engine.generator import Generator
from exl.engine.handle import Handle
from exl.engine.request import TokenRequest
from exl.engine.ticket import Answer
from exl.errors import ConfigError, ExlError
from exl.sampling_params import SamplingParams

POOLING = ("mean", "last")
Prompt = str | Sequence[int]


def embed(
    generator: Generator,
    encode: Callable[[Prompt], list[int]],
    texts: Prompt | Sequence[Prompt],
    pooling: str,
    normalize: bool,
    lora: str | None = None,
) -> torch.Tensor:
    """See ``LLM.embed``. ``encode``: a text -> token ids."""
    _check(pooling, normalize)
    with contextlib.ExitStack() as stack:
        handles = [
            stack.enter_context(_submit(generator, ids, pooling, normalize, lora, inline=True))
            for ids in _token_ids(encode, generator.context, texts)
        ]
        return torch.stack([handle.result() for handle in handles])


def submit_embed(
    generator: Generator,
    encode: Callable[[Prompt], list[int]],
    text: Prompt,
    pooling: str,
    normalize: bool,
    lora: str | None = None,
) -> Handle[torch.Tensor]:
    """See ``LLM.submit_embed``."""
    _check(pooling, normalize)
    return _submit(generator, ids_of(encode, generator.context, "text", text), pooling, normalize, lora, inline=False)


def _submit(
    generator: Generator, ids: list[int], pooling: str, normalize: bool, lora: str | None, *, inline: bool
) -> Handle[torch.Tensor]:
    def finish(answers: list[Answer]) -> torch.Tensor:
        found = answers[0].embedding
        if found is None:
            raise ExlError("this text's embedding was cancelled before it was computed")
        if normalize:
            length = np.linalg.norm(found.astype(np.float64))
            found = (found / (length if length > 0.0 else 1.0)).astype(np.float32)
        return torch.from_numpy(found)

    request = TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, pooling=pooling, lora=lora)
    return generator.submit(request, finish, inline=inline)


def _check(pooling: str, normalize: bool) -> None:
    if pooling not in POOLING:
        raise ConfigError(f"pooling: found {pooling!r}, expected 'mean' or 'last'")
    if not isinstance(normalize, bool):
        raise ConfigError(f"normalize: found {normalize!r}, expected True or False")


def _token_ids(
    encode: Callable[[Prompt], list[int]], context: int, texts: Prompt | Sequence[Prompt]
) -> list[list[int]]:
    """Of each text. Raises ``ConfigError`` that names the text."""
    if isinstance(texts, str):
        named: list[tuple[str, Any]] = [("texts", texts)]
    elif not isinstance(texts, Sequence | np.ndarray) or isinstance(texts, bytes):
        raise ConfigError(f"texts: found {shown(texts)}, expected a text, token ids, or a list of these")
    elif not len(texts):
        raise ConfigError("texts: found an empty list, expected at least one text")
    elif isinstance(texts[0], int | np.integer):
        named = [("texts", texts)]
    else:
        named = [(f"texts[{i}]", text) for i, text in enumerate(texts)]
    return [ids_of(encode, context, name, text) for name, text in named]


def ids_of(encode: Callable[[Prompt], list[int]], context: int, name: str, text: Any) -> list[int]:
    """Token ids of a text that can be embedded. Raises ``ConfigError`` that begins with ``name``."""
    is_empty = isinstance(text, Sequence | np.ndarray) and not len(text)  # though it may get a BOS
    try:
        ids = [] if is_empty else encode(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {str(error).removeprefix('prompt: ')}") from None
    if not ids:
        raise ConfigError(f"{name}: found an empty text, expected at least one token")
    if len(ids) > context:
        raise ConfigError(f"{name}: found {len(ids)} tokens, the context holds {context}")
    return ids
