"""Loss, divergence and agreement, against published figures and against float64 sums over complete logits."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ConfigError
from exl.evaluate import evaluate, read_documents
from tests.command_line import run_exl

DATA = Path(__file__).parents[1] / "data"
ADAPTER = DATA / "adapter"
TEXT = DATA / "tinystories-valid-30k.txt"


def run(*args: str | Path) -> subprocess.CompletedProcess:
    return run_exl("eval", *args)


def test_the_published_loss_of_the_dense_model():
    """Measured by transformers in f32: 9,136 tokens, 1.6438 nats."""
    done = run(DATA / "stories260K", "--text", TEXT, "--kv-cache", "f32", "--json")
    found = json.loads(done.stdout)
    assert found["tokens"] == 9136
    assert abs(found["loss"] - 1.6438) < 1e-4
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_against_another_model():
    """Against the definition's sums in float64, from logits that are not computed in the evaluation's chunks."""
    options = {"kv_cache": "f32"}
    with (
        exl.load(BUNDLED_MODEL, prefill_chunk=100, **options) as llm,
        exl.load(DATA / "stories260K", prefill_chunk=64, **options) as other,
    ):
        documents = read_documents(TEXT, llm.tokenizer, window=200)[:3]
        found = evaluate(llm, documents, other)
        losses, divergences, agreed = [], [], []
        for ids in documents:
            p, q = (torch.log_softmax(m.logits(ids)[:-1].double(), 1).numpy() for m in (other, llm))
            losses.append(-np.take_along_axis(q, np.array(ids[1:])[:, None], 1))
            divergences.append((np.exp(p) * (p - q)).sum(1))
            agreed.append(p.argmax(1) == q.argmax(1))
        itself = evaluate(llm, documents[:1], llm_again(llm))
    assert found.num_tokens == sum(len(ids) - 1 for ids in documents)
    assert found.num_documents == 3
    assert found.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-9)
    assert found.against.kl_mean == pytest.approx(np.concatenate(divergences).mean(), rel=1e-9)
    assert found.against.kl_99th == pytest.approx(np.quantile(np.concatenate(divergences), 0.99), rel=1e-9)
    assert found.against.top1_agreement == np.concatenate(agreed).mean()
    assert itself.against.kl_mean < 1e-9
    assert itself.against.top1_agreement == 1


def llm_again(llm: exl.LLM) -> exl.LLM:
    """The same model with another chunk size."""
    return exl.load(llm.folder, prefill_chunk=37, kv_cache="f32")


def test_documents(tmp_path):
    with exl.load() as llm:
        tokenizer = llm.tokenizer
    path = tmp_path / "text.txt"
    path.write_text("  Once upon a time there was a little dog.  \n\nHi\n" + "He ran and ran. " * 40)
    lines = read_documents(path, tokenizer, window=50)
    assert lines == [
        tokenizer.encode("Once upon a time there was a little dog."),
        tokenizer.encode(("He ran and ran. " * 40).strip())[:50],
    ]
    windows = read_documents(path, tokenizer, "whole", window=50)
    bos = tokenizer.encode("")
    assert all(ids[: len(bos)] == bos and len(ids) <= 50 for ids in windows)
    joined = [i for ids in windows for i in ids[len(bos) :]]
    whole = tokenizer.encode(path.read_text().strip())[len(bos) :]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 8  # the rest is shorter than a window may be


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--text", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--text", DATA / "stories260K" / "model.safetensors"], ["not UTF-8"]),
        (["--text", TEXT, "--documents", "chapters"], ["documents", "chapters"]),
        (["--text", TEXT, "--window", "3"], ["window", "3"]),
        (["--text", TEXT, "--ram", "banana"], ["ram", "banana"]),
        (["--text", TEXT, "--against", "nobody/nothing-here"], ["nobody/nothing-here"]),
    ],
)
def test_bad_input_is_one_line(args, words):
    done = run(BUNDLED_MODEL, *args)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_vocabularies_must_agree(tmp_path):
    class Other:
        class config:
            vocab_size = 7

    with exl.load() as llm, pytest.raises(ConfigError, match="found a vocabulary of 7 tokens, expected 512"):
        evaluate(llm, [[1, 2, 3]], Other())


def test_tokens_must_agree(tmp_path):
    """Vocabularies of one size, in which two tokens have changed places: they may, where the text has neither."""
    shutil.copytree(DATA / "stories260K", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    tokens = {token_id: token for token, token_id in vocab.items()}
    vocab[tokens[410]], vocab[tokens[411]] = 411, 410
    path.write_text(json.dumps(values))
    with exl.load(DATA / "stories260K") as llm, exl.load(tmp_path / "other") as other:
        assert evaluate(llm, [[1, 403, 407]], other).against.kl_mean < 1e-9
        with pytest.raises(ConfigError, match=f"token 410 is '{tokens[411]}', expected '{tokens[410]}'"):
            evaluate(llm, [[1, 403, 407], [1, 410]], other)


def test_a_model_says_what_decides_its_predictions():
    """Else a recording would be taken for that of the same model: a head that is rounded on loading, and whether an
    adapter answers those that ask for none."""
    options = ({}, {"head": 8}, {"head": 4}, {"lora": ADAPTER}, {"lora": [ADAPTER]})
    found = []
    for some in options:
        with exl.load(DATA / "stories260K", **some) as llm:
            found.append(json.dumps(llm.identity(), sort_keys=True))
    assert len(set(found)) == len(options)


def test_a_text_without_a_document(tmp_path):
    (tmp_path / "empty.txt").write_text("Hi\n\n")
    with exl.load() as llm, pytest.raises(ConfigError, match="no document of 8 tokens"):
        read_documents(tmp_path / "empty.txt", llm.tokenizer)
