"""Where codes lie: ``w ~ scale * (code - zero)``, one scale and one zero for a group of inputs of one output.

Scales are rounded to f16 before any code is chosen: what is optimised is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0  # of f16's positive numbers; loaders may divide by a scale
# The search stretches the group's span by these factors. Above 1: codes come to lie better at the cost of their pitch.
_STRETCH, _SHRINK, _STEPS = 1.1, 0.4, 40
_REFITS = 3


def round_to_f16(scale: torch.Tensor) -> torch.Tensor:
    """The nearest f16 above 0, in the tensor's own type."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().to(scale.dtype)


@dataclass(frozen=True)
class Grid:
    """``min_zero`` is 1 for files of the v1 format: it stores zero - 1, and loaders that forget to mask the result of
    adding 1 take a zero of 0 for 2^bits."""

    bits: int
    sym: bool
    min_zero: int = 0

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def span(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest weight of each output, 0 among them: w [n, N] -> two [N]. All zeros span -1 to 1."""
        low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        empty = low == high
        return low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)

    def params(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero, each [N], whose codes reach from ``low`` to ``high``."""
        scale = round_to_f16((high - low) / self.max_code)
        if self.sym:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        return scale, torch.round(-low / scale).clamp_(self.min_zero, self.max_code)

    def codes(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes, whole numbers in the type of ``w``; halves go to the even multiple of the scale."""
        return torch.round(w / scale).add_(zero).clamp_(0, self.max_code)

    def fit_span(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round-to-nearest's grid: the smallest and the largest weight get codes. w [n, N] -> scale, zero [N]."""
        return self.params(*self.span(w))

    def fit(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid of least squared error that a search over spans finds, its scale refitted to its codes.

        A span that is cut off loses a few large weights and serves all others better. w [n, N] -> scale, zero [N].
        """
        low, high = self.span(w)
        scale, zero = self.params(low, high)
        least = torch.full_like(scale, torch.inf)

        def consider(new_scale: torch.Tensor, new_zero: torch.Tensor) -> None:
            error = self.codes(w, new_scale, new_zero).sub_(new_zero).mul_(new_scale).sub_(w).square_().sum(0)
            better = error < least
            for old, new in ((least, error), (scale, new_scale), (zero, new_zero)):
                old.copy_(torch.where(better, new, old))

        consider(scale, zero)
        for i in range(_STEPS):
            factor = _STRETCH + (_SHRINK - _STRETCH) * i / (_STEPS - 1)
            consider(*self.params(low * factor, high * factor))
        for _ in range(_REFITS):
            steps = self.codes(w, scale, zero).sub_(zero)  # in units of the scale
            best = (w * steps).sum(0) / steps.square().sum(0).clamp_(min=1)
            consider(round_to_f16(best), zero)
        return scale, zero
