"""Decode steps that are captured once and replayed, at little cost to the host: as CUDA graphs, or as programs of the
CPU's own kernels.

``Ops.stage`` copies a step's inputs to fixed addresses, outside of the graph; the addresses of weights, cache and
buffers are fixed too. So one graph serves all steps of one shape: batch bucket and bound of the context lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

from exl.errors import KernelError, chain_of, with_causes
from exl.ops.base import Ops
from exl.weights.device_stream import DeviceStream
from exl.weights.stream import WeightSource

logger = logging.getLogger(__name__)

MAX_GRAPHS = 24  # kept; each takes some MB of the device's memory
_MAX_SEEN = 256  # shapes remembered that have run once
_DEPENDENT_ARCH = 90  # below, dependent launches are plain ones


class StepGraphs:
    """Runs steps: the first of a shape plainly, which loads its kernels; the second is captured; the rest are replayed.
    Of more than ``MAX_GRAPHS`` the least recently used is given up; CUDA frees one that still runs when it has ended.

    A capture that fails with dependent launches is tried once more without them; if that works, steps stay without, and
    ``note`` says so. If it fails too, or if layers come from the disk, steps are launched one by one, and ``reason``
    says why, with the causes of the failure.
    """

    def __init__(self, ops: Ops, weights: WeightSource) -> None:
        """``ops`` that capture."""
        self._ops = ops
        self._weight_stream = weights if isinstance(weights, DeviceStream) else None
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._seen: dict[Hashable, None] = {}  # in the order of their last use, as the replays are
        self.note: str | None = None
        self.reason: str | None = None if weights.capturable else "layers are read from the disk"
        if self.reason:
            logger.info("decode steps are launched one by one: %s", self.reason)

    def describe(self) -> str:
        """How steps run, for people."""
        if self.reason is not None:
            return f"launched one by one: {self.reason}"
        if not self._replays:
            return "launched one by one so far: a step is captured when its shape comes for the second time"
        how = "replayed as graphs" if self._ops.backend is not None else "recorded, one call each"
        return how if self.note is None else f"{how}, {self.note}"

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """``step`` launches on fixed addresses and nothing else; equal keys launch the same."""
        if self.reason is None and key in self._seen and key not in self._replays:
            self._capture(key, step)
        replay = self._replays.pop(key, None)
        if replay is None:
            self._seen.pop(key, None)
            self._seen[key] = None
            if len(self._seen) > _MAX_SEEN:
                del self._seen[next(iter(self._seen))]
            step()
            return
        self._replays[key] = replay
        if self._weight_stream is None:
            replay()
            return
        self._weight_stream.rest()
        try:
            replay()
        finally:  # also after Ctrl-C
            self._weight_stream.replayed()

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        replay, failure = self._try(step)
        if failure is not None and self._ops.dependent and self._ops.backend.arch >= _DEPENDENT_ARCH:
            self._ops.dependent = False
            replay, second = self._try(step)
            if second is None:
                self.note, failure = f"without dependent launches (a capture with them failed: {failure})", None
                logger.warning("decode steps are replayed %s", self.note)
            else:
                self._ops.dependent = True  # launched one by one, they have worked
                failure = f"{failure}; without dependent launches: {second}"
        if failure is not None:
            self.reason = f"a graph could not be captured ({failure})"
            logger.warning("decode steps are launched one by one: %s", self.reason)
        elif replay is None:
            self.reason = "this device has no graphs"
        else:
            if len(self._replays) >= MAX_GRAPHS:
                del self._replays[next(iter(self._replays))]
            self._replays[key] = replay

    def _try(self, step: Callable[[], None]) -> tuple[Callable[[], None] | None, str | None]:
        """The graph, if the backend has any; or why it could not be captured."""
        weights = self._weight_stream

        def run() -> None:
            step()
            if weights is not None:
                weights.join()

        if weights is not None:
            weights.rest()
            weights.settle()
        try:
            replay = self._ops.capture(run)
            if weights is not None:
                weights.captured()
            return replay, None
        except BaseException as error:
            if weights is not None:
                weights.abandon()
            # Ending a broken capture fails as well, and that error hides the first one.
            for earlier in chain_of(error):
                if not isinstance(earlier, Exception):  # Ctrl-C
                    raise earlier from None
            if not isinstance(error, KernelError | RuntimeError):
                raise
            return None, with_causes(error)
