"""Rows of an embedding that is on the disk, on their way to a GPU: read by the host before each pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from exl.batch import ForwardBatch
from exl.kernels.launch import Backend
from exl.ops.base import TableRows
from exl.ops.cuda_batch import Upload


class RowStaging:
    """Copies the rows of a window's tokens to one place on the device, each row once. The kernel reads them as it reads
    a whole table: its ids are the places of the rows."""

    def __init__(self, backend: Backend, rows: torch.Tensor, stack: ExitStack) -> None:
        """``rows``: [rows of a window, C] on the device. ``stack`` gives the buffers of the host back."""
        self._upload = Upload(backend, rows.view(-1), "rows of the embedding", stack)

    def send(self, batches: Sequence[ForwardBatch], table: TableRows) -> list[ForwardBatch]:
        """Queues the copy; the batches with places instead of token ids. Their ids have been checked: they are known to
        the host and of the vocabulary. Raises ``CheckpointError`` if a row cannot be read."""
        ids, places = np.unique(np.concatenate([batch.token_ids for batch in batches]), return_inverse=True)
        num_bytes = len(ids) * table.row_bytes
        table.read(ids, self._upload.buffer()[:num_bytes])
        self._upload.send(num_bytes)
        ends = np.cumsum([batch.num_rows for batch in batches])
        parts = np.split(places.reshape(-1).astype(np.int32), ends[:-1])
        return [replace(batch, token_ids=part) for batch, part in zip(batches, parts, strict=True)]
