"""Measures how well a model predicts a text: loss, perplexity, and the distance of its predictions from another's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from exl.errors import ConfigError
from exl.llm import LLM
from exl.text.tokenizer import Tokenizer
from exl.user_text import read_text

MIN_TOKENS = 8  # shorter documents are skipped
WINDOW = 512


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, over the same positions. KL(reference || model) is in nats."""

    reference_loss: float
    kl_mean: float
    kl_99th: float  # 99th percentile over positions
    top1_agreement: float  # share of positions at which both rank the same token first


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, over all tokens except the first of each document."""

    loss: float
    num_tokens: int
    num_documents: int
    against: Comparison | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def read_documents(
    path: str | Path, tokenizer: Tokenizer, documents: str = "lines", window: int = WINDOW
) -> list[list[int]]:
    """Token ids of a UTF-8 text, each document with the tokenizer's BOS and at most ``window`` tokens.

    ``documents``: "lines", each line is a document, stripped of white space and truncated to ``window`` tokens;
    "whole", the file is cut into consecutive windows, each with its own BOS. Documents of fewer than 8 tokens are
    skipped. Raises ``ConfigError``.
    """
    if documents not in ("lines", "whole"):
        raise ConfigError(f"documents: found {documents!r}, expected 'lines' or 'whole'")
    if window < MIN_TOKENS:
        raise ConfigError(f"window: found {window}, expected {MIN_TOKENS} tokens or more")
    text = read_text(path, f"text: {path}")
    if documents == "lines":
        found = [tokenizer.encode(line.strip())[:window] for line in text.split("\n")]
    else:
        prefix = tokenizer.encode("")
        ids = tokenizer.encode(text.strip())[len(prefix) :]
        step = window - len(prefix)
        found = [[*prefix, *ids[start : start + step]] for start in range(0, len(ids), step)]
    found = [ids for ids in found if len(ids) >= MIN_TOKENS]
    if not found:
        raise ConfigError(f"text: {path}: found no document of {MIN_TOKENS} tokens or more")
    return found


def evaluate(llm: LLM, documents: Iterable[Sequence[int]], against: LLM | None = None) -> Evaluation:
    """Loss over documents of token ids; with ``against``, also the distance from that reference model.

    Every token after a document's first counts once. Logits are processed in chunks: at most one per model is in use at
    a time. Raises ``ConfigError`` if the models' vocabularies differ in size.
    """
    if against is not None and against.config.vocab_size != llm.config.vocab_size:
        raise ConfigError(
            f"against: found a vocabulary of {against.config.vocab_size} tokens, expected {llm.config.vocab_size}"
        )
    loss = reference_loss = 0.0
    num_tokens = num_documents = num_agreed = 0
    divergences: list[np.ndarray] = []
    for ids in documents:
        num_documents += 1
        num_tokens += len(ids) - 1
        targets = torch.tensor(ids[1:])
        for start, ours, theirs in _aligned(llm, against, ids):
            wanted = targets[start : start + len(ours), None]
            loss -= float(ours.gather(1, wanted).sum())
            if theirs is not None:
                reference_loss -= float(theirs.gather(1, wanted).sum())
                divergences.append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).numpy())
                num_agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
    if not num_tokens:
        raise ConfigError("documents: found no token to predict, expected documents of two tokens or more")
    comparison = None
    if against is not None:
        divergence = np.concatenate(divergences)
        comparison = Comparison(
            reference_loss / num_tokens,
            float(divergence.mean()),
            float(np.quantile(divergence, 0.99)),
            num_agreed / num_tokens,
        )
    return Evaluation(loss / num_tokens, num_tokens, num_documents, comparison)


def _aligned(
    llm: LLM, against: LLM | None, ids: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Yields the first position, log-probabilities f64 [n, V] and the reference's, for the same positions. Leaves out
    the last position, which has no known next token. The two models may cut their chunks differently."""
    last = len(ids) - 1
    if against is None:
        for start, chunk in _log_probs(llm, ids):
            if start < last:
                yield start, chunk[: last - start], None
        return
    theirs = _log_probs(against, ids)
    at, held = 0, torch.empty(0, 0)
    for start, ours in _log_probs(llm, ids):
        done = 0
        while done < len(ours):
            if not len(held):
                at, held = next(theirs)
            n = min(len(ours) - done, len(held), last - at)
            if n <= 0:
                break
            yield start + done, ours[done : done + n], held[:n]
            done, at, held = done + n, at + n, held[n:]
    for _ in theirs:  # exhaust it: it holds the model's lock
        pass


def _log_probs(llm: LLM, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    start = 0
    for chunk in llm.iter_logits(ids):
        yield start, F.log_softmax(chunk.double(), dim=-1)
        start += len(chunk)
