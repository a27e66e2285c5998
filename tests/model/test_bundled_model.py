"""Losses by the published method: each line is stripped, encoded with BOS and cut to 512 tokens; lines under 8 tokens
are skipped; every token after the first counts once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import exl
from exl.checkpoint.hub import BUNDLED_MODEL

DATA = Path(__file__).parents[1] / "data"
# Measured with transformers in f32; the second with weights rounded to nearest at 4 bits, asymmetric groups of 32.
DENSE, ROUNDED = 1.6438, 1.7370


def validation_loss(folder: Path) -> tuple[float, int]:
    total, count = 0.0, 0
    with exl.load(folder, kv_cache="f32") as llm:
        for line in (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8").splitlines():
            ids = llm.encode(line.strip())[:512]
            if len(ids) >= 8:
                log_probs = F.log_softmax(llm.logits(ids)[:-1].double(), dim=-1)
                total -= float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
                count += len(ids) - 1
    return total / count, count


@pytest.mark.parametrize(("name", "published"), [("stories260K", DENSE), ("stories2M", 1.7346)])
def test_dense_models_have_the_published_loss(name, published):
    loss, count = validation_loss(DATA / name)
    assert count == 9136
    assert abs(loss - published) < 1e-4


def test_the_bundled_model_gives_back_half_of_what_rounding_loses():
    loss, count = validation_loss(BUNDLED_MODEL)
    assert count == 9136
    assert DENSE < loss <= (DENSE + ROUNDED) / 2
