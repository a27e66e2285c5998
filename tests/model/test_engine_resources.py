"""Many short requests leave nothing behind: no page, thread, file or object."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import exl
from tests.model.engine_at_rest import SECONDS, check_at_rest, engine_threads, resources, wait_for

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
PROMPTS = ("One day", "The dog", "Lily and Tom", "A", "Once upon a time")


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_short_requests_of_which_a_third_is_cancelled(count):
    rng = random.Random(3)
    with exl.load(STORIES, device="cpu", context=64, cache_tokens=256) as llm:

        def some(num_requests: int, seed: int) -> None:
            rng = random.Random(seed)
            handles = []
            for _ in range(num_requests):
                prompt, options = rng.choice(PROMPTS), {"max_tokens": rng.randrange(1, 4), "seed": rng.randrange(9)}
                kind, cancels = rng.randrange(3), rng.random() < 1 / 3
                if kind == 0:
                    handles.append(llm.submit(prompt, **options))
                    if cancels:
                        handles[rng.randrange(len(handles))].cancel()
                elif kind == 1:
                    stream = llm.stream(prompt, **options)
                    next(stream, None)
                    if not cancels:
                        list(stream)
                else:
                    with llm.submit(prompt, **options, n=2) as handle:
                        if not cancels:
                            handle.result(SECONDS)
                if len(handles) > 20:
                    for handle in handles:
                        handle.result(SECONDS)
                    handles.clear()

        some(20, 0)  # starts and compiles what is needed once
        assert wait_for(lambda: not engine_threads())
        before = resources()
        some(count // 2, 1)
        with ThreadPoolExecutor(4) as pool:  # and at once
            for done in [pool.submit(some, count // 8, rng.randrange(1 << 30)) for _ in range(4)]:
                done.result(SECONDS * 10)
        assert wait_for(lambda: not engine_threads())
        check_at_rest(llm)
        assert resources() == before
