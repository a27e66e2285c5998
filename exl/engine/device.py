"""What a scheduler asks of whatever runs its steps, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch, SamplingBatch
from exl.engine.compose import ChunkRules
from exl.engine.guidance import GuidedRow
from exl.ops.base import Samples


class Device(Protocol):
    """What runs steps: ``exl.engine.runner.Runner``."""

    rules: ChunkRules
    runs_ahead: bool
    max_sequences: int  # that run at once
    step_tokens: int  # prompt rows of a step, at most; one chunk may be more
    keeps_all_rows: bool  # after a step, ``prompt_logits`` and ``final_states`` know all its chunks, else the last one
    max_logit_rows: int
    vocab_size: int

    def step(
        self,
        decode: ForwardBatch | None,
        chunks: Sequence[ForwardBatch],
        on_layer: Callable[[range, int, int], None] | None = None,
        keep_rows: bool = False,
    ) -> torch.Tensor:
        """Logits f32 [R, V] of the decode rows, then of each chunk's logit rows; valid until the next call.
        ``on_layer(which chunks, layers done, layers)`` is called after each layer that chunks went through.
        ``keep_rows``: ``prompt_logits`` and ``final_states`` are asked for next."""

    def guide(self, logits: torch.Tensor, rows: Sequence[GuidedRow]) -> None:
        """``exl.engine.guidance.guide``, on the step's logits."""

    def prompt_logits(self, chunk: int, rows: range) -> torch.Tensor:
        """Logits f32 [n, V] of rows of a chunk of the last step, no more than ``max_logit_rows``, with the bits that
        the step itself gives. They take the place of that step's logits."""

    def final_states(self, chunk: int, rows: range) -> NDArray[np.float64]:
        """The same rows of the residual stream after the final norm, [n, C] on the host."""

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> Samples: ...

    def zero_pages(self, pages: Sequence[int]) -> None: ...

    def turn_pages(self, src: Sequence[int], dst: Sequence[int], num_positions: int) -> None:
        """Copies pages, as if their tokens stood so many positions later."""

    def abandon(self) -> None:
        """Nothing is wanted of the last pass any more: its rows were asked for, or it was interrupted."""

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
