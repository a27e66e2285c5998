"""Which rows a step runs: pure functions of sequences and limits; nothing here changes a sequence.

Company decides *when* a row or a chunk runs, never *how large* the batch is that its bits may depend on. Decode rows
are a batch of their own, of kernels whose rows do not depend on each other. A prompt is cut at multiples of the chunk
from position 0 on. Chunks of several prompts share a batch only where the backend's rows are invariant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE, ForwardBatch
from exl.engine.sequence import Sequence as Tokens


class Piece(NamedTuple):
    """New rows of one sequence: tokens ``start`` to ``stop``. A tuple: one is made for each token."""

    sequence: Tokens
    start: int
    stop: int
    as_decode: bool  # by the kernels of decode rows
    wants_logits: bool  # after the last of them; of decode pieces after each
    rope_len: int
    drafts: tuple[int, ...] = ()  # of a decode piece: guesses at the tokens after ``stop``; logits after each, too
    num_dropped: int = 0  # tokens of the sequence without pages, see ``exl.engine.shift``

    @property
    def num_rows(self) -> int:
        return self.stop - self.start + len(self.drafts)

    @property
    def num_logits(self) -> int:
        return 1 + len(self.drafts) if self.wants_logits else 0


@dataclass(frozen=True)
class ChunkRules:
    """How prompts are cut."""

    chunk: int  # borders at its multiples; the most rows of a batch
    max_decode_prompt: int  # whole prompts up to this length run as decode rows, where those are quicker
    max_decode_rows: int  # of one sequence in a batch of decode rows
    invariant_rows: int  # batches of fewer prompt rows than this have rows that do not depend on each other
    decode_alike: bool = False  # rows of prompts have the bits of decode rows
    by_length: bool = False  # RoPE's angles depend on the length of the text: rows of one batch share it

    @cached_property
    def all_alike(self) -> bool:
        """Whether a row has the same bits in any batch, as a decode row or in a prompt."""
        return self.decode_alike and self.chunks_alike

    @cached_property
    def chunks_alike(self) -> bool:
        """Whether prompt rows have the same bits in chunks of any length."""
        return self.chunk < self.invariant_rows

    def next_piece(self, sequence: Tokens, reuse_counts: bool, start: int | None = None) -> Piece:
        """The next rows of a sequence whose known tokens are not all computed, from ``start`` on (default: the first
        that is not computed). ``reuse_counts``: a short rest after what was reused may run as a short prompt does,
        which the exact modes do not allow."""
        start, total = sequence.num_cached if start is None else start, sequence.prefill_stop
        end_of_prompt = sequence.num_chunked
        merges = self.all_alike and not self.by_length
        if start >= end_of_prompt and not merges:  # generated tokens of a sequence that was paused
            stop = min(total, start + (1 if self.by_length else self.max_decode_rows), sequence.next_shift)
            return self._piece(sequence, start, stop, as_decode=True)
        length = end_of_prompt - start if reuse_counts else end_of_prompt
        as_decode = length <= self.max_decode_prompt
        stop = min(total if merges else end_of_prompt, (start // self.chunk + 1) * self.chunk, sequence.next_shift)
        return self._piece(sequence, start, stop, as_decode=as_decode)

    def _piece(self, sequence: Tokens, start: int, stop: int, *, as_decode: bool) -> Piece:
        # In each chunk of a prompt the length is the whole prompt's, so that the result does not depend on the chunks.
        rope_len = max(stop, sequence.num_prompt) if start < sequence.num_prompt else stop
        wants_logits = stop == len(sequence.ids) and not sequence.prompt_only
        return Piece(sequence, start, stop, as_decode, wants_logits, rope_len, num_dropped=sequence.num_dropped)

    def exact_after(self, piece: Piece) -> int:
        """How many of the sequence's leading tokens have the bits of a cold run once ``piece`` has run."""
        sequence = piece.sequence
        if self.all_alike:
            return piece.stop
        if sequence.num_exact != piece.start or piece.as_decode:
            return sequence.num_exact
        whole = piece.start % self.chunk == 0 and piece.stop % self.chunk == 0
        return piece.stop if whole or self.chunks_alike else sequence.num_exact


def pack_chunks(pieces: Iterable[Piece], rules: ChunkRules, max_sequences: int) -> list[list[Piece]]:
    """Pieces in groups that share a batch."""
    groups: list[list[Piece]] = []
    num_rows = 0
    for piece in pieces:
        num_rows += piece.num_rows
        most = rules.chunk if piece.as_decode else min(rules.chunk, rules.invariant_rows - 1)
        last = groups[-1] if groups else []
        alike = last and last[0].as_decode == piece.as_decode
        apart = alike and last[-1].sequence is not piece.sequence  # its next chunk reads what this one writes
        if apart and num_rows <= most and len(last) < max_sequences:
            last.append(piece)
        else:
            groups.append([piece])
            num_rows = piece.num_rows
    return groups


