"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exl.text.logprobs import TokenLogprob
from exl.text.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI's API has where a token cannot come; JSON has no infinity


def shown_logprob(value: float) -> float:
    return max(value, _LEAST)


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a choice of /v1/chat/completions. One entry for each token of the answer, those of reasoning and
    of tool calls too; ``bytes`` hold parts of characters exactly, which ``token`` cannot."""
    return {"content": [chat_logprob(token) for token in tokens], "refusal": None}


def chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_one(token), "top_logprobs": [_one(other) for other in token.alternatives]}


def _one(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": shown_logprob(token.logprob), "bytes": list(token.token_bytes)}


class LegacyLogprobs:
    """``logprobs`` of a choice of /v1/completions, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], echo: bool) -> None:
        """``echo``: the tokens begin with those of the prompt, and offsets count its characters."""
        self._tokenizer, self._first_id = tokenizer, prompt_ids[0] if prompt_ids else None
        self._decoder = tokenizer.text_decoder()
        if not echo:
            self._decoder.skip(prompt_ids)
        self._offset = 0

    def shown(self, tokens: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Of the next tokens. None stands for the first one of the prompt, which follows nothing. An offset counts the
        characters that were whole before the token: special tokens have none, and halves of one count with the last.
        """
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            token_id = self._first_id if token is None else token.token_id
            text = _written(self._tokenizer, token_id) if token is None else token.text
            found["tokens"].append(text)
            found["token_logprobs"].append(None if token is None else shown_logprob(token.logprob))
            found["top_logprobs"].append(None if token is None else _ranked(token))
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token_id)) if token_id is not None else 0
        return found


def _written(tokenizer: Tokenizer, token_id: int | None) -> str:
    if token_id is None or tokenizer.id_to_token(token_id) is None:
        return ""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _ranked(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by their text, and the token itself. Of several with one text (parts of characters, which
    all read U+FFFD), the likeliest."""
    found: dict[str, float] = {}
    for other in (*token.alternatives, token):
        found.setdefault(other.text, shown_logprob(other.logprob))
    return found
