"""Quantization grids: ``w ~ scale * (code - zero)``, with one scale and one zero per group of inputs and output.

Scales are rounded to f16 before codes are chosen, so that the stored scales are the ones that were optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0  # f16's smallest and largest above 0; loaders may divide by a scale
# The search multiplies the group's span by _STEPS factors from _STRETCH down to _SHRINK. A factor above 1 makes the
# grid coarser, but its points may fit the weights better.
_STRETCH, _SHRINK, _STEPS = 1.1, 0.4, 40
FACTORS = (1.0, *(_STRETCH + (_SHRINK - _STRETCH) * i / (_STEPS - 1) for i in range(_STEPS)))
REFITS = 3
_SUMS = 8


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[n, N] -> [N], in the same order on every machine: row r goes to sum r mod 8, and the 8 are added by halves."""
    x = F.pad(x, (0, 0, 0, -len(x) % _SUMS)).view(-1, _SUMS, x.shape[1])
    total = x[0].clone()
    for rows in x[1:]:
        total += rows
    while len(total) > 1:
        low, high = total.chunk(2)
        total = low + high
    return total[0]


def round_to_f16(scale: torch.Tensor) -> torch.Tensor:
    """The nearest f16 above 0, in the tensor's own type."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().to(scale.dtype)


@dataclass(frozen=True)
class Grid:
    """The codes that ``bits`` allow, and how to fit scale and zero to weights.

    ``sym``: the zero is fixed at 2^(bits - 1). ``min_zero`` is 1 for files in the v1 format: that format stores
    zero - 1, and loaders that do not mask the sum after adding 1 would read a zero of 0 as 2^bits.
    """

    bits: int
    sym: bool
    min_zero: int = 0

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def span(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of each output's weights, extended to include 0: w [n, N] -> low, high [N].

        With ``sym`` it is symmetric around 0. If all weights are 0 it is -1 to 1.
        """
        low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        empty = low == high
        return low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)

    def params(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero, each [N], so that the codes cover ``low`` to ``high``."""
        scale = round_to_f16((high - low) / self.max_code)
        if self.sym:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        return scale, torch.round(-low / scale).clamp_(self.min_zero, self.max_code)

    def codes(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes, whole numbers in the type of ``w``. Ties round to the even multiple of the scale."""
        return torch.round(w / scale).add_(zero).clamp_(0, self.max_code)

    def fit_span(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid of round-to-nearest: it covers the whole span of the weights. w [n, N] -> scale, zero [N]."""
        return self.params(*self.span(w))

    def fit(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches spans for the grid of least squared error, then refits its scale to its codes.

        A narrower span clips a few large weights and represents all others better. w [n, N] -> scale, zero [N].
        """
        low, high = self.span(w)
        scale, zero = self.params(low, high)
        least = torch.full_like(scale, torch.inf)

        def consider(new_scale: torch.Tensor, new_zero: torch.Tensor) -> None:
            error = sum_rows(self.codes(w, new_scale, new_zero).sub_(new_zero).mul_(new_scale).sub_(w).square_())
            better = error < least
            for old, new in ((least, error), (scale, new_scale), (zero, new_zero)):
                old.copy_(torch.where(better, new, old))

        for factor in FACTORS:
            consider(*self.params(low * factor, high * factor))
        for _ in range(REFITS):
            steps = self.codes(w, scale, zero).sub_(zero)  # in units of the scale
            best = sum_rows(w * steps) / sum_rows(steps.square()).clamp_(min=1)
            consider(round_to_f16(best), zero)
        return scale, zero
