"""What a scheduler asks of whatever runs its steps, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from exl.batch import ForwardBatch, SamplingBatch
from exl.engine.compose import ChunkRules
from exl.ops.base import Samples


class Device(Protocol):
    """What runs steps: ``exl.engine.runner.Runner``."""

    rules: ChunkRules
    runs_ahead: bool
    max_sequences: int  # that run at once
    step_tokens: int  # prompt rows of a step, at most; one chunk may be more
    vocab_size: int

    def step(
        self,
        decode: ForwardBatch | None,
        chunks: Sequence[ForwardBatch],
        on_layer: Callable[[range, int, int], None] | None = None,
    ) -> torch.Tensor:
        """Logits f32 [R, V] of the decode rows, then of each chunk's logit rows; valid until the next call.
        ``on_layer(which chunks, layers done, layers)`` is called after each layer that chunks went through."""

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> Samples: ...

    def zero_pages(self, pages: Sequence[int]) -> None: ...

    def turn_pages(self, src: Sequence[int], dst: Sequence[int], num_positions: int) -> None:
        """Copies pages, as if their tokens stood so many positions later."""

    def abandon(self) -> None:
        """After a pass that was interrupted."""

    def is_lost(self) -> bool:
        """After an error: whether everything else would fail, too."""


@dataclass
class Stats:
    """Counts since the model was loaded."""

    steps: int = 0
    prompt_tokens: int = 0  # computed, of prompts
    generated_tokens: int = 0
    preemptions: int = 0  # sequences that were paused
    recomputed_tokens: int = 0  # computed again after a pause
    wasted_rows: int = 0  # computed after a stop that was found late
    drafts_tried: int = 0
    drafts_accepted: int = 0
