"""A model that is a hash of its ids, and how a request decodes with it: token by token, or with drafts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exl.engine.speculation import Drafter, accepted
from exl.philox import uniform

V = 11


@dataclass(frozen=True)
class Toy:
    """Logits [V] after ids, a function of the last ``order`` of them: so text repeats itself, and lookups find it."""

    order: int = 2
    noise: float = 0.0  # how far it is from another toy of the same order
    order_noise: int = 3

    def logits(self, ids: Sequence[int]) -> NDArray[np.float64]:
        logits = _noise(ids[-self.order :], 0)
        return logits + self.noise * _noise(ids[-self.order_noise :], 1) if self.noise else logits


def _noise(ids: Sequence[int], salt: int) -> NDArray[np.float64]:
    return np.random.RandomState(zlib.crc32(np.array([salt, *ids], np.int32).tobytes())).standard_normal(V) * 2


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None  # None: greedy
    stops: frozenset[int] = frozenset()
    stop_pairs: frozenset[tuple[int, int]] = frozenset()  # as a stop string over two tokens

    def draw(self, logits: NDArray[np.float64], step: int) -> int:
        if self.seed is None:
            return int(np.argmax(logits))
        weights = np.exp(logits - logits.max())
        return min(int(np.searchsorted(np.cumsum(weights), uniform(self.seed, step) * weights.sum())), V - 1)

    def ends(self, ids: Sequence[int]) -> bool:
        generated = len(ids) - len(self.prompt)
        pair = generated >= 2 and tuple(ids[-2:]) in self.stop_pairs
        return generated == self.max_tokens or ids[-1] in self.stops or pair


@dataclass(eq=False)
class ToySequence:
    request: Request
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt


def plain(model: Toy, request: Request) -> list[int]:
    """One token at a time."""
    ids = list(request.prompt)
    for step in range(request.max_tokens):
        ids.append(request.draw(model.logits(ids), step))
        if request.ends(ids):
            break
    return ids


def with_drafts(
    model: Toy, request: Request, drafter: Drafter, length: Callable[[], int], drops: Callable[[], bool] = lambda: False
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids, and (drafts, kept) of each step. ``length``: of the next step. ``drops``: the step comes to nothing."""
    sequence = ToySequence(request)
    steps = []
    ended = request.max_tokens == 0
    while not ended:
        most = min(length(), request.max_tokens - sequence.num_generated - 1)
        (drafts,) = drafter.propose([(sequence, most)])
        assert len(drafts) <= most
        if drops():
            continue
        first = sequence.num_generated
        drawn = [request.draw(model.logits([*sequence.ids, *drafts[:j]]), first + j) for j in range(len(drafts) + 1)]
        kept = accepted(drafts, drawn)
        for token_id in drawn[: kept + 1]:
            sequence.ids.append(token_id)
            ended = request.ends(sequence.ids)
            if ended:
                break
        kept = min(kept, sequence.num_generated - first)
        drafter.commit(sequence, kept)
        steps.append((len(drafts), kept))
    drafter.release(sequence)
    return sequence.ids, steps
