"""Figures over tokens, against their definitions written out and numpy's percentiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exl.evaluation.figures import Comparison, Evaluation, standard_error


def held(n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(n)
    losses = rng.gamma(2.0, size=n)
    return losses, losses + rng.normal(0, 0.1, n), rng.gamma(0.3, size=n), rng.random(n) < 0.9


@pytest.mark.parametrize("n", [2, 5, 100, 1001, 4096])
def test_all_figures_of_a_comparison(n):
    losses, reference, divergences, agreed = held(n)
    found = Comparison.of(losses, reference, divergences, agreed)
    assert found.reference_loss == pytest.approx(sum(reference) / n)
    assert found.loss_difference == pytest.approx(sum(losses) / n - sum(reference) / n)
    assert found.kl_mean == pytest.approx(sum(divergences) / n)
    ordered = sorted(divergences)
    for q, value in ((0.5, found.kl_median), (0.99, found.kl_99th), (0.999, found.kl_99_9th), (1.0, found.kl_max)):
        assert value == pytest.approx(np.percentile(divergences, 100 * q, method="linear"))
        place = q * (n - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert value == pytest.approx(low + (place - math.floor(place)) * (high - low))
    assert found.top1_agreement == sum(agreed) / n
    share = sum(agreed) / n
    assert found.top1_error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    p_own, p_reference = [math.exp(-x) for x in losses], [math.exp(-x) for x in reference]
    deltas = [a - b for a, b in zip(p_own, p_reference, strict=True)]
    assert found.delta_p_mean == pytest.approx(sum(deltas) / n)
    assert found.delta_p_rms == pytest.approx(math.sqrt(sum(x * x for x in deltas) / n))
    assert found.delta_p_error == pytest.approx(np.std(deltas, ddof=1) / math.sqrt(n))


def test_the_difference_of_losses_is_paired():
    """Its error is that of both errors less twice the covariance, as llama.cpp has it: far below either loss's own."""
    losses, reference, divergences, agreed = held(4096)
    found = Comparison.of(losses, reference, divergences, agreed)
    n = len(losses)
    covariance = (np.mean(losses * reference) - losses.mean() * reference.mean()) / (n - 1)
    variance = standard_error(losses) ** 2 + standard_error(reference) ** 2 - 2 * covariance
    assert found.loss_difference_error == pytest.approx(math.sqrt(variance))
    assert found.loss_difference_error < 0.2 * standard_error(losses)


def test_errors_of_losses_and_perplexity():
    losses = held(100)[0]
    found = Evaluation.of(losses, 3, None)
    error = np.std(losses, ddof=1) / math.sqrt(100)
    assert found.loss_error == pytest.approx(error)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)))
    assert found.perplexity_error == pytest.approx(math.exp(np.mean(losses)) * error)
    assert (found.num_tokens, found.num_documents) == (100, 3)
    assert math.isnan(Evaluation.of(losses[:1], 1, None).loss_error)
