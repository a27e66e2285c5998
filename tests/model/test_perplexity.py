"""Perplexity as llama.cpp defines it and figures against a reference, from transformers' logits in float64 and plain
formulas; the same through a recording, and from commands."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import exl
from exl.errors import ConfigError
from exl.evaluate import Passage, Recording, evaluate, read_chunks, record_predictions
from exl.evaluation import recording
from tests.command_line import run_exl

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "stories260K"
TEXT = DATA / "tinystories-valid-30k.txt"
EXACT = {"kv_cache": "f32", "context": 256, "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "text.txt"
    path.write_text(TEXT.read_text()[:2500] + "\n")
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """The same model with noise on every matrix."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    shutil.copytree(MODEL, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


class Truth:
    """Log-probabilities in float64, by transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def log_probs(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], 1).numpy()

    def ids(self, path: Path) -> list[int]:
        return self.tokenizer(path.read_text()[:-1])["input_ids"]  # the line end at the end does not count


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(MODEL)


def test_perplexity_in_chunks(text, truth):
    """What ``llama-perplexity -c 96`` prints: chunk by chunk, logits at 48 to 94 score the tokens after them."""
    n_ctx, ids = 96, truth.ids(text)
    nll = []
    for i in range(len(ids) // n_ctx):
        chunk = ids[i * n_ctx : (i + 1) * n_ctx]
        rows = truth.log_probs([truth.tokenizer.bos_token_id, *chunk[1:]])
        nll += [-rows[j][chunk[j + 1]] for j in range(n_ctx // 2, n_ctx - 1)]
    mean = sum(nll) / len(nll)
    variance = sum(x * x for x in nll) / len(nll) - mean**2
    with exl.load(MODEL, **EXACT) as llm:
        found = evaluate(llm, read_chunks(text, llm.tokenizer, n_ctx))
    assert found.num_tokens == len(nll) == 47 * found.num_documents > 200
    assert found.loss == pytest.approx(mean, abs=2e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=2e-5)
    error = math.exp(mean) * math.sqrt(variance / (len(nll) - 1))
    assert found.perplexity_error == pytest.approx(error, rel=1e-4)


def test_strided_perplexity(text, truth):
    """What ``--ppl-stride 40`` prints for a window of 100."""
    n_ctx, stride, ids = 100, 40, truth.ids(text)
    nll = []
    for i in range((len(ids) - n_ctx + stride - 1) // stride):
        start = i * stride
        rows = truth.log_probs(ids[start : start + n_ctx])
        nll += [-rows[j][ids[start + j + 1]] for j in range(n_ctx - stride - 1, n_ctx - 1)]
    with exl.load(MODEL, **EXACT) as llm:
        found = evaluate(llm, read_chunks(text, llm.tokenizer, n_ctx, stride))
    assert found.num_tokens == len(nll) > 400
    assert found.loss == pytest.approx(sum(nll) / len(nll), abs=2e-5)


@pytest.fixture(scope="module")
def both(text, truth, noisy):
    """The two models' log-probabilities of the predicted tokens' positions, and these tokens."""
    with exl.load(MODEL, **EXACT) as llm:
        passages = read_chunks(text, llm.tokenizer, 128)
    other = Truth(noisy)
    p, q, targets = [], [], []
    for passage in passages:
        rows = slice(passage.first - 1, len(passage.ids) - 1)
        p.append(truth.log_probs(list(passage.ids))[rows])
        q.append(other.log_probs(list(passage.ids))[rows])
        targets += passage.ids[passage.first :]
    return passages, np.concatenate(p), np.concatenate(q), np.array(targets)


def check(found, p, q, targets, rel: float) -> None:
    """Two models in f32 instead of f64: divergences of 1e-2 nats differ by 1e-6 or so."""
    kl = (np.exp(p) * (p - q)).sum(1)
    own, reference = (-rows[np.arange(len(rows)), targets] for rows in (q, p))
    other = found.against
    assert found.loss == pytest.approx(own.mean(), abs=2e-5)
    assert other.reference_loss == pytest.approx(reference.mean(), abs=2e-5)
    assert other.loss_difference == pytest.approx((own - reference).mean(), abs=2e-5)
    assert other.loss_difference_error == pytest.approx(np.std(own - reference, ddof=1) / len(kl) ** 0.5, rel=1e-3)
    assert other.kl_mean == pytest.approx(kl.mean(), rel=rel)
    for share, value in ((50, other.kl_median), (99, other.kl_99th), (99.9, other.kl_99_9th), (100, other.kl_max)):
        assert value == pytest.approx(np.percentile(kl, share), rel=rel)
    # The two likeliest tokens may be nearer to each other than the arithmetic is exact.
    assert other.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=2.01 / len(kl))
    delta = np.exp(-own) - np.exp(-reference)
    assert other.delta_p_mean == pytest.approx(delta.mean(), abs=1e-5)
    assert other.delta_p_rms == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-3)


@pytest.mark.parametrize("slice_values", [1 << 21, 512 * 11])
def test_against_a_model_and_a_recording(both, noisy, tmp_path, monkeypatch, slice_values):
    monkeypatch.setattr(recording, "SLICE_VALUES", 512 * 17)  # other slices than the model's
    monkeypatch.setattr("exl.evaluate.SLICE_VALUES", slice_values)
    passages, p, q, targets = both
    path = tmp_path / "reference"
    with exl.load(MODEL, prefill_chunk=50, **EXACT) as reference, exl.load(noisy, **EXACT) as llm:
        check(evaluate(llm, passages, reference), p, q, targets, rel=2e-3)
        record_predictions(reference, passages, path)
        with Recording(path) as recorded:
            assert recorded.model["folder"] == "stories260K"
            found = evaluate(llm, passages, recorded)
            assert evaluate(llm, passages[:1], recorded).num_documents == 1
    check(found, p, q, targets, rel=2e-3)


def test_the_recording_must_be_of_the_same_documents(both, noisy, tmp_path):
    passages, path = both[0], tmp_path / "reference"
    with exl.load(MODEL, **EXACT) as llm:
        record_predictions(llm, passages[:2], path)
        with Recording(path) as recorded:
            with pytest.raises(ConfigError, match=r"found 2 documents in .*reference, expected 3"):
                evaluate(llm, passages[:3], recorded)
            others = [passages[0], Passage(passages[1].ids, passages[1].first - 1)]
            with pytest.raises(ConfigError, match=r"document 1 is not the one of .*reference"):
                evaluate(llm, others, recorded)
        with pytest.raises(ConfigError, match="no token to predict"):
            record_predictions(llm, [[1]], tmp_path / "nothing")
    with exl.load(noisy, **EXACT) as llm, pytest.raises(ConfigError, match="reference: found another file"):
        record_predictions(llm, passages[:2], path)


def test_types_of_the_cache_from_the_command(text, tmp_path):
    """The same folder with another cache: nearer with 8 bits than with 4; equal to itself."""
    args = [MODEL, "--text", text, "--documents", "chunks", "--window", "128", "--json"]
    path = tmp_path / "f32"
    done = run_exl("eval", *args, "--kv-cache", "f32", "--record", path)
    assert done.returncode == 0, done.stderr
    assert "predictions of" in done.stderr
    against = ("--against", MODEL, "--against-option", "kv-cache=f32")
    found = {kind: json.loads(run_exl("eval", *args, "--kv-cache", kind, *against).stdout) for kind in ("q8", "q4")}
    recorded = json.loads(run_exl("eval", *args, "--kv-cache", "q4", "--against", path).stdout)
    assert 0 < found["q8"]["kl_99_9th_percentile"] < found["q4"]["kl_99_9th_percentile"] / 10
    assert found["q4"]["kl_mean"] == pytest.approx(recorded["kl_mean"], rel=1e-3)
    assert found["q4"]["reference_loss"] == recorded["reference_loss"] == pytest.approx(found["q8"]["reference_loss"])
    names = {
        "loss_difference_error",
        "kl_error",
        "kl_median",
        "kl_max",
        "top1_error",
        "delta_p_rms",
        "perplexity_error",
    }
    assert names <= set(found["q4"])
    lines = run_exl("eval", *args[:-1], "--kv-cache", "q4", *against).stdout
    assert f"KL divergence {found['q4']['kl_mean']:.3g} ± " in lines
    assert "99.9th" in lines


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stride", "3"], "stride: found 3 with documents='auto'"),
        (["--limit", "0"], "limit: found 0"),
        (["--against-option", "kv-cache=f32"], "--against-option: found it without --against"),
        (
            ["--against", MODEL, "--against-option", "kv-cash=f32"],
            "found 'kv-cash=f32', expected NAME=VALUE with one of",
        ),
        (["--against", MODEL, "--against-option", "threads=two"], "threads: found 'two', expected an integer"),
        (["--against", MODEL, "--record", "x"], "--record: found it with --against"),
    ],
)
def test_bad_options_are_one_line(text, args, words):
    done = run_exl("eval", MODEL, "--text", text, *args)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
