"""Speculation: tokens guessed by something cheap, all checked in one pass of the model.

The model draws every token itself, with the request's own draw of that step, at the row of the last token and at the
rows of the drafts behind it. A draft is kept if it is the token that was drawn, and the first token that is not a draft
is kept too. So the text is what it would be without drafts, whoever makes them and however many there are. Rejection
sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023) keeps more of the drafts
that a second model has drawn, and as many of all others, but its text would depend on where drafts begin and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exl.errors import ConfigError


class SequenceView(Protocol):
    """What a drafter sees of a sequence. Hashable: drafters keep what they know of it under the object itself."""

    ids: list[int]  # prompt and generated tokens; grows at its end, and is cut only as ``Drafter.truncate`` is told
    num_prompt: int

    def __hash__(self) -> int: ...


class Drafter(Protocol):
    """Guesses how sequences go on. A wrong guess costs time and nothing else."""

    def propose(self, want: Sequence[tuple[SequenceView, int]]) -> list[tuple[int, ...]]:
        """For each (sequence, most): the tokens that may follow its last one, 0 to ``most`` of them."""

    def commit(self, sequence: SequenceView, num_accepted: int) -> None:
        """The first ``num_accepted`` of the tokens last proposed for the sequence were kept, and one more token was
        drawn after them. Before or after ``sequence.ids`` has them; not called for a step that was dropped."""

    def truncate(self, sequence: SequenceView, num_tokens: int) -> None:
        """The sequence was cut to its first ``num_tokens`` ids, and other tokens may follow there."""

    def release(self, sequence: SequenceView) -> None:
        """The sequence has ended or waits without its pages: what was kept of it goes. It may come again."""


def accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts are kept: those before the first that is not the token drawn in its place.

    ``drawn[j]``: the model's token after ``drafts[:j]``. The tokens of the step are ``drawn[: accepted + 1]``; draws
    behind them were made after tokens that are not there.
    """
    for j, (draft, token_id) in enumerate(zip(drafts, drawn, strict=False)):
        if draft != token_id:
            return j
    return min(len(drafts), len(drawn))


def rejection_acceptance(
    p_target: NDArray[np.floating], draft_id: int, q_draft: NDArray[np.floating] | None = None
) -> float:
    """The probability with which rejection sampling would keep a draft: min(1, p / q) (Leviathan et al., 2023, 2.3).

    ``p_target`` [V]: what the model's next token is drawn from. ``q_draft`` [V]: what the draft was drawn from; None:
    it was not drawn, as with prompt lookup or a greedy draft model, so that q is 1. Raises ``ConfigError`` for a draft
    that cannot have been drawn.
    """
    q = 1.0 if q_draft is None else float(q_draft[draft_id])
    if q <= 0.0:
        raise ConfigError(f"draft: found token id {draft_id} of probability {q}, expected one that can be drawn")
    return min(1.0, float(p_target[draft_id]) / q)
