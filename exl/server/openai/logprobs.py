"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exl.text.logprobs import TokenLogprob

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
    """``logprobs`` of a choice of /v1/completions, whose offsets count the characters of all tokens before, those of
    the prompt if it is echoed."""

    def __init__(self) -> None:
        self._offset = 0

    def shown(self, tokens: Sequence[TokenLogprob | None], first_text: str = "") -> dict[str, Any]:
        """Of the next tokens. None stands for the first token of a prompt, whose text is ``first_text``: nothing came
        before it that it could follow."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = first_text if token is None else token.text
            found["tokens"].append(text)
            found["token_logprobs"].append(None if token is None else shown_logprob(token.logprob))
            found["top_logprobs"].append(None if token is None else _ranked(token))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found


def _ranked(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by their text, and the token itself. Of several with one text (parts of characters, which
    all read U+FFFD), the likeliest."""
    found: dict[str, float] = {}
    for other in (*token.alternatives, token):
        found.setdefault(other.text, shown_logprob(other.logprob))
    return found
