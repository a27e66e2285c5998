"""The machine that reads an answer: text, reasoning, calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from exl.parse.calls import Calls
from exl.parse.formats import tags_of
from exl.parse.harmony import START, read_harmony
from exl.parse.harmony import TAGS as HARMONY_TAGS
from exl.parse.lexer import Lexer, own_tokens
from exl.parse.output import Output
from exl.parse.parts import Part
from exl.parse.reader import END, Malformed, Reader, Wait
from exl.parse.reasoning import Thinking
from exl.parse.syntaxes import Syntax
from exl.parse.tools import Tools
from exl.text.tokenizer import Tokenizer


class Parser:
    """An ``AnswerParser``: drives a machine over the tokens of one answer. Not thread-safe."""

    def __init__(self, lexer: Lexer, calls: Calls, machine: Wait[None]) -> None:
        self._lexer, self._calls, self._machine = lexer, calls, machine
        self._finished = False

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        """What these tokens make certain. Nothing comes behind a stop string."""
        if self._finished:
            return []
        self._calls.reader.feed(self._lexer.push(token_ids))
        next(self._machine, None)
        return self._calls.output.take()

    def finish(self) -> list[Part]:
        """The rest. A call that is not whole gets no ``ToolCallEnd``."""
        if self._finished:
            return []
        self._finished = True
        self._calls.reader.feed(self._lexer.finish())
        self._calls.reader.close()
        next(self._machine, None)
        return self._calls.output.take()

    @property
    def is_whole(self) -> bool:
        """False: a call has begun that did not become whole."""
        return not self._calls.output.in_call and not self._calls.output.num_unended


def tagged_parser(
    tokenizer: Tokenizer,
    syntax: Syntax | None,
    thinking: Thinking | None,
    *,
    tools: Tools,
    prompt_ids: Sequence[int],
    stop: Sequence[str] | str,
) -> Parser:
    """A parser of text in which tags mark reasoning and calls."""
    tags = tags_of(syntax, thinking)
    calls = _calls(tokenizer, tags, tools)
    begun = thinking is not None and thinking.begun_by(prompt_ids, tokenizer)
    machine = _Tagged(calls, syntax, thinking).read(begun)
    return Parser(Lexer(tokenizer, tags, prompt_ids, stop), calls, machine)


def harmony_parser(
    tokenizer: Tokenizer,
    *,
    takes_calls: bool,
    splits_reasoning: bool,
    tools: Tools,
    prompt_ids: Sequence[int],
    stop: Sequence[str] | str,
) -> Parser:
    """A parser of harmony's messages. What the prompt has of the last one is read first, and its parts are dropped."""
    calls = _calls(tokenizer, HARMONY_TAGS, tools)
    machine = read_harmony(calls, takes_calls, splits_reasoning)
    parser = Parser(Lexer(tokenizer, HARMONY_TAGS, prompt_ids, stop), calls, machine)
    start_id = tokenizer.added_ids.get(START)
    at = next((at for at in reversed(range(len(prompt_ids))) if prompt_ids[at] == start_id), len(prompt_ids))
    before = Lexer(tokenizer, HARMONY_TAGS, prompt_ids[:at])
    calls.reader.feed(before.push(prompt_ids[at:]))
    parser.push(())
    return parser


def _calls(tokenizer: Tokenizer, tags: Collection[str], tools: Tools) -> Calls:
    own = own_tokens(tokenizer, tags)
    special = frozenset(tag for token_id, tag in own.items() if token_id in tokenizer.special_ids)
    return Calls(Reader(), Output(), tools, frozenset(own.values()), special)


class _Tagged:
    """Text, in which tags begin and end everything else.

    White space behind a tag is part of it, and so is white space before the first one of an answer. A reasoning tag
    that is no token of its own counts only at the beginning of an answer and behind another tag.
    """

    def __init__(self, calls: Calls, syntax: Syntax | None, thinking: Thinking | None) -> None:
        self._calls, self._syntax, self._thinking = calls, syntax, thinking
        opens = () if syntax is None else syntax.opens
        reasons = () if thinking is None else (thinking.open,)
        self._first = calls.tags(*opens, *reasons)
        self._anywhere = calls.tags(*opens, *(tag for tag in reasons if tag in calls.own))
        self._closes = calls.tags(*(() if syntax is None else syntax.closes))
        self._recovery = calls.tags(*self._closes.names, *opens)
        self._bare = "" if syntax is None else syntax.bare

    def read(self, begun: bool) -> Wait[None]:
        reader, output = self._calls.reader, self._calls.output
        behind_tag = begun and (yield from self._read_reasoning())  # where the reader is
        while True:
            found: str | None = None
            is_text = True
            if behind_tag or self._first.names or self._bare:
                space = yield from reader.space()
                found = yield from reader.accept(self._first)
                if found is None and self._bare and (yield from reader.next()) in tuple(self._bare):
                    is_text = not (yield from self._read_calls(None, "" if behind_tag else space))
                elif found is not None:
                    is_text = not (yield from self._read_tag(found))
                elif not behind_tag:
                    output.text(space)
            while is_text:
                if (found := (yield from reader.scan(self._anywhere, output.text))) is None:
                    return
                is_text = not (yield from self._read_tag(found))
            behind_tag = True

    def _read_tag(self, tag: str) -> Wait[bool]:
        """What begins with a tag. False if it is text after all."""
        if self._thinking is not None and tag == self._thinking.open:
            return (yield from self._read_reasoning())
        return (yield from self._read_calls(tag, ""))

    def _read_reasoning(self) -> Wait[bool]:
        reader, thinking = self._calls.reader, self._thinking
        assert thinking is not None
        close = self._calls.tags(thinking.close)
        if thinking.label:
            yield from reader.accept(self._calls.tags(thinking.label))
        yield from reader.space()
        yield from reader.scan(close, self._calls.output.reasoning)
        return True

    def _read_calls(self, opened: str | None, before: str) -> Wait[bool]:
        """Calls behind a tag, or without one. False if they are text, which then is ``before`` and what was taken."""
        reader, output = self._calls.reader, self._calls.output
        assert self._syntax is not None
        while True:
            reader.taken = [before, "" if opened is None or opened in self._calls.special else opened]
            before = ""
            try:
                yield from self._syntax.read(self._calls, opened)
                break
            except Malformed:
                left = "".join(reader.taken)
            finally:
                reader.taken = None
            if not output.in_call:
                output.text(left)
                if opened is not None and (yield from reader.next()) is END:
                    output.num_unended += 1
                return False
            output.arguments(left)
            opened = yield from reader.scan(self._recovery, output.arguments)
            output.give_up()
            if opened not in self._syntax.opens:
                break
        while (yield from self._calls.close(self._closes)) is not None:
            pass
        return True
