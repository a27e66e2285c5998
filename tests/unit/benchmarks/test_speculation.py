"""``benchmarks/speculation.py``: what it computes in closed form, against drawing. No timings."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import speculation
from benchmarks.speculation import (
    COUPLINGS,
    Text,
    by_id,
    draw,
    expected_passes,
    gumbel,
    kept_by,
    likeliest_first,
    lookup_passes,
    softmax,
)

RNG = np.random.default_rng(0)
NUM_DRAWS = 4000


def text_of(ids, num_prompt, temperature=0.0, num_ids=5) -> Text:
    shape = (len(ids) - num_prompt, num_ids)
    return Text(list(ids), num_prompt, temperature, 3, RNG.standard_normal(shape), RNG.standard_normal(shape))


def drawn_passes(kept, length: int) -> int:
    """A run: a pass gives the drafts that are kept, and one token more; the last token needs no draft."""
    passes = done = 0
    while done < len(kept):
        drafts = 0
        while drafts < min(length, len(kept) - done - 1) and RNG.random() < kept[done + drafts]:
            drafts += 1
        done += drafts + 1
        passes += 1
    return passes


@pytest.mark.parametrize("length", [1, 2, 7])
def test_expected_passes_are_the_mean_of_runs(length):
    kept = RNG.random(12)
    runs = [drawn_passes(kept, length) for _ in range(NUM_DRAWS)]
    assert expected_passes(kept, length) == pytest.approx(np.mean(runs), abs=5 * np.std(runs) / NUM_DRAWS**0.5)
    assert expected_passes(np.zeros(12), length) == 12
    assert expected_passes(np.ones(12), length) == -(-12 // (length + 1))


def test_how_often_two_models_draw_the_same_token():
    a, b = RNG.standard_normal(6), RNG.standard_normal(6)
    p, q = softmax(a, 1.0), softmax(b, 1.0)
    numbers = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    first, second = (np.array([draw(logits, 1.0, u) for u in numbers]) for logits in (a, b))
    assert likeliest_first(p, q) == pytest.approx(same_by_token(first, second), abs=12 / NUM_DRAWS)
    first, second = (np.searchsorted(np.cumsum(weights), numbers) for weights in (p, q))
    assert by_id(p, q) == pytest.approx(same_by_token(first, second), abs=12 / NUM_DRAWS)
    noise = RNG.gumbel(size=(NUM_DRAWS, 6))
    first, second = ((np.log(weights) + noise).argmax(1) for weights in (p, q))
    assert gumbel(p, q) == pytest.approx(same_by_token(first, second), abs=5 * 0.5 / NUM_DRAWS**0.5)
    assert gumbel(np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])) == pytest.approx([1 / 3, 0, 0])
    for coupling in COUPLINGS.values():
        assert coupling(p, p) == pytest.approx(p)


def same_by_token(first, second) -> list[float]:
    return [float(np.mean((first == i) & (second == i))) for i in range(6)]


def test_rejection_given_the_texts_tokens_adds_up_to_the_overlap_of_the_models():
    """Leviathan et al., 2023: over the target's own draws a draft is kept with probability 1 - TV(p, q)."""
    text = text_of(range(5), 0, temperature=0.7)
    text.target, text.draft = np.tile(text.target[0], (5, 1)), np.tile(text.draft[0], (5, 1))
    p, q = softmax(text.target[0], 0.7), softmax(text.draft[0], 0.7)
    kept = kept_by(COUPLINGS["rejection sampling"])(text)
    assert (p * kept).sum() == pytest.approx(1 - 0.5 * np.abs(p - q).sum())


def test_lookup_is_replayed_as_it_would_run():
    assert lookup_passes(text_of([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 6), 7) == 1  # 3 4 1 drafted, and the last token
    assert lookup_passes(text_of([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 6), 1) == 2
    assert lookup_passes(text_of([1, 2, 3, 4, 0, 1], 2), 7) == 4


def test_the_report_names_what_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speculation", "--prompts", "1", "--tokens", "12"])
    monkeypatch.setattr(speculation, "chat_model_folder", lambda: None)
    monkeypatch.setattr(speculation, "TEMPERATURES", (0.0, 1.0))
    monkeypatch.setattr(speculation, "SUMMARIES", 1)
    speculation.main()
    said = capsys.readouterr().out
    assert said.count("replayed draws that are the text's: 1.0000") == 2
    for name in ("greedy drafts", "coupled drafts", "rejection sampling", "prompt lookup", "told again"):
        assert name in said
