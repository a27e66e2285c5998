"""A device for ``exl.engine.scheduler`` without a model: what it keeps at a slot of the cache is the token id that was
written there, and the bits' history; its logits are a hash of what a row finds on its pages. So a wrong page, a wrong
slot or a row with other bits than it should have shows in the text."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from exl.batch import PAGE_SIZE, ForwardBatch, SampleRows, SamplingBatch
from exl.engine.compose import ChunkRules
from exl.engine.guidance import GuidedRow, guide
from exl.ops.base import ALL_ROWS as ALL_ALIKE
from exl.sampling import sample

V = 13
EOS = V - 1
_RANDOM = np.random.RandomState(0)
_BY_TEXT = _RANDOM.standard_normal((4096, V)).astype(np.float32) * 2.0
_BY_LAST = _RANDOM.standard_normal((V, V)).astype(np.float32) * 2.0  # so that texts repeat, and lookups find drafts
_BY_TEXT[:, EOS] -= 2.0

ALIKE, AS_DECODE, AS_PROMPT, IN_COMPANY = 0, 1, 2, 3  # whose bits a row has
NOT_A_NUMBER = -7  # an id


@dataclass(frozen=True)
class Faults:
    """What happens to a step, once."""

    error: BaseException
    after_rows: int = 0  # that have been written by then
    times: int = 1


@dataclass(eq=False)
class FakeDevice:
    """See ``exl.engine.scheduler.Device``."""

    num_pages: int = 64
    runs_ahead: bool = False
    invariant_rows: int = ALL_ALIKE
    chunk: int = 64
    max_decode_prompt: int = 4
    max_decode_rows: int = 8
    max_sequences: int = 4
    step_tokens: int = 128
    keeps_all_rows: bool = False  # as with streamed layers
    decode_rows: int = 16  # of a batch of decode rows, drafts included
    max_logit_rows: int = 24
    vocab_size: int = V
    window: int | None = None  # a row finds itself and so many tokens, less one, before it
    # Pages of a second slab, whose rows find so many tokens: what is found there must be what the first slab has.
    num_windows: int = 0
    reach: int = 0
    num_holders: Callable[[int], int] | None = None  # of a page, to see that only its owner writes to it
    window_holders: Callable[[int], int] | None = None
    log: list[str] = field(default_factory=list)  # "step", "sample", "read", in order
    rows: Counter[str] = field(default_factory=Counter)  # that ran: "decode", "prompt"
    zeroed: list[int] = field(default_factory=list)  # pages
    zeroed_windows: list[int] = field(default_factory=list)
    faults: Faults | None = None
    nan_row: int | None = None  # of the next step's rows in all: what it writes is not a number

    def __post_init__(self) -> None:
        self.rules = ChunkRules(
            chunk=self.chunk,
            max_decode_prompt=self.max_decode_prompt,
            max_decode_rows=self.max_decode_rows,
            invariant_rows=self.invariant_rows,
            decode_alike=self.invariant_rows == ALL_ALIKE,
        )
        self.ids = np.full(self.num_pages * PAGE_SIZE, -1, np.int64)
        self.bits = np.zeros(self.num_pages * PAGE_SIZE, np.int64)
        self.positions = np.zeros(self.num_pages * PAGE_SIZE, np.int64)  # as RoPE has them
        self.window_ids = np.full(self.num_windows * PAGE_SIZE, -1, np.int64)
        self.window_bits = np.zeros(self.num_windows * PAGE_SIZE, np.int64)
        self._logits = torch.zeros(64, V)  # one buffer, as on a device: what comes later overwrites it
        self._chunks: list[tuple[ForwardBatch, np.ndarray, np.ndarray] | None] = []  # with what a pass left; None: gone
        self._last: list[int] = []
        self.num_draws = 0
        self._num_rows = 0

    # ---- what a scheduler asks for

    def step(
        self,
        decode: ForwardBatch | None,
        chunks: Sequence[ForwardBatch],
        on_layer: Callable[[range, int, int], None] | None = None,
        keep_rows: bool = False,
    ) -> torch.Tensor:
        self.log.append("step")
        self._logits.fill_(float("nan"))
        self._num_rows, at, self._chunks = 0, 0, []
        if decode is not None:
            assert decode.num_decode_rows == decode.num_rows <= self.decode_rows
            at = self._run(decode, at)
        for i, batch in enumerate(chunks):
            assert batch.num_rows <= self.chunk
            assert batch.num_sequences <= self.max_sequences
            at = self._run(batch, at)
            self._chunks = [*self._chunks, None] if self.keeps_all_rows else [None] * (i + 1)
            self._chunks[i] = batch, self.ids.copy(), self.bits.copy()
            if on_layer is not None:
                on_layer(range(i, i + 1), 1, 2)
                on_layer(range(i, i + 1), 2, 2)
        self._fail(at_end=True)
        self.nan_row = None
        if not keep_rows:
            self._chunks = []
        return self._logits[:at]

    def guide(self, logits: torch.Tensor, rows: Sequence[GuidedRow]) -> None:
        guide(logits, rows)

    def prompt_logits(self, chunk: int, rows: range) -> torch.Tensor:
        self.log.append("head")
        assert 0 < len(rows) <= self.max_logit_rows
        self._logits.fill_(float("nan"))
        self._logits[: len(rows)] = torch.from_numpy(self._kept_rows(chunk, rows))
        return self._logits[: len(rows)]

    def final_states(self, chunk: int, rows: range) -> np.ndarray:
        return self._kept_rows(chunk, rows).astype(np.float64)

    def _kept_rows(self, chunk: int, rows: range) -> np.ndarray:
        assert self._chunks[chunk] is not None, "the rows of this chunk are gone"
        batch, *memory = self._chunks[chunk]
        return np.stack([self._logits_of(batch, row, *memory) for row in rows])

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> FakeSamples:
        self.log.append("sample")
        found = sample(logits, params)
        self._last = found.ids
        self.num_draws += 1
        return FakeSamples(self, found, self.num_draws)

    def zero_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._slots(page)[:] = 0
            self.bits[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = 0
            self.zeroed.append(page)

    def zero_windows(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.window_ids[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = 0
            self.window_bits[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = 0
            self.zeroed_windows.append(page)

    def copy_windows(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for a, b in zip(src, dst, strict=True):
            self._owned(b, self.window_holders)
            of_a, of_b = (slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in (a, b))
            self.window_ids[of_b] = self.window_ids[of_a]
            self.window_bits[of_b] = self.window_bits[of_a]

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for a, b in zip(src, dst, strict=True):
            self._owned(b, self.num_holders)
            self._slots(b)[:] = self._slots(a)
            of_a, of_b = (slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in (a, b))
            self.bits[of_b] = self.bits[of_a]
            self.positions[of_b] = self.positions[of_a]

    def turn_pages(self, src: Sequence[int], dst: Sequence[int], num_positions: int) -> None:
        self.copy_pages(src, dst)
        for page in dst:
            self.positions[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] += num_positions

    def abandon(self) -> None:
        self._logits.fill_(float("nan"))
        self._chunks = []

    def is_lost(self) -> bool:
        return False

    # ---- for tests

    def found(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        """The ids that lie on these pages."""
        return [int(self._slots(pages[i // PAGE_SIZE])[i % PAGE_SIZE]) for i in range(num_tokens)]

    def found_windows(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        """``found``, in the second slab."""
        return [int(self.window_ids[pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE]) for i in range(num_tokens)]

    def found_bits(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        slots = [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(num_tokens)]
        return self.bits[slots].tolist()

    def cold_bits(self, num_tokens: int) -> list[int]:
        """Those of the beginning of a prompt in whole chunks that reuses nothing."""
        if self.rules.all_alike:
            return [ALIKE] * num_tokens
        return [self._prompt_bits(self.chunk, i % self.chunk) for i in range(num_tokens)]

    def is_poisoned(self, page: int) -> bool:
        return NOT_A_NUMBER in self._slots(page)

    # ---- rows

    def _run(self, batch: ForwardBatch, at: int) -> int:
        kind = "decode" if batch.num_decode_rows else "prompt"
        assert batch.num_decode_rows in (0, batch.num_rows)
        self.rows[kind] += batch.num_rows
        starts = batch.query_start
        assert starts[-1] == batch.num_rows
        for b in range(batch.num_sequences):  # all rows are written before any is read, as a kernel may do it
            first = int(batch.context_len[b] - (starts[b + 1] - starts[b]))
            for row in range(starts[b], starts[b + 1]):
                position = first + row - int(starts[b])
                ahead = int(batch.positions[row]) - position  # of a text that has been shifted
                assert ahead >= 0
                assert ahead % PAGE_SIZE == 0
                slot = int(batch.page_table[b, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
                assert batch.slots[row] == slot
                self._write(slot, int(batch.token_ids[row]), self._row_bits(batch, row))
                self.positions[slot] = batch.positions[row]
                if self.num_windows:
                    self._write_window(batch, b, row, position, slot)
            if self.num_windows:
                for row in range(starts[b], starts[b + 1]):
                    self._check_window(batch, b, first + row - int(starts[b]) + 1)
        for row in batch.logit_rows.tolist():
            self._logits[at] = torch.from_numpy(self._logits_of(batch, row, self.ids, self.bits))
            if self.num_windows and self._finds_no_number(batch, row):
                self._logits[at] = float("nan")
            at += 1
        return at

    def _write_window(self, batch: ForwardBatch, b: int, row: int, position: int, slot: int) -> None:
        place = int(batch.window_table[b, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
        assert batch.window_slots[row] == place
        self._owned(place // PAGE_SIZE, self.window_holders)
        self.window_ids[place], self.window_bits[place] = self.ids[slot], self.bits[slot]

    def _check_window(self, batch: ForwardBatch, b: int, num_tokens: int) -> None:
        """What the last of so many tokens sees in the second slab is what lies in the first."""
        seen = np.arange(max(0, num_tokens - self.reach), num_tokens)
        pages = batch.window_table[b, seen // PAGE_SIZE]
        assert (pages > 0).all(), "a row sees a page that was given back"
        places = pages * PAGE_SIZE + seen % PAGE_SIZE
        slots = batch.page_table[b, seen // PAGE_SIZE] * PAGE_SIZE + seen % PAGE_SIZE
        if NOT_A_NUMBER not in self.ids[slots] and NOT_A_NUMBER not in self.window_ids[places]:
            assert (self.window_ids[places] == self.ids[slots]).all()
            assert (self.window_bits[places] == self.bits[slots]).all()

    def _finds_no_number(self, batch: ForwardBatch, row: int) -> bool:
        """On the pages that its window reaches, also behind the text."""
        b = int(np.searchsorted(batch.query_start, row, side="right")) - 1
        num_tokens = int(batch.context_len[b] - (batch.query_start[b + 1] - row - 1))
        first, last = max(0, num_tokens - self.reach) // PAGE_SIZE, -(-num_tokens // PAGE_SIZE)
        pages = batch.window_table[b, first:last]
        return NOT_A_NUMBER in self.window_ids[(pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)]

    def _logits_of(self, batch: ForwardBatch, row: int, ids: np.ndarray, bits: np.ndarray) -> np.ndarray:
        b = int(np.searchsorted(batch.query_start, row, side="right")) - 1
        num_tokens = int(batch.context_len[b] - (batch.query_start[b + 1] - row - 1))
        return self._row_logits(batch.page_table[b], num_tokens, ids, bits)

    def _row_bits(self, batch: ForwardBatch, row: int) -> int:
        if self.rules.all_alike:
            return ALIKE
        return AS_DECODE if batch.num_decode_rows else self._prompt_bits(batch.num_rows, row)

    def _prompt_bits(self, num_rows: int, row: int) -> int:
        return AS_PROMPT if num_rows < self.invariant_rows else IN_COMPANY + num_rows * 1000 + row

    def _write(self, slot: int, token_id: int, bits: int) -> None:
        self._fail()
        self._owned(slot // PAGE_SIZE, self.num_holders)
        if token_id < 0:
            token_id = self._last[-1 - token_id]
        assert token_id < V
        self.ids[slot] = NOT_A_NUMBER if self._num_rows == self.nan_row else token_id
        self.bits[slot] = bits
        self._num_rows += 1

    def _row_logits(self, table: np.ndarray, num_tokens: int, ids: np.ndarray, bits: np.ndarray) -> np.ndarray:
        low = 0 if self.window is None else max(0, num_tokens - self.window)
        first = low // PAGE_SIZE
        pages = table[first : -(-num_tokens // PAGE_SIZE)]
        slots = (pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)
        if NOT_A_NUMBER in ids[slots]:  # behind the text, too: 0 times NaN is NaN
            return np.full(V, np.nan, np.float32)
        slots = slots[low - first * PAGE_SIZE : num_tokens - first * PAGE_SIZE]
        first, last = self.positions[slots[0]], self.positions[slots[-1]]
        assert (self.positions[slots] == np.arange(first, last + 1)).all()  # a text without gaps
        text = zlib.crc32(bits[slots].tobytes(), zlib.crc32(ids[slots].tobytes()))
        return _BY_TEXT[text % len(_BY_TEXT)] + _BY_LAST[ids[slots[-1]]]

    def _owned(self, page: int, num_holders: Callable[[int], int] | None) -> None:
        if num_holders is not None:
            assert num_holders(page) == 1, f"page {page} is written, and has {num_holders(page)} holders"

    def _slots(self, page: int) -> np.ndarray:
        return self.ids[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def _fail(self, at_end: bool = False) -> None:
        faults = self.faults
        if faults is not None and (at_end or self._num_rows >= faults.after_rows):
            self.faults = Faults(faults.error, faults.after_rows, faults.times - 1) if faults.times > 1 else None
            raise faults.error


@dataclass(eq=False)
class FakeSamples:
    device: FakeDevice
    rows: SampleRows
    number: int

    def read(self) -> SampleRows:
        assert self.number > self.device.num_draws - 2, "these samples are overwritten"
        self.device.log.append("read")
        return self.rows
