"""Tokens with the logs of their probabilities, as a model gives them, for the tests of what shows them."""

from __future__ import annotations

from math import log

import exl


def record(text: str, probability: float, token_id: int = 1, alternatives=()) -> exl.TokenLogprob:
    return exl.TokenLogprob(token_id, text.encode(), log(probability), tuple(alternatives))
