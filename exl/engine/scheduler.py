"""One batch that sequences join and leave at every step.

Single-threaded: ``exl.engine.seat`` sees to it that one thread at a time drives. A step plans which rows run, runs
them, and draws. On a device that runs ahead, step n + 1 is launched before the tokens of step n are read: its rows take
them from the device's own samples. What needs the text only to draw (penalties, masks, bans) costs no wait, since step
n is read before the draw of step n + 1.

What a sequence is changes only after a pass was run, so a step that fails leaves everything as it was.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from exl.batch import SampleRows
from exl.engine.admission import Pages
from exl.engine.answers import Answers
from exl.engine.beams import Beams
from exl.engine.compose import Piece, batch_of, decode_piece
from exl.engine.device import Device, Stats
from exl.engine.drafts import DrafterError, Drafts
from exl.engine.draws import DrawRow, sampling_batch
from exl.engine.group import leads, members_of
from exl.engine.guidance import Guided, GuidedRow
from exl.engine.lineup import Lineup
from exl.engine.prompt_rows import NotNumbersError, rows_of
from exl.engine.request import Outcome
from exl.engine.sequence import Sequence as Tokens
from exl.engine.sequence import State
from exl.engine.ticket import Ticket
from exl.errors import CheckpointError, DeviceLostError, ExlError, MemoryBudgetError, with_causes
from exl.ops.base import Samples
from exl.request_options import PromptProgress
from exl.sampling import no_distribution


class _Drawing(NamedTuple):
    """A sequence whose next token is to be drawn from a row of the logits; behind that row are those of its drafts."""

    sequence: Tokens
    row: int
    num_tokens: int  # that it must have by then: fewer if a stop or a banned string was found meanwhile
    drafts: tuple[int, ...] = ()


class _Step(NamedTuple):
    """Draws that are not read: of each sequence the first sample, and the drafts that the samples behind it follow."""

    draws: list[tuple[Tokens, int, tuple[int, ...]]]
    samples: Samples


def _wants_rows(chunks: Sequence[Sequence[Piece]]) -> bool:
    return any(rows_of(piece, 0) for pieces in chunks for piece in pieces)


class _ProgressError(Exception):
    """A request's own callback has failed in the middle of a pass."""

    def __init__(self, sequence: Tokens) -> None:
        self.sequence = sequence


