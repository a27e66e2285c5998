"""Measures how well a model predicts a text: loss, perplexity, and the distance of its predictions from another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from exl.errors import ConfigError
from exl.evaluation.figures import Comparison, Evaluation
from exl.evaluation.passages import Passage, as_passages, read_chunks, read_documents, read_passages
from exl.evaluation.recording import SLICE_VALUES, Recording, record
from exl.llm import LLM

__all__ = [
    "Comparison",
    "Evaluation",
    "Passage",
    "Recording",
    "evaluate",
    "read_chunks",
    "read_documents",
    "read_passages",
    "record_predictions",
]

Documents = Iterable[Sequence[int] | Passage]
Progress = Callable[[int, int], None]


def evaluate(
    llm: LLM, documents: Documents, against: LLM | Recording | None = None, progress: Progress | None = None
) -> Evaluation:
    """Loss over documents of token ids; with ``against``, also the distance from that reference.

    Of a document of plain ids every token after the first is predicted and counts once; a ``Passage`` says which.
    ``against``: a model that is loaded beside this one, or its predictions over the same documents
    (``record_predictions``). Memory: a step's logits of each model, some 100 MB of log-probabilities in f64, and 33
    bytes per predicted token, however long the text. ``progress``: called with the documents that are done, and all.
    Raises ``ConfigError`` if the vocabularies differ in size, or in a token of the documents, or the documents from
    those that were recorded.
    """
    passages = as_passages(documents)
    if against is not None:
        _check_reference(llm, passages, against)
    losses: list[np.ndarray] = []
    reference_losses: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    agreed: list[np.ndarray] = []
    for i, passage in enumerate(passages):
        if progress is not None:
            progress(i, len(passages))
        targets, start = torch.tensor(passage.ids[passage.first :]), 0
        ours = predictions(llm, passage)
        if against is None:
            for rows in ours:
                losses.append(_losses(rows, targets[start : start + len(rows)]))
                start += len(rows)
            continue
        theirs = against.log_probs(i) if isinstance(against, Recording) else predictions(against, passage)
        if isinstance(against, Recording) and passage.num_predicted:
            reference_losses.append(against.losses(i))
        for q, p in _aligned(ours, theirs):
            wanted = targets[start : start + len(q)]
            losses.append(_losses(q, wanted))
            if isinstance(against, LLM):
                reference_losses.append(_losses(p, wanted))
            divergences.append(divergence(p, q))
            agreed.append((q.argmax(1) == p.argmax(1)).numpy())
            start += len(q)
    if not losses:
        raise ConfigError("documents: found no token to predict, expected documents of two tokens or more")
    comparison = None
    loss = np.concatenate(losses)
    if against is not None:
        comparison = Comparison.of(loss, *map(np.concatenate, (reference_losses, divergences, agreed)))
    return Evaluation.of(loss, len(passages), comparison)


def record_predictions(llm: LLM, documents: Documents, path: str | Path, progress: Progress | None = None) -> None:
    """Writes a model's predictions over documents to a file that ``evaluate`` takes as ``against``.

    2 bytes per predicted token and token of the vocabulary; how exact they are, and the format, says
    ``exl/evaluation/recording.py``. An interrupted call goes on where it was when it is made again. Raises as
    ``record`` does.
    """
    passages = as_passages(documents)
    if not any(passage.num_predicted for passage in passages):
        raise ConfigError("documents: found no token to predict, expected documents of two tokens or more")
    model = {"folder": llm.folder.name, **llm.identity()}
    record(path, passages, llm.config.vocab_size, model, lambda passage: predictions(llm, passage), progress)


def _check_reference(llm: LLM, passages: Sequence[Passage], against: LLM | Recording) -> None:
    vocab_size = against.vocab_size if isinstance(against, Recording) else against.config.vocab_size
    if vocab_size != llm.config.vocab_size:
        raise ConfigError(f"against: found a vocabulary of {vocab_size} tokens, expected {llm.config.vocab_size}")
    if not isinstance(against, Recording):
        _check_tokens(llm, passages, against)
        return
    if len(passages) > len(against.passages):
        raise ConfigError(
            f"against: found {len(against.passages)} documents in {against.path}, expected {len(passages)}"
        )
    for i, passage in enumerate(passages):
        if passage != against.passages[i]:
            raise ConfigError(
                f"against: document {i} is not the one of {against.path}: expected the same text, tokenizer and options"
            )


def _check_tokens(llm: LLM, passages: Sequence[Passage], against: LLM) -> None:
    """Ids may mean other tokens, though the vocabularies are as large; only those of the text are looked at, because
    models of one family may differ in tokens that are never in a text."""
    for token_id in sorted({token_id for passage in passages for token_id in passage.ids}):
        token, other = (some.tokenizer.id_to_token(token_id) for some in (llm, against))
        if token != other:
            raise ConfigError(
                f"against: found another tokenizer, in which token {token_id} is {other!r}, expected {token!r}"
            )


def predictions(llm: LLM, passage: Passage) -> Iterator[torch.Tensor]:
    """Log-probabilities of each predicted token of a passage, f64 [rows, V], in slices."""
    first, stop, at = passage.first - 1, len(passage.ids) - 1, 0  # rows of logits that predict, and where the chunk is
    most = max(1, SLICE_VALUES // llm.config.vocab_size)
    if first >= stop:
        return
    for chunk in llm.iter_logits(passage.ids):
        wanted = chunk[max(0, first - at) : max(0, stop - at)]
        for start in range(0, len(wanted), most):
            yield torch.log_softmax(wanted[start : start + most].double(), 1)
        at += len(chunk)


def divergence(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """KL(p || q) of each row in nats, f64 [n], of log-probabilities [n, V]. What p rules out adds nothing."""
    mass = p.exp()
    return torch.where(mass > 0, mass * (p - q), 0.0).sum(1).numpy()


def _losses(log_probs: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    return -log_probs.gather(1, targets[:, None])[:, 0].numpy()


def _aligned(
    ours: Iterator[torch.Tensor], theirs: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of both, which may cut them differently."""
    held = None
    for rows in ours:
        while len(rows):
            held = next(theirs) if held is None or not len(held) else held
            n = min(len(rows), len(held))
            yield rows[:n], held[:n]
            rows, held = rows[n:], held[n:]
    for _ in theirs:  # exhaust it: a model's stream holds what the request holds
        pass
