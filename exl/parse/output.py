"""Collects the parts that a machine finds."""

from __future__ import annotations

from exl.parse.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd


class Output:
    """The parts since the last ``take``; neighbours of one kind are joined."""

    def __init__(self) -> None:
        self.in_call = False  # a call has begun and is not whole
        self.num_unended = 0  # calls that were given up
        self._num_calls = 0
        self._kind: type[Text] | type[Reasoning] | None = None  # of the last pieces; None: arguments
        self._pieces: list[str] = []
        self._parts: list[Part] = []

    def text(self, text: str) -> None:
        self._add(Text, text)

    def reasoning(self, text: str) -> None:
        self._add(Reasoning, text)

    def arguments(self, text: str) -> None:
        """More of the call that began last, whole or not."""
        self._add(None, text)

    def begin(self, name: str, call_id: str | None = None) -> None:
        self._flush()
        self._parts.append(ToolCallBegin(self._num_calls, name, call_id))
        self._num_calls += 1
        self.in_call = True

    def end(self) -> None:
        self._flush()
        self._parts.append(ToolCallEnd(self._num_calls - 1))
        self.in_call = False

    def give_up(self) -> None:
        """The call that has begun will not be whole."""
        self.num_unended += self.in_call
        self.in_call = False

    def take(self) -> list[Part]:
        self._flush()
        parts, self._parts = self._parts, []
        return parts

    def _add(self, kind: type[Text] | type[Reasoning] | None, text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        if not self._pieces:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        self._parts.append(ToolCallArguments(self._num_calls - 1, text) if self._kind is None else self._kind(text))
