"""A sequence that runs without the scheduler: by hand for measurements, or in a draft model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.engine.compose import Piece, batch_of


@dataclass(eq=False)
class ManualSequence:
    """Tokens, and pages for their K and V."""

    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)  # as of ``exl.engine.sequence.Sequence``
    ids: list[int] = field(default_factory=list)
    lora: int = -1  # the number of its adapter; none
    sample_idx: int | None = None  # never: its tokens are read before they are run

    @property
    def page_table(self) -> NDArray[np.int32]:
        return np.asarray(self.pages, np.int32)

    @property
    def window_table(self) -> NDArray[np.int32]:
        return np.asarray(self.window_pages, np.int32)

    def row(self) -> Piece:
        """The last token as a decode row."""
        stop = len(self.ids)
        return Piece(self, stop - 1, stop, True, True, stop)

    def chunks(self, start: int, chunk: int, *, as_decode: bool = False) -> list[ForwardBatch]:
        """The tokens from ``start`` on, ``chunk`` at a time, with logits after the last."""
        stop = len(self.ids)
        return [
            batch_of([Piece(self, at, min(stop, at + chunk), as_decode, at + chunk >= stop, stop)])
            for at in range(start, stop, chunk)
        ]
