"""Which sequences run and which wait: by arrival, as long as there are rows and pages."""

from __future__ import annotations

import bisect
import time

from exl.batch import PAGE_SIZE
from exl.engine.admission import Pages
from exl.engine.compose import Piece, pack_chunks
from exl.engine.device import Device, Stats
from exl.engine.drafts import Drafts
from exl.engine.sequence import Sequence, State
from exl.errors import MemoryBudgetError


class Lineup:
    """Part of the scheduler: the sequences that have not ended."""

    def __init__(self, device: Device, pages: Pages, drafts: Drafts, stats: Stats) -> None:
        self.device, self.pages, self.drafts, self.stats = device, pages, drafts, stats
        self.waiting: list[Sequence] = []  # by arrival, as all lists of sequences
        self.running: list[Sequence] = []  # have pages

    # ---- who comes and goes

    def wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=lambda other: other.arrival)

    def leave(self, sequence: Sequence) -> None:
        """The sequence is not run any more; its pages may be used by the next step: what an earlier one still writes
        comes before, on the same stream."""
        others = self.waiting if sequence.state is State.WAITING else self.running
        if sequence in others:  # not if making its request has failed half way
            others.remove(sequence)
        self.pages.give_back(sequence)
        self.drafts.release(sequence)
        sequence.state = State.DONE

    def drop_all(self, sequences: list[Sequence]) -> None:
        """After an interrupt, which may have come anywhere."""
        self.running, self.waiting = [], []
        self.pages.recover(sequences, self.device.zero_pages)
        for sequence in sequences:
            self.drafts.release(sequence)
            sequence.state = State.DONE

    def suspend(self, sequence: Sequence) -> None:
        """Takes its pages; it waits, and is computed again when there are some."""
        self.running.remove(sequence)
        self.drafts.release(sequence)
        self.pages.pause(sequence)
        self.wait(sequence)

    def pause(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        self.suspend(sequence)

    # ---- pages for the next step

    def draws_next(self, sequence: Sequence) -> bool:
        return (
            sequence.state is State.RUNNING
            and sequence.num_drawn < sequence.max_new  # those whose last token is drawn wait for it to be read
            and not sequence.ticket.lags
        )

    def needs_pages(self, sequence: Sequence) -> bool:
        """Whether the next step may run rows of it."""
        return self.draws_next(sequence) or (sequence.state is State.PREFILL and not sequence.ticket.lags)

    def grow(self, sequence: Sequence) -> bool:
        """Pages for its next rows, if they cross a border. False: there are too few left."""
        try:
            self.pages.shift(sequence)
            self.pages.grow_for_step(sequence)
        except MemoryBudgetError:
            return False
        return True

    def pause_newest(self) -> None:
        """First of those whose readers lag. Those that have been shifted come last: all of them is computed again."""
        others = [sequence for sequence in self.running[1:] if not sequence.num_dropped]
        lagging = [sequence for sequence in self.running if sequence.ticket.lags]
        self.pause((lagging or others or self.running)[-1])

    def _pause_lagging(self) -> bool:
        """Makes room by pausing a sequence whose reader lags, if there is one."""
        lagging = [sequence for sequence in self.running if sequence.ticket.lags and sequence.sample_idx is None]
        if lagging:
            self.pause(lagging[-1])
        return bool(lagging)

    # ---- who gets in

    def admit(self) -> None:
        """By arrival: nobody overtakes one that waits for pages. One whose prompt begins like one that is being
        computed waits for that."""
        for sequence in list(self.waiting):
            if sequence.ticket.lags or self._follows(sequence):
                continue
            if len(self.running) >= self.device.max_sequences and not self._pause_lagging():
                return
            while not self.pages.place(sequence, reserve=len(self.running)):
                if not self._pause_lagging():
                    return
            self._begin(sequence)

    def _begin(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if sequence.num_drawn and sequence.num_cached == len(sequence.ids) - 1:
            sequence.state = State.RUNNING
        else:
            sequence.state = State.PREFILL
        if sequence.answer.began == 0.0:
            sequence.answer.began = time.perf_counter()
        if sequence.num_drawn:
            self.stats.recomputed_tokens += len(sequence.ids) - 1 - sequence.num_cached
        bisect.insort(self.running, sequence, key=lambda other: other.arrival)

    def _follows(self, sequence: Sequence) -> bool:
        """Whether a prompt begins, for a page or more, like one that is being computed and will be found; so does that
        of a request's other choices, however short."""
        leader = sequence.ticket.sequences[0]
        if sequence is not leader and leader.state is not State.DONE and leader.num_read == 0:
            return True
        if sequence.ticket.request.reuse_prefix is False:
            return False
        least = PAGE_SIZE if self.device.rules.chunks_alike else max(PAGE_SIZE, self.device.rules.chunk)
        head = sequence.ids[:least]
        return len(sequence.ids) > least and any(
            (other.state is State.PREFILL or other.num_read == 0)
            and len(other.ids) > least
            and other.ids[:least] == head
            and not other.wants_all  # whose chunks are others
            and not other.ticket.lags
            for other in self.running
        )

    def fork(self, leader: Sequence) -> list[Sequence]:
        """The other choices of a request whose prompt is computed, as far as there is room: they share its pages. The
        rest wait and find it in the cache."""
        ticket, forked = leader.ticket, []
        if leader.num_drawn or leader is not ticket.sequences[0]:
            return []
        for child in ticket.sequences[1:]:
            if child.state is not State.WAITING or child.num_drawn or len(self.running) >= self.device.max_sequences:
                continue
            if self.pages.pool.num_free <= len(self.running):
                break
            self.pages.fork(leader, child)
            child.answer.num_reused = leader.num_cached
            self._begin(child)
            child.state = State.RUNNING
            forked.append(child)
        return forked

    # ---- what of their prompts runs next

    def chunks(self) -> list[list[Piece]]:
        """The next chunks of the oldest prompts, under the budget of a step, in groups that share a batch."""
        rules, pieces, num_rows = self.device.rules, [], 0
        for sequence in self.running:
            if sequence.state is not State.PREFILL or sequence.ticket.lags:
                continue
            piece = rules.next_piece(sequence, reuse_counts=sequence.ticket.request.reuse_prefix is True)
            if pieces and (piece.every or num_rows + piece.num_rows > self.device.step_tokens):
                break
            pieces.append(piece)
            num_rows += piece.num_rows
            if piece.every:
                break
            while not piece.wants_logits and num_rows < self.device.step_tokens:
                piece = rules.next_piece(sequence, reuse_counts=False, start=piece.stop)
                within = piece.start < piece.stop <= sequence.room
                if not within or num_rows + piece.num_rows > self.device.step_tokens:
                    break
                pieces.append(piece)
                num_rows += piece.num_rows
            if num_rows >= self.device.step_tokens:
                break
        return pack_chunks(pieces, rules, self.device.max_sequences)
