"""The figures of an evaluation, from one value per predicted token. Errors are standard errors of means over tokens,
as llama.cpp's ``llama-perplexity`` prints them. They take tokens as independent; neighbours are not quite, so that
another text may differ by more."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, over the same tokens.

    p and q are what reference and model give each token of the vocabulary at a position. Losses and divergences are in
    nats. Percentiles are over positions, interpolated linearly between neighbours in order of size: the q-quantile of
    n values is at place q (n - 1), counted from 0 (numpy's default, and llama.cpp's).
    """

    reference_loss: float  # mean of -ln p(token)
    loss_difference: float  # loss - reference_loss
    loss_difference_error: float  # of the mean of the differences token by token: most of both losses' errors cancels
    kl_mean: float  # KL(p || q) = sum p (ln p - ln q) over the vocabulary
    kl_error: float
    kl_median: float
    kl_99th: float
    kl_99_9th: float
    kl_max: float
    top1_agreement: float  # share of positions at which both rank the same token first
    top1_error: float
    delta_p_mean: float  # q(token) - p(token) of the text's own token: below 0 if the model is less sure of the text
    delta_p_error: float
    delta_p_rms: float  # root of the mean square of that

    @classmethod
    def of(cls, losses: Values, reference_losses: Values, divergences: Values, agreed: NDArray[np.bool_]) -> Comparison:
        """One value per predicted token, in the same order: [n] each, n >= 1."""
        delta_p = np.exp(-losses) - np.exp(-reference_losses)
        median, high, highest = np.quantile(divergences, (0.5, 0.99, 0.999))
        return cls(
            reference_loss=float(reference_losses.mean()),
            loss_difference=float((losses - reference_losses).mean()),
            loss_difference_error=standard_error(losses - reference_losses),
            kl_mean=float(divergences.mean()),
            kl_error=standard_error(divergences),
            kl_median=float(median),
            kl_99th=float(high),
            kl_99_9th=float(highest),
            kl_max=float(divergences.max()),
            top1_agreement=float(agreed.mean()),
            top1_error=standard_error(agreed.astype(np.float64)),
            delta_p_mean=float(delta_p.mean()),
            delta_p_error=standard_error(delta_p),
            delta_p_rms=float(np.sqrt(np.square(delta_p).mean())),
        )


@dataclass(frozen=True)
class Evaluation:
    """``loss``: the mean of -ln q(token) over the predicted tokens, in nats per token."""

    loss: float
    loss_error: float
    num_tokens: int  # that were predicted
    num_documents: int
    against: Comparison | None = None

    @classmethod
    def of(cls, losses: Values, num_documents: int, against: Comparison | None) -> Evaluation:
        """``losses``: of each predicted token, [n], n >= 1."""
        return cls(float(losses.mean()), standard_error(losses), len(losses), num_documents, against)

    @property
    def perplexity(self) -> float:
        """e ** loss."""
        return math.exp(self.loss)

    @property
    def perplexity_error(self) -> float:
        """Of the perplexity, to first order."""
        return self.perplexity * self.loss_error


def standard_error(values: Values) -> float:
    """Of the mean of n values: sqrt(mean squared distance from the mean / (n - 1)); NaN for one value alone."""
    if len(values) < 2:
        return math.nan
    return math.sqrt(float(values.var()) / (len(values) - 1))
