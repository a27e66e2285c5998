"""What the engine is asked for, in token ids, and how a sequence ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from exl.request_options import PromptProgress
from exl.sampling_params import SamplingParams

if TYPE_CHECKING:
    from exl.engine.constraints import Matcher
    from exl.text.sink import Verdict

Reuse = bool | Literal["exact"]
MAX_UNREAD = 512  # tokens that an iterating reader may be behind, before its request waits for them to be taken


class Sink(Protocol):
    """What becomes of one sequence's tokens: a text, if it is ``exl.text.sink.TextSink``. Runs in whichever thread
    drives the engine."""

    def push(self, token_id: int) -> Verdict:
        """The text that this token makes final; whether a stop string is complete; tokens to be taken back."""

    @property
    def num_final_tokens(self) -> int:
        """Of the tokens so far, the first ones that nothing can take back any more."""

    def finish(self) -> str:
        """The rest of the text."""


@dataclass(frozen=True)
class Outcome:
    """Why a sequence ended."""

    finish_reason: str  # "stop", "length" or "cancelled": by its caller, or at its deadline
    stop_reason: int | str | None = None  # of "stop": the token's id, the string, or "grammar"
    limit: str | None = None  # of "length": "max_tokens" or "context"; of "cancelled": "deadline", or None


@dataclass(frozen=True, eq=False)
class TokenRequest:
    """One request: a prompt and what is wanted of it.

    ``params.seed`` None draws from the system's entropy. ``num_choices`` answers share the prompt; choice i draws with
    ``child_seed(seed, i)``.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    reuse_prefix: Reuse = "exact"
    top_logprobs: int | None = None
    prompt_progress: Callable[[PromptProgress], None] | None = None
    num_choices: int = 1
    wants_all: bool = False  # no token is drawn: the logits after each token of the prompt are wanted
    speculate: str | None = None  # a drafter's name, see ``exl.engine.drafts``
    draft_tokens: int | None = None  # drafts in each step; None: as many as pay
    num_beams: int = 1  # more: the best texts that a beam search finds, see ``exl.engine.beams``
    length_penalty: float = 1.0  # of these two, as transformers has them
    early_stopping: bool | Literal["never"] = False
    guidance_scale: float = 1.0  # other than 1: drawn from n + scale (c - n), see ``exl.engine.guidance``
    negative_ids: Sequence[int] | None = None  # the prompt of n; None: the last token of the prompt
    dry_breakers: frozenset[int] = frozenset()  # tokens that contain one of ``params.dry_breakers``
    make_sink: Callable[[], Sink] | None = None  # None: token ids alone are wanted
    make_matcher: Callable[[], Matcher] | None = None
    deadline: float | None = None  # seconds after which it ends with what it has
    max_unread: int = MAX_UNREAD
    shift_keep: int | None = None  # the text goes on beyond the context, and keeps so many first tokens; None: it ends
    prompt_logprobs: int | None = None  # of each token of the prompt but the first, and of so many likeliest ones
    lora: str | None = None  # the name of an adapter; None: none
    # No token is drawn: of these, which follow the prompt's last rows, one each, the log-probability is wanted, and
    # the likeliest token at its place. The last one is no part of the prompt; the others are its last tokens.
    scored_ids: Sequence[int] | None = None
    pooling: str | None = None  # "mean" or "last": no token is drawn, a state of the prompt is wanted, of one choice

    @property
    def draws_nothing(self) -> bool:
        return self.wants_all or self.pooling is not None or self.scored_ids is not None
