"""One checkout's single stream, for throughput.py: greedy answers of one request at a time, again and again.

    python -c CODE MODEL OPTIONS

Uses only what every checkout has. Says on standard output where its exl is, then answers each line of standard input,
``{"prompt": [1, 2], "tokens": 64}``, by seconds of the request and of those the seconds in passes and draws.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


class Clock:
    """Seconds spent in the functions that it was given."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return run

    def timed_items(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Of a generator: the seconds until each item, not those that its caller spends in between."""

        def run(*args: Any, **options: Any) -> Iterator[Any]:
            items, end = function(*args, **options), object()
            while True:
                began = time.perf_counter()
                item = next(items, end)
                self.seconds += time.perf_counter() - began
                if item is end:
                    return
                yield item

        return run


def watch(runner: Any, clock: Clock) -> None:
    """Times the passes and draws of either kind of runner: before requests ran in batches, there was no ``step``."""
    ops = runner.decoder.ops
    if hasattr(runner, "step"):
        runner.step = clock.timed(runner.step)
    else:
        runner.forward = clock.timed_items(runner.forward)
    ops.sample = clock.timed(ops.sample)


def main() -> None:
    model, options = sys.argv[1], json.loads(sys.argv[2])
    import exl

    with exl.load(model, progress=False, **options) as llm:
        clock = Clock()
        watch(llm._engine.generator.runner, clock)
        print(json.dumps(exl.__file__), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            llm._engine.generator.eos_ids = frozenset()
            clock.seconds, began = 0.0, time.perf_counter()
            made = llm.generate(asked["prompt"], max_tokens=asked["tokens"], temperature=0.0, reuse_prefix=False)
            seconds = time.perf_counter() - began
            print(json.dumps([seconds, clock.seconds, len(made.token_ids)]), flush=True)


if __name__ == "__main__":
    main()
