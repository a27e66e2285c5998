"""What a backend starts: words that launches, prepared programs and the driver's wrappers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Dim = Sequence[int]  # up to three sizes, x first


class Work(Protocol):
    """Something prepared, to be started any number of times by ``Backend.start``: a launch, or a call between two."""

    def start(self, stream: int) -> None:
        """``stream``: a handle of the backend's."""
