"""Sequences that run in the same steps or not at all: the two branches of a guided text, the beams of a search.

They get in together, draw together, are paused together and end together. All of a member's prompt but its last token
is computed in chunks; that token is the row of the members' first common step, so that each has its first logits then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from exl.batch import PAGE_SIZE
from exl.errors import ConfigError, MemoryBudgetError

if TYPE_CHECKING:
    from exl.engine.sequence import Sequence as Tokens


class Group:
    """``members``, by arrival. The first one leads: its draw stands for the group's, and its end ends all."""

    shares_prompt = False  # the leader computes the prompt for all of them

    def __init__(self, members: list[Tokens]) -> None:
        self.members = members
        for member in members:
            member.group = self

    def waits_for(self, sequence: Tokens) -> bool:
        """Whether others wait for its prompt."""
        return sequence is self.leader and any(member.awaits_prompt for member in self.members)

    @property
    def leader(self) -> Tokens:
        return self.members[0]


def members_of(sequence: Tokens) -> Sequence[Tokens]:
    """Those that run with it, itself included."""
    return (sequence,) if sequence.group is None else sequence.group.members


def leads(sequence: Tokens) -> bool:
    return sequence.group is None or sequence.group.leader is sequence


def check_fits(
    option: str,
    num_members: int,
    max_sequences: int,
    num_pages: int,
    max_new: int,
    pages_for: Callable[[int], int],
) -> None:
    """Raises ``ConfigError`` if ``option`` asks for more members than run at once, ``MemoryBudgetError`` if an empty
    cache of ``num_pages`` is too small for them: they need ``pages_for(n)`` pages with n new tokens each, up to
    ``max_new``."""
    if num_members > max_sequences:
        raise ConfigError(
            f"{option}: runs {num_members} sequences together, the model was loaded with "
            f"max_sequences={max_sequences}: expected {num_members} or more"
        )
    needed = pages_for(max_new)
    if needed <= num_pages:
        return
    fits = max((count for count in range(max_new) if pages_for(count) <= num_pages), default=0)
    smaller = f"ask for max_tokens={fits} or fewer, or " if fits else ""
    raise MemoryBudgetError(
        f"{option}: {num_members} sequences need {needed} pages of {PAGE_SIZE} tokens for {max_new} new tokens each, "
        f"the cache has {num_pages}: {smaller}load the model with cache_tokens={needed * PAGE_SIZE} or more"
    )