def decode_piece(sequence: Tokens, drafts: tuple[int, ...] = ()) -> Piece:
    """The row of a sequence's last token, which may not be read yet, and of guesses at those after it."""
    stop = sequence.num_tokens
    return Piece(sequence, stop - 1, stop, True, True, stop, drafts, sequence.num_dropped)


def batch_of(pieces: Sequence[Piece]) -> ForwardBatch:
    """All of one kind."""
    if len(pieces) == len(
        [piece for piece in pieces if piece.as_decode and piece.num_rows == 1 and piece.wants_logits]
    ):
        return _last_rows(pieces)
    as_decode = pieces[0].as_decode
    ids: list[int] = []
    starts = [0]
    logit_rows: list[int] = []
    width = max(len(piece.sequence.pages) for piece in pieces)
    table = np.zeros((len(pieces), width), np.int32)
    positions, slots = [], []
    for i, piece in enumerate(pieces):
        sequence, start, stop = piece.sequence, piece.start, piece.start + piece.num_rows
        pages = sequence.page_table
        table[i, : len(pages)] = pages
        ids += sequence.ids[start : piece.stop]
        if piece.stop > len(sequence.ids):  # the token is still on the device
            ids.append(-1 - sequence.sample_idx)
        ids += piece.drafts
        where = np.arange(start, stop, dtype=np.int32)
        positions.append(where)
        where = where - np.int32(piece.num_dropped)
        slots.append(pages[where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE)
        starts.append(starts[-1] + stop - start)
        logit_rows += range(starts[-1] - piece.num_logits, starts[-1])
    return ForwardBatch(
        token_ids=np.array(ids, np.int32),
        positions=np.concatenate(positions) if len(positions) > 1 else positions[0],
        slots=np.concatenate(slots) if len(slots) > 1 else slots[0],
        query_start=np.array(starts, np.int32),
        context_len=np.array([piece.start + piece.num_rows - piece.num_dropped for piece in pieces], np.int32),
        rope_len=np.array([piece.rope_len for piece in pieces], np.int32),
        page_table=table,
        logit_rows=np.array(logit_rows, np.int32),
        num_decode_rows=len(ids) if as_decode else 0,
        **_window_places(pieces),
        lora_idx=_adapters(pieces),
    )


def _adapters(pieces: Sequence[Piece]) -> NDArray[np.int32] | None:
    """As ``ForwardBatch.lora_idx``."""
    found = [piece.sequence.lora for piece in pieces]
    return np.array(found, np.int32) if max(found) >= 0 else None


def _last_rows(pieces: Sequence[Piece]) -> ForwardBatch:
    """One row of each sequence: what nearly all steps are."""
    count, tables = len(pieces), [piece.sequence.page_table for piece in pieces]
    ids, slots = [], []
    for piece, pages in zip(pieces, tables, strict=True):
        sequence, position, place = piece.sequence, piece.start, piece.start - piece.num_dropped
        ids.append(sequence.ids[position] if position < len(sequence.ids) else -1 - sequence.sample_idx)
        slots.append(int(pages[place // PAGE_SIZE]) * PAGE_SIZE + place % PAGE_SIZE)
    lengths = np.array([piece.stop - piece.num_dropped for piece in pieces], np.int32)
    if count == 1:
        table = tables[0][None]
    else:
        table = np.zeros((count, max(map(len, tables))), np.int32)
        for row, pages in zip(table, tables, strict=True):
            row[: len(pages)] = pages
    rows = np.arange(count + 1, dtype=np.int32)
    return ForwardBatch(
        token_ids=np.array(ids, np.int32),
        positions=np.array([piece.start for piece in pieces], np.int32),
        slots=np.array(slots, np.int32),
        query_start=rows,
        context_len=lengths,
        rope_len=np.array([piece.rope_len for piece in pieces], np.int32),
        page_table=table,
        logit_rows=rows[:-1],
        num_decode_rows=count,
        **_window_places(pieces),
        lora_idx=_adapters(pieces),
    )


def _window_places(pieces: Sequence[Piece]) -> dict[str, NDArray[np.int32]]:
    """``window_slots`` and ``window_table``, where layers that have a window have pages of their own."""
    if not pieces[0].sequence.window_pages:
        return {}
    tables = [piece.sequence.window_table for piece in pieces]
    table = np.zeros((len(pieces), max(map(len, tables))), np.int32)
    slots = []
    for row, piece, pages in zip(table, pieces, tables, strict=True):
        row[: len(pages)] = pages
        where = np.arange(piece.start, piece.start + piece.num_rows, dtype=np.int32)
        slots.append(pages[where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE)
    return {"window_slots": np.concatenate(slots), "window_table": table}
