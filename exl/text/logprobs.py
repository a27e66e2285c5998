"""Log-probabilities of generated tokens and of the likeliest alternatives to each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exl.errors import ConfigError
from exl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability in the model's own distribution, as in OpenAI's API: at temperature 1, before
    repetition penalty and filters."""

    token_id: int
    token_bytes: bytes  # what it adds inside a text: includes a leading space; may be part of a character
    logprob: float  # natural logarithm
    # For a generated token: the likeliest tokens at its position, descending, ties by lower id. May include the token.
    alternatives: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; U+FFFD replaces incomplete characters."""
        return self.token_bytes.decode("utf-8", "replace")

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)

    def __repr__(self) -> str:
        beside = f", {len(self.alternatives)} alternatives" if self.alternatives else ""
        return f"TokenLogprob({self.token_id}, {self.text!r}, {self.logprob:.3f}{beside})"

    @classmethod
    def of(cls, ranked: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> TokenLogprob:
        """From (id, logprob) pairs: the token first, then each alternative."""

        def bytes_of(token_id: int) -> bytes:
            # A model's matrices may have more rows than the tokenizer has tokens: those ids have no text.
            return b"" if tokenizer.id_to_token(token_id) is None else tokenizer.token_bytes(token_id)

        (token_id, logprob), *others = ranked
        alternatives = tuple(cls(other, bytes_of(other), value) for other, value in others)
        return cls(token_id, bytes_of(token_id), logprob, alternatives)


def check_top_logprobs(count: int | None, vocab_size: int, name: str = "top_logprobs") -> None:
    """Raises ``ConfigError`` unless ``count`` is None or an integer from 0 to ``vocab_size``."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= vocab_size:
        raise ConfigError(f"{name}: found {count!r}, expected None or an integer from 0 to {vocab_size}")
