"""Ctrl-C in programs that use exl, each a scenario of its own: ``python -m tests.model.interrupt_child SCENARIO N``.

Prints one JSON object, which ``test_engine_interrupts.py`` reads. "faults" are whatever was not as it must be after an
interrupt: pages that are lost, another text, a thread or a file that is left.
"""

from __future__ import annotations

import _thread
import faulthandler
import gc
import json
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import exl
from tests.model.engine_at_rest import check_at_rest, engine_threads, resources, wait_for

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
OPTIONS = {"temperature": 1.0, "seed": 5}
SECONDS = 200


class Program:
    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        # Three pages, so that sequences are paused: ``paused`` has three that each come to want two.
        self.llm = exl.load(STORIES, device="cpu", context=128, cache_tokens=192, max_sequences=3)
        gc.freeze()  # what is here now stays: each later collection looks at a few objects only
        self.expected = [self.ask(prompt) for prompt in ("One day", "The dog")]
        self.faults: list[str] = []
        self.num_interrupts = 0

    def ask(self, prompt: str) -> str:
        return self.llm.generate(prompt, self.num_tokens, **OPTIONS).text

    # --- what is interrupted

    def generate(self) -> None:
        self.llm.generate("One day", self.num_tokens, **OPTIONS)

    def stream(self) -> None:
        for _ in self.llm.stream("The dog", self.num_tokens, **OPTIONS):
            pass

    def batch(self) -> None:
        self.llm.generate(["One day", "The dog", "A"], self.num_tokens, n=2, stop="zz", **OPTIONS)

    def two_streams(self) -> None:
        streams = [self.llm.stream(prompt, self.num_tokens, **OPTIONS) for prompt in ("One day", "The dog")]
        for _ in zip(*streams, strict=False):
            pass

    def paused(self) -> None:
        self.llm.generate(list(range(10, 72)), self.num_tokens + 1, n=3, **OPTIONS)

    def chat(self) -> None:
        chat = self.llm.chat()
        for _ in chat.stream("One", self.num_tokens, **OPTIONS):
            pass

    def guessed(self) -> None:
        self.llm.generate(
            "the dog and the dog and the dog and", self.num_tokens, speculate="prompt", draft_tokens=4, **OPTIONS
        )

    def logits(self) -> None:
        self.llm.logits(list(range(3, 60)))

    def submit(self) -> None:
        handles = [self.llm.submit(prompt, self.num_tokens, **OPTIONS) for prompt in ("One day", "The dog", "Lily")]
        for _ in handles[0]:
            pass
        for handle in handles:
            handle.result()

    # --- and what must be so afterwards

    def check(self, what: str, *, twice: bool = False) -> None:
        """``twice``: the second interrupt may have hit what mends the first, which is then left to the next request."""
        gc.collect()
        try:
            if not twice:
                check_at_rest(self.llm)
            found = [self.ask(prompt) for prompt in ("One day", "The dog")]
            if found != self.expected:
                self.faults.append(f"{what}: {found}, expected {self.expected}")
            check_at_rest(self.llm)
        except BaseException:
            self.faults.append(f"{what}: {traceback.format_exc()}")
            if len(self.faults) > 3:
                raise

    def result(self) -> dict:
        pauses = self.llm.stats().preemptions
        return {"interrupts": self.num_interrupts, "pauses": pauses, "faults": self.faults}


def at_random_times(count: int) -> dict:
    """Real signals, after delays that reach from the beginning to the end of what is interrupted."""
    program, rng = Program(12), random.Random(16)
    signal.signal(signal.SIGALRM, lambda *_: _thread.interrupt_main())
    kinds: list[Callable[[], None]] = [program.generate, program.stream, program.batch, program.two_streams]
    kinds += [program.submit, program.chat, program.guessed, program.logits, program.paused]
    seconds: dict[Callable[[], None], float] = {}
    for work in kinds:
        work()  # compiles what it needs
        began = time.monotonic()
        work()
        seconds[work] = time.monotonic() - began
    wait_for(lambda: not engine_threads())
    before = resources()
    for i in range(count):
        work = kinds[i % len(kinds)]
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, rng.random() * seconds[work]))
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            program.num_interrupts += 1
        program.check(f"{work.__name__} {i}")
    wait_for(lambda: not engine_threads())
    after = resources()
    if after != before:
        program.faults.append(f"before: {before}, after: {after}")
    return program.result()


def everywhere(count: int) -> dict:
    """At chosen places of inline work: where Python looks for signals, after a call of C code and on entering or
    leaving a function. Every third time there is a second one soon after, which may hit what mends the first."""
    program, rng = Program(3), random.Random(17)
    kinds = [program.generate, program.stream, program.batch, program.two_streams, program.chat, program.guessed]
    kinds.append(program.paused)
    places = {work: _count(work) for work in kinds}
    second = False

    def on_alarm(*_) -> None:
        nonlocal second
        second = False
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, on_alarm)
    sys.unraisablehook = lambda _: None  # an interrupt in a finalizer is printed, else
    for i in range(count):
        work, twice = kinds[i % len(kinds)], i % 3 == 2
        target = rng.randrange(places[work])
        seen = 0

        def profile(frame, event, _, target=target, twice=twice) -> None:
            nonlocal seen, second
            seen += event != "c_call"
            if seen > target and event != "c_call":
                sys.setprofile(None)
                if twice:
                    second = True
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-3))
                raise KeyboardInterrupt

        try:
            try:
                sys.setprofile(profile)
                work()
            finally:
                sys.setprofile(None)
                while second:
                    pass
        except KeyboardInterrupt:
            program.num_interrupts += 1
        program.check(f"{work.__name__} at {target}", twice=twice)
    return program.result()


def _count(work: Callable[[], None]) -> int:
    """Places to interrupt it at."""
    seen = 0

    def profile(frame, event, _) -> None:
        nonlocal seen
        seen += event != "c_call"

    sys.setprofile(profile)
    work()
    sys.setprofile(None)
    return seen


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    scenario, number = sys.argv[1:]
    print(json.dumps({"at_random_times": at_random_times, "everywhere": everywhere}[scenario](int(number))))