class Scheduler:
    def __init__(self, device: Device, pages: Pages, answers: Answers, drafts: Drafts) -> None:
        self.device, self.pages, self.answers, self.drafts = device, pages, answers, drafts
        self.stats = Stats()
        self.lineup = Lineup(device, pages, drafts, self.stats)
        self._inflight: _Step | None = None  # drawn and not read
        self._timed: list[Ticket] = []  # with a deadline
        self._arrivals = itertools.count()

    @property
    def running(self) -> list[Tokens]:
        return self.lineup.running

    @property
    def waiting(self) -> list[Tokens]:
        return self.lineup.waiting

    @property
    def live(self) -> list[Tokens]:
        return [*self.running, *self.waiting]

    # ---- requests

    def submit(self, ticket: Ticket) -> None:
        """Queues a request that was checked (``Answers.check``)."""
        if ticket.deadline is not None:
            self._timed.append(ticket)
        sequences = self.answers.sequences(ticket, next(self._arrivals))
        for sequence in sequences:
            if sequence.max_new == 0 and not sequence.prompt_only:
                sequence.state = State.DONE
            else:
                self.lineup.wait(sequence)
        for sequence in sequences:
            if sequence.max_new == 0 and not sequence.prompt_only and leads(sequence):
                self._tell_end(self.answers.cut_off, sequence)

    def cancel(self, ticket: Ticket, limit: str | None = None) -> None:
        """Ends what is left of a request. Others notice nothing."""
        for sequence in ticket.sequences:
            if sequence.state is not State.DONE:
                sequence.answer.outcome = Outcome("cancelled", limit=limit)
                self._finish(sequence)

    def _finish(self, sequence: Tokens) -> None:
        """A sequence has its outcome, and nothing more is run of it, nor of its group."""
        self.lineup.leave(sequence)
        self._tell_end(self.answers.finish, sequence)

    def _tell_end(self, how: Callable[[Tokens], None], sequence: Tokens) -> None:
        try:
            how(sequence)
        except Exception as error:  # of this request's sink
            self.fail(sequence.ticket, error)

    def _expire(self) -> None:
        """Ends requests whose deadline has passed."""
        now = time.monotonic()
        for ticket in self._timed:
            if now >= ticket.deadline and not ticket.ended:
                self.cancel(ticket, "deadline")
        self._timed = [ticket for ticket in self._timed if not ticket.ended]

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Ends a request with an error, which its caller gets."""
        for sequence in ticket.sequences:
            if sequence.state is not State.DONE:
                self.lineup.leave(sequence)
        self.answers.failed(ticket, error)

    def drop_all(self, tickets: Sequence[Ticket]) -> None:
        """After an interrupt, which may have come anywhere: nothing of these requests, which are all there are, is run
        any more. What was committed can still be reused, unless pages were on their way."""
        self._inflight = None
        sequences = [
            sequence for ticket in tickets for sequence in ticket.sequences if sequence.state is not State.DONE
        ]
        self.lineup.drop_all(sequences)
        self.device.abandon()

    # ---- steps

    def step(self) -> bool:
        """Runs what can be run. False: there is nothing to do until a request comes or a reader takes tokens."""
        if self._timed:
            self._expire()
        if self._inflight is not None and (not self.device.runs_ahead or self._must_read_first()):
            self._read()
        decode, chunks = self._plan()
        if not decode and not chunks:
            if self._inflight is None:
                return False
            self._read()
            return True
        self.stats.steps += 1
        began = time.perf_counter()
        logits = self._forward(decode, chunks)
        if logits is None:
            return True
        if not chunks and not self.device.runs_ahead:
            self.drafts.costs.measured(sum(piece.num_rows for piece in decode), time.perf_counter() - began)
        drawing = self._commit(decode, chunks)
        if self._inflight is not None:
            self._read()
        self._draw(logits, drawing)
        if chunks and _wants_rows(chunks):
            self._read(between=lambda: self._take_rows(chunks))
        elif self._inflight is not None and not self.device.runs_ahead:
            self._read()
        return True

    def _must_read_first(self) -> bool:
        """Whether which rows run depends on tokens that are not read yet."""
        return any(self.drafts.wanted(one) or isinstance(one.group, Beams) for one in self.running)

    # ---- plan

    def _plan(self) -> tuple[list[Piece], list[list[Piece]]]:
        """Decode rows, and chunks of prompts in groups that share a batch."""
        self._grow()
        self.lineup.admit()
        chunks = self.lineup.chunks()
        drawing = [sequence for sequence in self.running if self.lineup.draws_next(sequence)]
        if any(sequence.lora >= 0 for sequence in drawing):
            drawing.sort(key=lambda sequence: sequence.lora)  # rows of one adapter are multiplied together
        proposed = self._drafted(drawing)
        return [decode_piece(sequence, proposed.get(sequence, ())) for sequence in drawing], chunks

    def _drafted(self, drawing: list[Tokens]) -> dict[Tokens, tuple[int, ...]]:
        """Drafts that there are pages for. If a drafter fails, so do the requests that want drafts of it: they leave
        ``drawing``."""
        try:
            proposed = self.drafts.propose(drawing)
        except DrafterError as failed:
            self._check_device(failed.__cause__)
            self._fail_each(failed.sequences, failed.__cause__)
            drawing[:] = [sequence for sequence in drawing if sequence.state is State.RUNNING]
            return {}
        for sequence, guesses in proposed.items():
            drafts = proposed[sequence] = guesses[: max(0, sequence.next_shift - sequence.num_tokens)]
            try:
                self.pages.grow(sequence, sequence.num_tokens + len(drafts))
            except MemoryBudgetError:
                proposed[sequence] = drafts[: sequence.room - sequence.num_tokens]
        return proposed

    def _grow(self) -> None:
        """A page for each row that crosses a border, the oldest first. If there is none left, the newest sequence is
        paused, first of those whose readers lag."""
        self.pages.pass_by(self.running)
        for sequence in list(self.running):
            if sequence.state is State.RUNNING and sequence.num_tokens <= sequence.room:
                continue  # nearly always
            while self.lineup.needs_pages(sequence) and not self.lineup.grow(sequence):
                if self._inflight is not None:  # a sequence whose token is not known cannot be paused
                    self._read()
                else:
                    self.lineup.pause_newest()

    # ---- run

    def _forward(self, decode: Sequence[Piece], chunks: Sequence[Sequence[Piece]]) -> torch.Tensor | None:
        """Logits; None if the pass failed, which those who took part in it know then."""
        on_layer = self._teller(chunks) if chunks else None
        for attempt in range(2):
            try:
                decode_rows = batch_of(decode) if decode else None
                batches = [batch_of(pieces) for pieces in chunks]
                return self.device.step(decode_rows, batches, on_layer, bool(chunks) and _wants_rows(chunks))
            except _ProgressError as failed:
                self.device.abandon()
                self.fail(failed.sequence.ticket, failed.__cause__)
                return None
            except CheckpointError as error:  # a layer could not be read
                self.device.abandon()
                if attempt:
                    self._fail_all([*decode, *itertools.chain.from_iterable(chunks)], error)
            except Exception as error:
                self._check_device(error)
                self.device.abandon()
                self._fail_all([*decode, *itertools.chain.from_iterable(chunks)], error)
                return None
        return None

    def _fail_all(self, pieces: Sequence[Piece], error: Exception) -> None:
        self._fail_each([piece.sequence for piece in pieces], error)

    def _fail_each(self, sequences: Sequence[Tokens], error: Exception) -> None:
        for sequence in sequences:
            if sequence.state is not State.DONE:
                self.fail(sequence.ticket, error)

    def _check_device(self, error: Exception) -> None:
        """Raises ``DeviceLostError``, which ends the engine, if the error was not one of these requests' alone."""
        if self.device.is_lost():
            raise DeviceLostError(f"the GPU answers no more: {with_causes(error)}") from error

    def _teller(self, chunks: Sequence[Sequence[Piece]]) -> Callable[[range, int, int], None] | None:
        """Tells prompts how far they have come, if they want to know."""
        if not any(piece.sequence.ticket.request.prompt_progress for pieces in chunks for piece in pieces):
            return None

        def on_layer(which: range, layers: int, num_layers: int) -> None:
            for i in which:
                for piece in chunks[i]:
                    tell = piece.sequence.ticket.request.prompt_progress
                    if tell is not None and leads(piece.sequence):
                        before = max(0, piece.start - piece.sequence.answer.num_reused)
                        total = piece.sequence.num_chunked - piece.sequence.answer.num_reused
                        tokens = min(total, before + piece.num_rows * layers // num_layers)
                        try:
                            tell(PromptProgress(tokens, total, layers, num_layers))
                        except Exception as error:
                            raise _ProgressError(piece.sequence) from error

        return on_layer

    def _commit(self, decode: Sequence[Piece], chunks: Sequence[Sequence[Piece]]) -> list[_Drawing]:
        """What has been computed. Returns who draws next."""
        drawing, row = [], 0
        for piece in decode:
            sequence = piece.sequence
            sequence.num_exact = self.device.rules.exact_after(piece)
            sequence.num_cached = piece.stop
            self.stats.prompt_tokens += sequence.num_drawn == 0  # of a group: the last token of its prompt
            drawing.append(_Drawing(sequence, row, piece.stop, piece.drafts))
            row += piece.num_rows
        for piece in itertools.chain.from_iterable(chunks):
            sequence = piece.sequence
            sequence.num_exact = self.device.rules.exact_after(piece)
            sequence.num_cached = piece.stop
            if sequence.num_drawn == 0:
                self.stats.prompt_tokens += piece.num_rows
            if piece.wants_logits:
                sequence.state = State.RUNNING
                if sequence.num_read:  # else once it is known that the logits are numbers
                    self.pages.remember(sequence)
                drawing.append(_Drawing(sequence, row, piece.stop))
                drawing += [_Drawing(child, row, piece.stop) for child in self.lineup.fork(sequence)]
            elif sequence.group is not None and piece.stop == len(sequence.ids) - 1:  # which runs with the others'
                sequence.state = State.RUNNING
            row += piece.num_logits
        return drawing

    # ---- draw and read

    def _draw(self, logits: torch.Tensor, drawing: Sequence[_Drawing]) -> None:
        """Draws for all that are still there: a stop or a banned string may have been found meanwhile."""
        rows: list[DrawRow] = []
        draws: list[tuple[Tokens, int, tuple[int, ...]]] = []
        guided: list[GuidedRow] = []
        row_of = {one.sequence: one.row for one in drawing}
        for one in drawing:
            sequence = one.sequence
            if not leads(sequence):  # its leader draws for it
                continue
            if sequence.state is State.DONE or len(sequence.ids) != one.num_tokens:
                self.stats.wasted_rows += 1
                continue
            try:
                if isinstance(sequence.group, Beams):
                    drawn = sequence.group.draws(row_of)
                else:
                    drawn = self.answers.draw(sequence, one.row, one.drafts)
            except Exception as error:  # of this request's matcher
                self.fail(sequence.ticket, error)
                continue
            if isinstance(sequence.group, Guided):
                guided.append(GuidedRow(one.row, row_of[sequence.group.negative], sequence.group.scale))
            draws.append((sequence, len(rows), one.drafts[: len(drawn) - 1]))
            rows += drawn
        draws = [(sequence, i, drafts) for sequence, i, drafts in draws if sequence.state is not State.DONE]
        if not draws:
            return
        try:
            if guided:
                self.device.guide(logits, guided)
            samples = self.device.sample(logits, sampling_batch(rows, self.device.vocab_size))
        except Exception as error:
            self._check_device(error)
            self._fail_each([sequence for sequence, _, _ in draws], error)
            return
        for sequence, i, _ in draws:
            for member in members_of(sequence):
                member.sample_idx = i
        self._inflight = _Step(draws, samples)

    def _read(self, between: Callable[[], None] | None = None) -> None:
        """Tokens of the last draw, if there is one, to those who asked for them. ``between`` is called when they are
        known and nobody has got one yet: it may draw itself."""
        step, self._inflight = self._inflight, None
        found = None if step is None else self._found(step)
        if between is not None:
            between()
        if found is None:
            return
        for sequence, i, drafts in step.draws:
            if sequence.state is State.DONE:
                continue
            if isinstance(sequence.group, Beams):
                self._take_beams(sequence.group, found, i)
            else:
                self._take(sequence, found, i, drafts)

    def _found(self, step: _Step) -> SampleRows | None:
        """None: they cannot be had, which those whose draws they are know then."""
        for sequence, _, _ in step.draws:
            for member in members_of(sequence):
                member.sample_idx = None
        try:
            return step.samples.read()
        except Exception as error:
            self._check_device(error)
            self._fail_each([sequence for sequence, _, _ in step.draws], error)
            return None

    def _take_rows(self, chunks: Sequence[Sequence[Piece]]) -> None:
        """What is wanted of the rows of prompts, which are still there after the pass."""
        for i, pieces in enumerate(chunks):
            first = 0
            for piece in pieces:
                rows, sequence = rows_of(piece, first), piece.sequence
                first += piece.num_rows
                if rows and sequence.state is not State.DONE:
                    self._take_rows_of(sequence, i, rows)
        self.device.abandon()

    def _take_rows_of(self, sequence: Tokens, chunk: int, rows: range) -> None:
        wanted = sequence.ticket.rows
        try:
            wanted.take(self.device, chunk, rows)
        except NotNumbersError as found:
            self._poisoned(sequence, found.error)
            return
        except Exception as error:
            self._check_device(error)
            self.fail(sequence.ticket, error)
            return
        if sequence.prompt_only and not wanted.is_wanted:
            self.lineup.leave(sequence)
            self._tell_end(self.answers.cut_off, sequence)

    def _take_beams(self, beams: Beams, found: SampleRows, i: int) -> None:
        """The draws of a beam search's texts, and which of them go on."""
        leader, stop = beams.leader, i + len(beams.order)
        if min(found.ids[i:stop]) < 0:
            self._poisoned(leader, no_distribution(min(found.ids[i:stop])))
            return
        self.stats.generated_tokens += len(beams.order)
        if leader.num_read == 0:
            self.pages.proven(leader)
        if beams.take(found.ranked[i:stop], self.pages):
            self._finish(leader)

    def _take(self, sequence: Tokens, found: SampleRows, i: int, drafts: tuple[int, ...]) -> None:
        """A sequence's draws, as far as its drafts were what was drawn."""
        num_accepted = 0
        for j in range(1 + len(drafts)):
            if found.ids[i + j] < 0:
                self._poisoned(sequence, no_distribution(found.ids[i + j]))
                return
            self.stats.generated_tokens += 1
            num_before = len(sequence.ids)
            if sequence.num_read == 0:
                for member in members_of(sequence):
                    self.pages.proven(member)
            try:
                done = self.answers.take(sequence, found, i + j)
            except Exception as error:  # of this request's sink, matcher or penalties
                self.fail(sequence.ticket, error)
                return
            if isinstance(sequence.group, Guided):
                sequence.group.follow()
            kept = j < len(drafts) and found.ids[i + j] == drafts[j]
            num_accepted += kept
            if done:
                self._drafted_and_kept(sequence, len(drafts), num_accepted)
                self._finish(sequence)
                return
            if len(sequence.ids) <= num_before:
                self._step_back(sequence)
                break
            if not kept:
                break
            sequence.num_cached += 1  # the draft's row was computed with the others
            if self.device.rules.all_alike:
                sequence.num_exact = sequence.num_cached
        self._drafted_and_kept(sequence, len(drafts), num_accepted)

    def _drafted_and_kept(self, sequence: Tokens, num_drafted: int, num_accepted: int) -> None:
        self.stats.drafts_tried += num_drafted
        self.stats.drafts_accepted += num_accepted
        self.drafts.drawn(sequence, num_drafted, num_accepted)

    def _step_back(self, sequence: Tokens) -> None:
        """After tokens were taken back: the row of the last one that is left runs again, for its logits."""
        rules = self.device.rules
        self.drafts.truncated(sequence)
        try:
            for member in members_of(sequence):
                last = len(member.ids) - 1
                if member.num_chunked == len(member.ids):  # the prompt's last chunk, as it was
                    last = last if rules.all_alike else last // rules.chunk * rules.chunk
                    member.state = State.PREFILL
                self.pages.rewind(member, last)
        except MemoryBudgetError:
            self.lineup.suspend(sequence)

    def _poisoned(self, sequence: Tokens, error: ExlError) -> None:
        """A row of no numbers ends its request alone."""
        self.pages.poison(sequence.ticket.sequences, self.device.zero_pages)
        self.fail(sequence.ticket, error)
