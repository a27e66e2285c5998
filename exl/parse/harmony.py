"""The harmony format of gpt-oss: messages, each with a channel (openai/harmony, docs/format.md).

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>``, and calls as
``<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>``. The recipient may
also stand behind the channel. ``analysis`` is reasoning, what is sent to a function is a call, the rest is text.
"""

from __future__ import annotations

import re

from exl.parse.calls import MAX_NAME, Calls
from exl.parse.json_calls import copy_arguments
from exl.parse.reader import Malformed, Wait

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
TAGS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

_FUNCTIONS = "functions."
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


def read_harmony(calls: Calls, takes_calls: bool, splits_reasoning: bool) -> Wait[None]:
    """A whole answer, from the header that the prompt ends in: ``<|start|>assistant``. ``takes_calls``: without it,
    what is sent to functions is text. ``splits_reasoning``: without it, reasoning is text."""
    reader, output = calls.reader, calls.output
    begins = calls.tags(START, CHANNEL)
    found = yield from reader.accept(begins)
    while True:
        while found not in begins.names:  # text outside of messages, which the format does not have
            if (found := (yield from reader.scan(begins, output.text))) is None:
                return
        reader.taken = []
        try:
            header = yield from _read_header(calls, "" if found == START else CHANNEL)
        except Malformed:
            output.text("".join(reader.taken).removeprefix("assistant"))
            found = ""
            continue
        finally:
            reader.taken = None
        found = yield from _read_message(calls, header, takes_calls, splits_reasoning)


def _read_header(calls: Calls, header: str) -> Wait[str]:
    """All up to ``<|message|>``. Raises ``Malformed`` if it gets too long or does not end."""

    def add(text: str) -> None:
        nonlocal header
        header += text
        if len(header) > MAX_NAME:
            raise Malformed

    tags = calls.tags(CHANNEL, CONSTRAIN, MESSAGE)
    while (found := (yield from calls.reader.scan(tags, add))) != MESSAGE:
        if found is None:
            raise Malformed
        add(found)
    return header


def _read_message(calls: Calls, header: str, takes_calls: bool, splits_reasoning: bool) -> Wait[str | None]:
    """What stands in a message; returns the tag that ends it."""
    reader, output = calls.reader, calls.output
    ends = calls.tags(START, CHANNEL, *ENDS)
    channel = match[1] if (match := _CHANNEL.search(header)) else ""
    recipient = match[1] if (match := _RECIPIENT.search(header)) else ""
    is_call = recipient.startswith(_FUNCTIONS) or recipient in calls.tools
    if not (is_call and takes_calls):
        is_reasoning = splits_reasoning and channel == "analysis"
        return (yield from reader.scan(ends, output.reasoning if is_reasoning else output.text))
    reader.taken = []
    try:
        calls.begin(recipient.removeprefix(_FUNCTIONS))
        yield from copy_arguments(calls)
        yield from reader.space()
    except Malformed:
        if not output.in_call:
            return (yield from reader.scan(ends, output.text))
        output.arguments("".join(reader.taken))
        found = yield from reader.scan(ends, output.arguments)
        output.give_up()
        return found
    finally:
        reader.taken = None
    return (yield from reader.scan(ends, output.text))
