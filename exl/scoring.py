"""How likely given continuations are after their contexts, for ``LLM.score``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exl.engine.generator import Generator
from exl.engine.handle import Handle
from exl.engine.request import TokenRequest
from exl.engine.ticket import Answer
from exl.errors import ConfigError, ExlError
from exl.sampling_params import SamplingParams


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    logprobs: tuple[float, ...]  # of each of its tokens, given all before it: natural logarithms, at temperature 1
    is_greedy: bool  # whether each of its tokens is the likeliest at its place, of equal ones that with the lowest id
    num_reused_tokens: int  # of the context, taken from the cache instead of computed

    @property
    def total(self) -> float:
        """The continuation's log-probability."""
        return math.fsum(self.logprobs)


def submit_score(
    generator: Generator,
    context: Sequence[int],
    continuation: Sequence[int],
    lora: str | None = None,
    *,
    inline: bool,
) -> Handle[Score]:
    """See ``LLM.submit_score``. ``lora``: the name of an adapter; None: none."""
    for name, ids in (("context", context), ("continuation", continuation)):
        if not ids:
            raise ConfigError(f"{name}: found no tokens, expected at least one")

    def finish(answers: list[Answer]) -> Score:
        ranked = answers[0].prompt_ranked
        if ranked is None or len(ranked) < len(continuation):
            raise ExlError("this continuation's score was cancelled before it was computed")
        return Score(
            logprobs=tuple(own[1] for own, _ in ranked),
            is_greedy=all(own[0] == best[0] for own, best in ranked),
            num_reused_tokens=answers[0].num_reused,
        )

    # The last token is only predicted: its own row tells nothing that is wanted.
    ids = [*context, *continuation][:-1]
    request = TokenRequest(ids, SamplingParams(max_tokens=0), scored_ids=list(continuation), lora=lora)
    return generator.submit(request, finish, inline=inline)
