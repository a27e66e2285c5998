"""Builds batches as a scheduler does."""

from __future__ import annotations

import numpy as np
import torch

from exl.batch import PAGE_SIZE, ForwardBatch


def batch_of(sequences, *, decode: bool = False, padding: int = 0) -> ForwardBatch:
    """``sequences``: (new ids, number of cached tokens, pages) each. Logits are those after each last token."""
    ids, positions, slots, starts, lengths, tables = [], [], [], [0], [], []
    for new_ids, num_cached, pages in sequences:
        where = np.arange(num_cached, num_cached + len(new_ids))
        ids += new_ids
        positions += where.tolist()
        slots += (np.asarray(pages)[where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE).tolist()
        starts.append(len(ids))
        lengths.append(num_cached + len(new_ids))
        tables.append(pages)
    width = max(map(len, tables))
    array = lambda values: np.asarray(values, dtype=np.int32)  # noqa: E731
    return ForwardBatch(
        token_ids=array(ids + [0] * padding),
        positions=array(positions + [0] * padding),
        slots=array(slots + [-1] * padding),
        query_start=array(starts),
        context_len=array(lengths),
        rope_len=array(lengths),
        page_table=array([pages + [0] * (width - len(pages)) for pages in tables]),
        logit_rows=array(starts[1:]) - 1,
        num_decode_rows=len(ids) if decode else 0,
    )


def run(runner, batch: ForwardBatch) -> torch.Tensor:
    (logits,) = runner.forward([batch])
    return logits.to("cpu", copy=True)


def run_window(runner, batches: list[ForwardBatch]) -> list[torch.Tensor]:
    """Each batch's logits, of batches that go through the layers side by side."""
    return [logits.to("cpu", copy=True) for logits in runner.forward(batches)]
