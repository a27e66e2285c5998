"""Requests of all kinds come, go and fail in any order over few pages: the books are right after each event, and in the
end everybody has what it would have got alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exl.batch import PAGE_SIZE
from exl.engine.request import TokenRequest
from exl.engine.sequence import State
from exl.engine.ticket import Ticket
from exl.errors import CheckpointError, ConfigError, ExlError, MemoryBudgetError
from exl.layout.window import window_pages
from exl.ops.base import ALL_ROWS as ALL_ALIKE
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import FakeDevice, Faults
from tests.unit.engine.fake_requests import CharSink, StepMatcher, World, alone, results, told

STOPS = ("ab", "cd", "fa")
BANS = tuple(a + b + c for a in "aceg" for b in "bdfh" for c in "abcdefghijklm")  # a pair, whatever comes then
CONTEXT = 3 * PAGE_SIZE
TEXTS = ([(i * i + i // 3) % 11 for i in range(300)], [(i * 5 + i // 7) % 11 for i in range(300)])

SAMPLERS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "min_tokens": 3},
    {"temperature": 1.0, "repetition_penalty": 1.3, "penalty_window": 8, "stop_token_ids": (3,)},
    {"temperature": 0.0, "dry_multiplier": 2.0, "presence_penalty": 0.5, "ignore_eos": True},
    {"temperature": 1.0, "mirostat_tau": 2.0},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "banned_tokens": (0, 4)},
)


@st.composite
def searches(draw: st.DrawFn) -> TokenRequest:
    """For the likeliest texts."""
    text, other = draw(st.permutations(TEXTS))
    shared, num_beams = draw(st.sampled_from((20, 60, 62, 63, 64, 65, 3, 0))), draw(st.sampled_from((2, 3, 4)))
    most, ends = draw(st.sampled_from((50, 20, 70, 7, 1))), draw(st.sampled_from(((), (3,))))
    return TokenRequest(
        prompt_ids=text[:shared] + other[: draw(st.integers(1, 6))],
        params=SamplingParams(max_tokens=most, seed=0, temperature=0.0, stop_token_ids=ends),
        reuse_prefix=draw(st.sampled_from((False, "exact", "exact", True))),
        top_logprobs=draw(st.sampled_from((None, 2))),
        num_choices=draw(st.integers(1, num_beams)),
        num_beams=num_beams,
        length_penalty=draw(st.sampled_from((1.0, 0.0, 2.0))),
        early_stopping=draw(st.sampled_from((False, True, "never"))),
        make_sink=draw(st.sampled_from((None, CharSink))),
    )


@st.composite
def requests(draw: st.DrawFn) -> TokenRequest:
    text, other = draw(st.permutations(TEXTS))
    shared = draw(st.sampled_from((60, 62, 126, 63, 64, 65, 100, 120, 127, 128, 40, 3, 0)))
    more = draw(st.integers(1, 6))
    most = draw(st.sampled_from((12, 70, 30, 20, 7, 4, 2, 1, 0)))
    stops, banned = draw(st.sampled_from(((), STOPS))), draw(st.sampled_from(((), BANS)))
    guidance = draw(st.sampled_from((1.0, 1.0, 1.0, 2.0, 0.5)))
    negative = draw(st.sampled_from((None, other[:3], text[:40], other[:64], text[:70])))
    with_sink, matcher = bool(stops or banned) or draw(st.booleans()), draw(st.sampled_from((None, None, 5, 1000)))
    return TokenRequest(
        prompt_ids=text[:shared] + other[:more],
        params=SamplingParams(max_tokens=most, seed=draw(st.integers(0, 3)), **draw(st.sampled_from(SAMPLERS))),
        reuse_prefix=draw(st.sampled_from((False, "exact", "exact", True))),
        top_logprobs=draw(st.sampled_from((None, None, 2))),
        prompt_logprobs=draw(st.sampled_from((None, None, 1))) if guidance == 1.0 else None,
        num_choices=draw(st.sampled_from((1, 1, 2, 3, 4))),
        guidance_scale=guidance,
        negative_ids=negative if guidance != 1.0 else None,
        speculate=draw(st.sampled_from((None, None, "prompt"))) if guidance == 1.0 else None,
        draft_tokens=draw(st.sampled_from((None, 3))),
        make_sink=(lambda: CharSink(stops, banned)) if with_sink else None,
        make_matcher=None if matcher is None else (lambda: StepMatcher(matcher)),
    )


def begins_alike(one: Ticket, other: Ticket) -> bool:
    """Whether a whole page of one may be used for the other."""
    first, second = (
        {tuple(ids[:PAGE_SIZE]) for ids in prompts(ticket) if len(ids) > PAGE_SIZE} for ticket in (one, other)
    )
    return one is not other and not first.isdisjoint(second)


def prompts(ticket: Ticket) -> list[list[int]]:
    return [ticket.request.prompt_ids, ticket.request.negative_ids or []]


class EngineMachine(RuleBasedStateMachine):
    context = CONTEXT
    passes = False  # whether pages that the device's window does not reach are given back

    @initialize(
        runs_ahead=st.booleans(),
        invariant_rows=st.sampled_from((1, 40, 100, ALL_ALIKE)),
        chunk=st.sampled_from((32, 64, 128)),
        num_pages=st.sampled_from((3, 4, 5)),
        max_sequences=st.sampled_from((4, 3, 2, 1)),
        keeps_all_rows=st.booleans(),
    )
    def begin(
        self,
        runs_ahead: bool,
        invariant_rows: int,
        chunk: int,
        num_pages: int,
        max_sequences: int,
        keeps_all_rows: bool = False,
        window: int | None = None,
        num_windows: int = 0,
        reach: int = 0,
    ) -> None:
        self.device = FakeDevice(
            num_pages,
            runs_ahead=runs_ahead,
            invariant_rows=invariant_rows,
            chunk=chunk,
            max_sequences=max_sequences,
            step_tokens=chunk * (1 + keeps_all_rows),
            keeps_all_rows=keeps_all_rows,
            decode_rows=8,
            window=window,
            num_windows=num_windows,
            reach=reach,
        )
        self.world = World(self.device, self.context, passes=self.passes)
        self.errors: list[BaseException] = []  # that requests may end with
        self.num_nan = 0
        scheduler, pause = self.world.scheduler, self.world.scheduler.lineup.pause

        def checked_pause(sequence: Any) -> None:
            oldest = min(scheduler.running, key=lambda other: other.arrival)
            assert sequence is not oldest or sequence.ticket.lags
            pause(sequence)

        scheduler.lineup.pause = checked_pause

    def live(self) -> list[Ticket]:
        return [ticket for ticket in self.world.tickets if not ticket.ended]

    # ---- what happens

    @rule(request=requests(), most_unread=st.sampled_from((None, None, None, 1, 3)))
    def submit(self, request: TokenRequest, most_unread: int | None) -> None:
        self.ask(request, most_unread)

    def ask(self, request: TokenRequest, most_unread: int | None = None) -> None:
        try:
            self.world.submit(request, most_unread=most_unread)
        except (ConfigError, MemoryBudgetError):
            assert request.guidance_scale != 1.0 or request.num_beams > 1  # too many together

    @rule(request=searches())
    def submit_search(self, request: TokenRequest) -> None:
        self.ask(request)

    @rule(request=requests())
    def submit_another(self, request: TokenRequest) -> None:
        self.ask(request)

    @rule(length=st.sampled_from((1, 3, 40, 64, 65, 128, 190)), pooling=st.sampled_from((None, "mean", "last")))
    def submit_text(self, length: int, pooling: str | None) -> None:
        params, wants_all = SamplingParams(max_tokens=0, seed=0), pooling is None
        self.world.submit(TokenRequest(TEXTS[0][:length], params, wants_all=wants_all, pooling=pooling))

    @precondition(lambda self: self.live())
    @rule(count=st.integers(8, 30))
    def many_steps(self, count: int) -> None:
        self.step(count)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = self.state()
            worked = self.world.scheduler.step()
            assert not worked or self.state() != before
            assert worked or not self.world.scheduler.live or any(ticket.lags for ticket in self.live())
            self.everything_adds_up()

    def state(self) -> object:
        """What steps change."""
        scheduler = self.world.scheduler
        live = [
            (s.arrival, s.state, s.num_tokens, s.num_cached, s.sample_idx, s.ticket.num_put, dict(s.rewinds))
            for s in scheduler.live
        ]
        return live, scheduler._inflight is None

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        live = self.live()
        self.world.scheduler.cancel(live[which % len(live)])

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 100))
    def read(self, which: int) -> None:
        live = self.live()
        self.world.take(live[which % len(live)])

    @precondition(lambda self: self.live())
    @rule(after_rows=st.integers(0, 70), times=st.integers(1, 2), kind=st.sampled_from((CheckpointError, RuntimeError)))
    def failing_step(self, after_rows: int, times: int, kind: type[Exception]) -> None:
        error = kind("injected")
        if kind is RuntimeError or times == 2:
            self.errors.append(error)
        self.device.faults = Faults(error, after_rows, times)
        self.world.scheduler.step()
        self.device.faults = None

    @precondition(lambda self: self.live())
    @rule(row=st.integers(0, 5))
    def row_of_no_numbers(self, row: int) -> None:
        self.device.nan_row = row
        self.world.scheduler.step()
        self.device.nan_row = None
        self.num_nan += 1

    @precondition(lambda self: self.live())
    @rule(lines=st.integers(1, 3000))
    def interrupt(self, lines: int) -> None:
        """Ctrl-C at any line of a step."""
        tickets = self.live()
        try:
            _interrupted(self.world.scheduler.step, lines)
        except KeyboardInterrupt as error:
            self.errors.append(error)
            self.device.faults = None
            self.world.scheduler.drop_all(tickets)
            for ticket in tickets:
                ticket.end(error)
            assert not self.world.scheduler.live

    # ---- what holds

    @invariant()
    def everything_adds_up(self) -> None:
        world, scheduler = self.world, self.world.scheduler
        world.check()
        assert len(scheduler.running) <= self.device.max_sequences
        for sequence in scheduler.live:
            assert (sequence.state is State.WAITING) == (sequence in scheduler.waiting) == (not sequence.pages)
            count, low = min(sequence.num_cached, len(sequence.ids)), sequence.num_passed * PAGE_SIZE
            if self.device.num_windows:
                self.windows_add_up(sequence, count, low)
                low = 0
            else:
                assert sequence.pages.count(self.world.pool.null_page) == sequence.num_passed
                assert low <= max(0, sequence.num_cached + 1 - (self.device.window or 1))
            if self.num_nan == 0:
                kept = sequence.shift.num_kept * PAGE_SIZE if sequence.num_dropped else 0
                text = sequence.ids[:kept] + sequence.ids[kept + sequence.num_dropped : count]
                assert self.device.found(sequence.pages, len(text))[low:] == text[low:]
                assert self.device.found(sequence.pristine, kept) == sequence.ids[:kept]
            count -= sequence.num_dropped
            if self.num_nan == 0 and not self.device.rules.chunks_alike and not sequence.num_dropped:
                exact = min(count, sequence.num_exact)
                assert self.device.found_bits(sequence.pages, exact)[low:] == self.device.cold_bits(exact)[low:]
            if sequence.ticket.iterated:
                assert sequence.ticket.num_put - sequence.ticket.num_taken <= sequence.ticket.max_unread + 40
        self.known_pages_hold_their_texts()

    def windows_add_up(self, sequence: Any, count: int, low: int) -> None:
        """In the second slab lies the same text, as far as it is seen, and no more pages are held for it."""
        device, pages = self.device, sequence.window_pages
        assert pages.count(0) == sequence.num_passed
        assert low <= max(0, sequence.num_cached + 1 - device.reach)
        at_once = max(device.chunk, 8, (device.num_windows - 3) * PAGE_SIZE - (device.reach - 1))
        assert len(pages) - sequence.num_passed <= window_pages(device.reach, at_once)
        if self.num_nan == 0:
            assert device.found_windows(pages, count)[low:] == sequence.ids[low:count]

    def known_pages_hold_their_texts(self) -> None:
        device = self.device
        for known in self.world.pool.known_pages():
            if self.num_nan == 0:
                assert tuple(device.found([known.page], len(known.tokens))) == known.tokens

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run(50_000)
        for pool in (self.world.pool, self.world.pool.windows):
            assert pool is None or pool.num_free == pool.num_usable
        # What a prompt has computed is kept when it ends before its first token tells whether it is numbers. Another
        # one that begins alike may take it: on a real device it would have made the same, none of this machine's.
        untold = [ticket for ticket in self.world.tickets if not any(answer.token_ids for answer in ticket.answers)]
        nan = 0
        for ticket in self.world.tickets:
            self.world.take(ticket)
            request = ticket.request
            assert ticket.ended
            comparable = request.reuse_prefix is not True or self.device.rules.all_alike
            expected = alone(request, self.device, self.context) if comparable else None
            if ticket.error is not None:
                if not any(ticket.error is error for error in self.errors):
                    assert isinstance(ticket.error, ExlError), ticket.error
                    assert "nan" in str(ticket.error), ticket.error
                    nan += not any(begins_alike(other, ticket) for other in untold)
            elif expected is not None and all(a.outcome.finish_reason != "cancelled" for a in ticket.answers):
                assert results(self.world, ticket) == expected
            for i, answer in enumerate(ticket.answers):
                ids, text = told(self.world.events[ticket], i)
                assert ids == answer.token_ids[: len(ids)]
                cancelled = answer.outcome is not None and answer.outcome.finish_reason == "cancelled"
                if cancelled and (request.make_sink is not None or request.num_beams > 1):
                    continue  # the best so far; or its end may be the beginning of a stop string, or of a banned one
                if expected is not None:
                    assert ids == expected[i][4][: len(ids)]
                    assert expected[i][5].startswith(text)
        assert nan <= self.num_nan


class ShiftMachine(EngineMachine):
    """The same with texts that go on beyond the context."""

    context = 4 * PAGE_SIZE

    @initialize(
        runs_ahead=st.booleans(),
        invariant_rows=st.sampled_from((1, 40, 100, ALL_ALIKE)),
        chunk=st.sampled_from((32, 64, 128)),
        num_pages=st.sampled_from((4, 5, 7)),
        max_sequences=st.sampled_from((4, 3, 2, 1)),
    )
    def begin(self, **options: Any) -> None:
        super().begin(**options)

    @rule(
        num_prompt=st.sampled_from((3, 60, 64, 100, 127, 128)),
        most=st.sampled_from((80, 150, 250)),
        keep=st.sampled_from((0, 0, 1, 64)),
        seed=st.integers(0, 2),
        banned=st.sampled_from(((), BANS)),
        reuse=st.sampled_from((False, "exact", True)),
        choices=st.sampled_from((1, 1, 2)),
        most_unread=st.sampled_from((None, None, 3)),
    )
    def submit_long(
        self, num_prompt: int, most: int, keep: int, seed: int, banned: Any, reuse: Any, choices: int, most_unread: Any
    ) -> None:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=most, ignore_eos=True)
        request = TokenRequest(
            TEXTS[0][:num_prompt], params, reuse, num_choices=choices, speculate="prompt", shift_keep=keep,
            make_sink=lambda: CharSink((), banned),
        )  # fmt: skip
        self.world.submit(request, most_unread=most_unread)


class WindowMachine(EngineMachine):
    """The same with a window, over fewer pages than a context has."""

    context = 7 * PAGE_SIZE
    passes = True

    @initialize(
        runs_ahead=st.booleans(),
        invariant_rows=st.sampled_from((1, 40, 100, ALL_ALIKE)),
        chunk=st.sampled_from((32, 64)),
        num_pages=st.sampled_from((6, 7, 8)),
        max_sequences=st.sampled_from((4, 3, 2, 1)),
        window=st.sampled_from((40, 1, 64, 66, 10)),
    )
    def begin(self, **options: Any) -> None:
        super().begin(**options)

    @rule(
        num_prompt=st.sampled_from((200, 256, 300)),
        most=st.sampled_from((150, 20)),
        seed=st.integers(0, 2),
        banned=st.sampled_from(((), BANS)),
        reuse=st.sampled_from((False, "exact", True)),
        choices=st.sampled_from((1, 2)),
    )
    def submit_long(
        self, num_prompt: int, most: int, seed: int, banned: tuple[str, ...], reuse: Any, choices: int
    ) -> None:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=most, ignore_eos=True)
        request = TokenRequest(
            TEXTS[0][:num_prompt], params, reuse, num_choices=choices, speculate="prompt",
            make_sink=lambda: CharSink((), banned),
        )  # fmt: skip
        self.world.submit(request)


class GroupedMachine(WindowMachine):
    """The same where some layers have a window and others have none: a context in the one slab, less in the other."""

    passes = False

    @initialize(
        runs_ahead=st.booleans(),
        invariant_rows=st.sampled_from((1, 40, 100, ALL_ALIKE)),
        chunk=st.sampled_from((32, 64)),
        num_pages=st.sampled_from((7, 8, 12)),
        max_sequences=st.sampled_from((4, 3, 2, 1)),
        reach=st.sampled_from((40, 1, 64, 66, 10)),
        num_windows=st.sampled_from((6, 7, 9)),
    )
    def begin(self, **options: Any) -> None:
        EngineMachine.begin(self, **options)


def _interrupted(what: Callable[[], object], lines: int) -> None:
    """Raises ``KeyboardInterrupt`` after so many lines of the engine, if it comes so far."""
    left = lines

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if "/exl/engine/" not in name and "/exl/cache/" not in name and "fake_device" not in name:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        what()
    finally:
        sys.settrace(before)


EngineMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None, derandomize=True)
TestEngineMachine = EngineMachine.TestCase
WindowMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=15, deadline=None, derandomize=True)
ShiftMachine.TestCase.settings = WindowMachine.TestCase.settings
TestShiftMachine = ShiftMachine.TestCase
TestWindowMachine = WindowMachine.TestCase
GroupedMachine.TestCase.settings = WindowMachine.TestCase.settings
TestGroupedMachine = GroupedMachine.TestCase
