"""CUDA's rules for events around graph captures, emulated without a device.

Source: the CUDA runtime's reference of ``cudaStreamWaitEvent``, ``cudaEventQuery``, ``cudaStreamBeginCapture`` and
``cudaStreamEndCapture``. An event that was recorded during a capture is only an edge of that graph.
"""

from __future__ import annotations


class CudaError(RuntimeError):
    """An error of the CUDA runtime, as torch raises it."""


class Event:
    """A point in a stream. ``capture``: the capture during which it was recorded, or None."""

    def __init__(self, captures: Captures, capture: object | None) -> None:
        self._captures, self.capture = captures, capture

    def query(self) -> bool:
        self._captures.ask(self)
        return True

    def synchronize(self) -> None:
        self._captures.ask(self)


class Captures:
    """Two streams, "arithmetic" and "copies"; captures begin and end in "arithmetic"."""

    def __init__(self) -> None:
        self._current: object | None = None
        self._members: set[str] = set()  # streams that take part in the capture
        self._last_copy: Event | None = None  # the last copy in the present capture
        self._unjoined = False

    @property
    def active(self) -> bool:
        return self._current is not None

    def begin(self) -> None:
        self._current, self._members, self._last_copy, self._unjoined = object(), {"arithmetic"}, None, False

    def end(self) -> None:
        unjoined, self._current, self._members = self._unjoined, None, set()
        if unjoined:
            raise CudaError("cudaErrorStreamCaptureUnjoined: capturing stream has unjoined work")

    def capture_of(self, stream: str) -> object | None:
        return self._current if stream in self._members else None

    def record(self, stream: str) -> Event:
        return self.note(stream, Event(self, self.capture_of(stream)))

    def note(self, stream: str, event: Event) -> Event:
        """Registers an event that was made elsewhere, with its ``capture``."""
        if stream == "copies" and event.capture is not None:
            self._last_copy = event
        return event

    def work(self, stream: str) -> None:
        """Queues work on a stream."""
        if self.active and stream not in self._members:
            raise CudaError(f"{stream}: queued while a graph is captured, but no part of it: it happens now and once")
        if stream == "copies" and self.active:
            self._unjoined = True

    def wait(self, stream: str, event: Event) -> None:
        """Work queued on the stream after this call waits for the event."""
        if event.capture is None:
            if stream in self._members:
                raise CudaError("cudaErrorStreamCaptureIsolation: dependency created on uncaptured work")
            return
        if event.capture is not self._current:
            raise CudaError("cudaErrorInvalidValue: the event was recorded in a capture that has ended")
        self._members.add(stream)
        if stream == "arithmetic" and event is self._last_copy:
            self._unjoined = False

    def ask(self, event: Event) -> None:
        """The host queries the event or waits for it."""
        if event.capture is not None:
            raise CudaError("cudaErrorCapturedEvent: operation not permitted on an event last recorded in a capture")
        if self.active:
            raise CudaError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")
