"""Which sequences run and which wait: by arrival, as long as there are rows and pages."""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence as Many

from exl.batch import PAGE_SIZE
from exl.engine.admission import Pages
from exl.engine.compose import Piece, pack_chunks
from exl.engine.device import Device, Stats
from exl.engine.drafts import Drafts
from exl.engine.group import members_of
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
        """The sequence, and its group, is not run any more; its pages may be used by the next step: what an earlier one
        still writes comes before, on the same stream."""
        for member in members_of(sequence):
            others = self.waiting if member.state is State.WAITING else self.running
            if member in others:  # not if making its request has failed half way
                others.remove(member)
            self.pages.give_back(member)
            self.drafts.release(member)
            member.state = State.DONE

    def drop_all(self, sequences: list[Sequence]) -> None:
        """After an interrupt, which may have come anywhere."""
        self.running, self.waiting = [], []
        self.pages.recover(sequences, self.device.zero_pages)
        for sequence in sequences:
            self.drafts.release(sequence)
            sequence.state = State.DONE

    def suspend(self, sequence: Sequence) -> None:
        """Takes its pages, and its group's; it waits, and is computed again when there are some."""
        for member in members_of(sequence):
            self.running.remove(member)
            self.drafts.release(member)
            self.pages.pause(member)
            self.wait(member)

    def pause(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        self.suspend(sequence)

    # ---- pages for the next step

    def draws_next(self, sequence: Sequence) -> bool:
        return self._may_draw(sequence) if sequence.group is None else all(map(self._may_draw, sequence.group.members))

    def _may_draw(self, sequence: Sequence) -> bool:
        return (
            sequence.state is State.RUNNING
            and sequence.num_drawn < sequence.max_new  # those whose last token is drawn wait for it to be read
            and not sequence.ticket.lags
        )

    def needs_pages(self, sequence: Sequence) -> bool:
        """Whether the next step may run rows of it."""
        prefills = sequence.state is State.PREFILL and not sequence.awaits_prompt
        return self.draws_next(sequence) or (prefills and not sequence.ticket.lags)

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
        oldest = members_of(self.running[0])
        lagging = [sequence for sequence in self.running if sequence.ticket.lags]
        others = [sequence for sequence in self.running if sequence not in oldest]
        unshifted = [sequence for sequence in others if not sequence.num_dropped]
        self.pause((lagging or unshifted or others or self.running)[-1])

    def _pause_lagging(self) -> bool:
        """Makes room by pausing a sequence whose reader lags, if there is one."""
        lagging = [sequence for sequence in self.running if sequence.ticket.lags and sequence.sample_idx is None]
        if lagging:
            self.pause(lagging[-1])
        return bool(lagging)

    # ---- who gets in

    def admit(self) -> None:
        """By arrival: nobody overtakes one that waits for pages. One whose prompt begins like one that is being
        computed waits for that. A group gets in as a whole."""
        for sequence in list(self.waiting):
            members = members_of(sequence)
            if sequence is not members[0] or sequence.ticket.lags:
                continue
            sources = self._sources(members)
            if not sources and any(map(self._follows, members)):
                continue
            while len(self.running) + len(members) > self.device.max_sequences:
                if not self._pause_lagging():
                    return
            while not self._place(members, sources):
                if not self._pause_lagging():
                    return
            for member in members:
                self._begin(member)

    def _reserve(self) -> int:
        """Pages that are left to those that run: one for each that may need one."""
        return sum(sequence.may_grow for sequence in self.running)

    def _place(self, members: Many[Sequence], sources: Many[Sequence]) -> bool:
        """Pages for all or for none. ``sources``: those that have computed their prompts; or nobody has."""
        reserve = self._reserve()
        for i, member in enumerate(members):
            behind = sources or (i and member.group.shares_prompt)
            place = self.pages.place_behind_prompt if behind else self.pages.place
            if not place(member, reserve):
                for other in members[:i]:
                    self.pages.pause(other)
                return False
        for member, source in zip(members, sources):  # noqa: B905  there may be none
            self.pages.take_prompt(source, member)
        return True

    def _sources(self, members: Many[Sequence]) -> Many[Sequence]:
        """The group of a request's first choice, if it has just computed the prompts of another one's too."""
        first = members[0].ticket.sequences[0].group
        if first is None or first is members[0].group or members[0].num_drawn:
            return ()
        ready = all(member.state is State.RUNNING and not member.num_drawn for member in first.members)
        return first.members if ready else ()

    def _begin(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        begun = sequence.num_drawn or sequence.group is not None
        if begun and sequence.num_cached == len(sequence.ids) - 1 and not sequence.awaits_prompt:
            sequence.state = State.RUNNING
        else:
            sequence.state = State.PREFILL
        if sequence.answer.began == 0.0:
            sequence.answer.began = time.perf_counter()
        if sequence.num_drawn:
            num_cached = sequence.num_chunked if sequence.awaits_prompt else sequence.num_cached
            self.stats.recomputed_tokens += len(sequence.ids) - 1 - num_cached
        bisect.insort(self.running, sequence, key=lambda other: other.arrival)

    def _follows(self, sequence: Sequence) -> bool:
        """Whether a prompt begins, for a page or more, like one that is being computed and will be found; so does that
        of a request's other choices, however short."""
        leader = sequence.ticket.sequences[0]
        if leader not in members_of(sequence) and leader.state is not State.DONE and leader.num_read == 0:
            return True
        least = PAGE_SIZE if self.device.rules.chunks_alike else max(PAGE_SIZE, self.device.rules.chunk)
        if sequence.ticket.request.reuse_prefix is False or sequence.num_unwanted < least:
            return False
        head = sequence.ids[:least]
        return len(sequence.ids) > least and any(
            (other.state is State.PREFILL or other.num_read == 0)
            and len(other.ids) > least
            and other.lora == sequence.lora
            and other.ids[:least] == head
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
            if self.pages.num_free <= self._reserve():
                break
            self.pages.fork(leader, child)
            child.answer.num_reused = leader.num_cached
            self._begin(child)
            child.state = State.RUNNING
            forked.append(child)
        return forked

    def _share_prompts(self) -> None:
        """Members of a group get the prompt that its leader has computed for all of them."""
        for sequence in self.running:
            if sequence.awaits_prompt and sequence.group.leader.num_cached >= sequence.num_chunked:
                self.pages.take_prompt(sequence.group.leader, sequence)
                if sequence.num_cached == sequence.prefill_stop:
                    sequence.state = State.RUNNING

    # ---- what of their prompts runs next

    def chunks(self) -> list[list[Piece]]:
        """The next chunks of the oldest prompts, under the budget of a step, in groups that share a batch.

        Of those whose rows are asked for after the pass no more than the device keeps then."""
        if not [sequence for sequence in self.running if sequence.state is State.PREFILL]:
            return []
        rules, pieces, num_rows = self.device.rules, [], 0
        self._share_prompts()
        for sequence in self.running:
            if sequence.state is not State.PREFILL or sequence.ticket.lags or sequence.awaits_prompt:
                continue
            piece = rules.next_piece(sequence, reuse_counts=sequence.ticket.request.reuse_prefix is True)
            if pieces and num_rows + piece.num_rows > self.device.step_tokens:
                break
            pieces.append(piece)
            num_rows += piece.num_rows
            while piece.stop < sequence.prefill_stop and num_rows < self.device.step_tokens:
                piece = rules.next_piece(sequence, reuse_counts=False, start=piece.stop)
                within = piece.start < piece.stop <= sequence.room
                if not within or num_rows + piece.num_rows > self.device.step_tokens:
                    break
                pieces.append(piece)
                num_rows += piece.num_rows
            if num_rows >= self.device.step_tokens:
                break
        groups = pack_chunks(pieces, rules, self.device.max_sequences)
        if not self.device.keeps_all_rows:
            for i, group in enumerate(groups):
                if any(piece.sequence.wants_rows for piece in group):
                    return groups[: i + 1]
        return groups
