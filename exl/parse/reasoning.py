"""How models mark their reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exl.text.tokenizer import Tokenizer

_TAIL = 64  # tokens of a prompt's end in which a tag that is no token of its own is looked for


@dataclass(frozen=True)
class Thinking:
    """Reasoning stands between two tags."""

    open: str
    close: str
    label: str = ""  # that follows the opening tag and is no part of the reasoning

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.open, self.close)

    def begun_by(self, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Whether the prompt ends inside of reasoning: many templates open it, and some close it at once where
        reasoning is switched off.

        Tags that are tokens: the last opening one, unless it is closed or a turn has ended behind it. Others: only if
        the prompt ends with the opening one, since what stands further before may be a user's text.
        """
        ids = tokenizer.added_ids
        if self.open in ids:
            ends = {ids.get(self.close, -1), *tokenizer.eos_ids}
            for token_id in reversed(prompt_ids):
                if token_id == ids[self.open]:
                    return True
                if token_id in ends:
                    return False
            return False
        tail = tokenizer.decode(prompt_ids[-_TAIL:])
        return tail.rstrip().endswith(self.open.rstrip() + self.label.rstrip())
