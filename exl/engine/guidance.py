"""Classifier-free guidance: a text is drawn from what its prompt adds to the model's distribution after another prompt
(Sanchez et al., "Stay on topic with Classifier-Free Guidance", 2023, arXiv 2306.17806).

A second sequence, the unconditional branch, has the negative prompt and then the same generated tokens. With logits c
of the text and n of that branch, the text is drawn from the logits n + s (c - n), s being ``guidance_scale``: before
anything else is done to them, so that masks, penalties, samplers and log-probabilities are those of this distribution.

transformers' ``UnbatchedClassifierFreeGuidanceLogitsProcessor`` takes the logarithms of softmax for c and n. Those are
the logits less a constant each, so its result is this one less a constant: the same distribution. Logits are kept here
because the repetition penalty is defined on them: it depends on their sign, and would count otherwise for s = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exl.batch import PAGE_SIZE
from exl.engine.group import Group, check_fits
from exl.engine.request import TokenRequest
from exl.engine.sequence import Sequence as Tokens
from exl.engine.ticket import Answer


@dataclass(frozen=True)
class GuidedRow:
    """A row of logits [R, V] that is to be replaced by what guidance makes of it."""

    row: int  # of the text
    negative: int  # of its unconditional branch
    scale: float


def guide(logits: torch.Tensor, rows: Sequence[GuidedRow]) -> None:
    """Replaces rows of f32 [R, V]: n + s (c - n), rounded after each operation. No row depends on another but its own
    pair's, so its bits are the same in any company."""
    for one in rows:
        text, negative = logits[one.row], logits[one.negative]
        text.sub_(negative).mul_(one.scale).add_(negative)


def negative_ids(request: TokenRequest) -> list[int]:
    """The negative prompt; by default the last token of the prompt, as in transformers."""
    ids = request.prompt_ids[-1:] if request.negative_ids is None else request.negative_ids
    return [int(token_id) for token_id in ids]


def check_guidance(request: TokenRequest, context: int, num_pages: int, max_sequences: int) -> None:
    """Raises ``ConfigError`` or ``MemoryBudgetError`` for a request whose two branches never have room together."""
    lengths = len(request.prompt_ids), len(negative_ids(request))
    max_new = min(request.params.max_tokens, context - max(lengths))

    def pages_for(count: int) -> int:
        return sum(-(-(length + count) // PAGE_SIZE) for length in lengths)

    check_fits("guidance_scale", 2, max_sequences, num_pages, max_new, pages_for)


class Guided(Group):
    """A text, which leads, and its unconditional branch, whose answer nobody gets."""

    def __init__(self, text: Tokens) -> None:
        request, ids = text.ticket.request, negative_ids(text.ticket.request)
        self.scale = request.guidance_scale
        self.negative = Tokens(
            ticket=text.ticket,
            answer=Answer(text.answer.choice, text.answer.seed),
            ids=ids,
            num_prompt=len(ids),
            max_new=text.max_new,
            draws=text.draws,
            sink=None,
            matcher=None,
            arrival=(*text.arrival, 1),
        )
        super().__init__([text, self.negative])

    def follow(self) -> None:
        """After the text has a token more, or some were taken back: the branch has the same generated tokens."""
        text, negative = self.members
        if text.num_read < negative.num_read:
            del negative.ids[negative.num_prompt + text.num_read :]
        else:
            negative.ids += text.ids[text.num_prompt + negative.num_read :]
