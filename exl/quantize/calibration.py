"""Calibration text -> token sequences -> the batches that run through the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from exl.batch import I32, PAGE_SIZE, ForwardBatch
from exl.errors import ConfigError
from exl.text.tokenizer import Tokenizer
from exl.user_text import read_lines, read_text


def read_calibration(
    path: str | os.PathLike[str], tokenizer: Tokenizer, num_samples: int, seq_len: int, documents: str
) -> list[I32]:
    """Token ids from the start of the file: at most ``seq_len`` per sequence, about ``num_samples * seq_len`` in all.

    ``documents``: "lines", every line is a document and starts a new sequence; "packed", every line is a document, and
    documents fill sequences one after another; "whole", the file is one document. A document that is longer than a
    sequence continues in the next one. Every document and every sequence begins with the tokenizer's prefix (usually
    BOS), as in inference. Lines are read only until there are enough tokens. Raises ``ConfigError`` if the file cannot
    be read or is too short.
    """
    prefix = tokenizer.encode("")
    if len(prefix) >= seq_len:
        raise ConfigError(f"seq_len: found {seq_len}, expected more than the {len(prefix)} tokens before every text")
    encoded = (tokenizer.encode(text) for text in _read_documents(Path(path), documents == "whole"))
    sequences: list[list[int]] = []
    num_tokens = 0
    for sequence in _cut(encoded, prefix, seq_len, pack=documents == "packed"):
        sequences.append(sequence)
        num_tokens += len(sequence)
        if num_tokens >= num_samples * seq_len:
            break
    if num_tokens < seq_len:
        raise ConfigError(
            f"calibration: {path}: found {num_tokens} tokens, expected at least those of one sequence, {seq_len}; "
            "give more text, or a smaller seq_len"
        )
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


def _cut(documents: Iterable[list[int]], prefix: Sequence[int], seq_len: int, pack: bool) -> Iterator[list[int]]:
    current: list[int] = []
    for document in documents:
        rest = document
        while len(rest) > len(prefix):
            space = seq_len - len(current)
            current += rest[:space]
            rest = [*prefix, *rest[space:]]
            if len(current) == seq_len or not pack:
                yield current
                current = []
    if len(current) > len(prefix):
        yield current


def _read_documents(path: Path, whole: bool) -> Iterator[str]:
    source = f"calibration: {path}"
    for text in [read_text(path, source)] if whole else read_lines(path, source):
        if text.strip():
            yield text.strip()


def make_chunks(sequences: Sequence[I32], max_rows: int) -> list[ForwardBatch]:
    """Batches of whole sequences, in order, at most ``max_rows`` tokens per batch. No sequence may be longer."""
    chunks: list[list[I32]] = []
    num_rows = max_rows
    for sequence in sequences:
        if num_rows + len(sequence) > max_rows:
            chunks.append([])
            num_rows = 0
        chunks[-1].append(sequence)
        num_rows += len(sequence)
    return [_batch(chunk) for chunk in chunks]


def num_pages(batch: ForwardBatch) -> int:
    return 1 + int(batch.page_table.max())


def _batch(sequences: Sequence[I32]) -> ForwardBatch:
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    pages = -(-lengths // PAGE_SIZE)
    first_page = np.cumsum(pages) - pages
    positions = [np.arange(length, dtype=np.int32) for length in lengths]
    slots = [page * PAGE_SIZE + where for page, where in zip(first_page, positions, strict=True)]
    table = np.zeros((len(lengths), int(pages.max())), dtype=np.int32)
    for row, page, count in zip(table, first_page, pages, strict=True):
        row[:count] = np.arange(page, page + count)
    return ForwardBatch(
        token_ids=np.concatenate(sequences),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots).astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        context_len=lengths,
        rope_len=lengths,
        page_table=table,
        logit_rows=np.zeros(0, dtype=np.int32),
        num_decode_rows=0,
    )
