"""A toy as a model with a cache, which is the list of the ids that were run: stale ones show in its drafts."""

from __future__ import annotations

import torch

from exl.errors import MemoryBudgetError
from tests.unit.engine.toy_decoding import Toy


class ToyCached:
    def __init__(self, toy: Toy, num_pages: int = 100) -> None:
        self.toy, self.num_free = toy, num_pages
        self.num_run: list[int] = []  # tokens of each call

    def begin(self, num_tokens: int) -> list[int]:
        if self.num_free == 0:
            raise MemoryBudgetError("no page left")
        self.num_free -= 1
        self.room = num_tokens
        return []

    def truncate(self, cached: list[int], num_tokens: int) -> None:
        assert num_tokens <= len(cached)
        del cached[num_tokens:]

    def extend(self, cached: list[int], ids) -> torch.Tensor:
        assert len(ids) > 0
        cached += ids
        assert len(cached) <= self.room
        self.num_run.append(len(ids))
        return torch.from_numpy(self.toy.logits(cached))[None]

    def end(self, cached: list[int]) -> None:
        self.num_free += 1

    @staticmethod
    def draw(logits, sequence, drafts) -> int:
        return sequence.request.draw(logits[0].numpy(), sequence.num_generated + len(drafts))
