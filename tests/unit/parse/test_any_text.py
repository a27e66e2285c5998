"""Whatever a model writes: nothing raises, nothing is lost, nothing waits without need, and work grows with length."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.parse.choose import AnswerFormat, parser_for
from exl.parse.formats import REASONING_FORMATS, TOOL_FORMATS
from exl.parse.parts import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from tests.unit.parse.streams import TOOLS, joined
from tests.unit.parse.vocabularies import REASONING_OF, ids_of, tags_of, vocabulary_of

FORMATS = [AnswerFormat(name, REASONING_OF.get(name, "think")) for name in TOOL_FORMATS]
FORMATS += [AnswerFormat("harmony", "harmony"), AnswerFormat("none", "think"), AnswerFormat()]


_WRITTEN = (
    *(
        "now",
        "get_weather",
        "f",
        "functions.f:0",
        "call:f",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        '"',
        "'",
        ":",
        ",",
        "=",
        "\\",
    ),
    *('{"name": "now", "arguments": ', '"parameters": {}', '{"a": 1}', "a=1", "city", "\n", " ", "a", "é", "1", "```"),
    *('">', "print(", "u00", "json", "analysis", "to=functions.f", "final", "thought\n", "<", "True", "\0", ";"),
)


@st.composite
def answers(draw, form: AnswerFormat) -> str:
    return "".join(draw(st.lists(st.sampled_from((*tags_of(form), *_WRITTEN)), max_size=14)))


def read(form, vocabulary, ids, cuts, tools=TOOLS):
    parser = parser_for(form, vocabulary, tools=tools)
    parts = [
        part for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True) for part in parser.push(ids[start:stop])
    ]
    return joined([*parts, *parser.finish()]), parser.is_whole


def check_calls(parts) -> tuple[int, int]:
    """Calls are numbered, their parts come together, and whole arguments are an object. How many began and ended."""
    begun = ended = 0
    for part in parts:
        if isinstance(part, ToolCallBegin):
            assert part.index == begun
            assert part.name.strip() == part.name != ""
            begun, arguments = begun + 1, ""
        elif isinstance(part, ToolCallArguments):
            assert part.index == begun - 1
            arguments += part.text
        elif isinstance(part, ToolCallEnd):
            assert part.index == begun - 1
            assert isinstance(json.loads(arguments), dict)
            ended += 1
    return begun, ended


@pytest.mark.parametrize("kind", ["special", "added", "bytes"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tools + "-" + form.reasoning)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_answer_is_read_the_same_wherever_it_is_cut(form, kind, data):
    vocabulary = vocabulary_of(form, kind)
    ids = ids_of(vocabulary, data.draw(answers(form)))
    parts, whole = read(form, vocabulary, ids, [])
    assert (parts, whole) == read(form, vocabulary, ids, list(range(1, len(ids))))
    begun, ended = check_calls(parts)
    assert ended <= begun
    assert whole <= (begun == ended)


def bare(text: str, tags) -> str:
    """A text without tags and white space."""
    text = re.sub(r"\s", "", text)
    pattern = "|".join(re.escape(re.sub(r"\s", "", tag)) for tag in tags) or "(?!)"
    while text != (shorter := re.sub(pattern, "", text)):
        text = shorter
    return text


@pytest.mark.parametrize("kind", ["special", "added", "bytes"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tools + "-" + form.reasoning)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_no_call_is_text_or_reasoning_to_the_last_character(form, kind, data):
    """White space beside tags, and tags that begin and end reasoning, are all that may be missing."""
    if form.tools == "harmony":
        return  # its headers are no text: the corpus has them
    vocabulary = vocabulary_of(form, kind)
    answer = data.draw(answers(form))
    ids = ids_of(vocabulary, answer)
    parts, _ = read(form, vocabulary, ids, [])
    if any(isinstance(part, ToolCallBegin) for part in parts):
        return
    thinking = REASONING_FORMATS.get(form.reasoning)
    tags = (*thinking.tags, thinking.label or thinking.open) if thinking else ()
    assert all(isinstance(part, Text | Reasoning) for part in parts)
    assert bare("".join(part.text for part in parts), tags) == bare(vocabulary.decode(ids), tags)
    if form.reasoning == "none":
        assert "".join(part.text for part in parts) == vocabulary.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab <t/hink>{[`\n", max_size=30))
def test_nothing_waits_that_can_begin_no_tag(text):
    """After each character, what has not come out may begin a tag, or is white space at the answer's beginning."""
    form = AnswerFormat("hermes", "think")
    vocabulary = vocabulary_of(form, "bytes")
    tags = ("<think>", "<tool_call>")
    parser = parser_for(form, vocabulary, tools=TOOLS)
    given_out = ""
    for count, token_id in enumerate(ids_of(vocabulary, text), 1):
        for part in parser.push([token_id]):
            if not isinstance(part, Text):
                return
            given_out += part.text
        waits = text[len(given_out) : count]
        tag = waits.lstrip() if not given_out else waits
        if tag and any(tag.startswith(t) for t in tags):
            return
        assert tag == "" or any(t.startswith(tag) for t in tags), (given_out, waits)
        assert text.startswith(given_out)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.tools != "harmony"], ids=lambda form: form.tools)
def test_a_plain_answer_comes_out_token_by_token(form):
    vocabulary = vocabulary_of(form, "special")
    parser = parser_for(form, vocabulary, tools=TOOLS)
    for char in "Plain answer, with 1 (or 2) tags: a > b; [x], {y} \n":
        assert parser.push(ids_of(vocabulary, char)) == [Text(char)]


LONG = {
    "prose": ("hermes", "some words < and <tool "),
    "beginnings": ("hermes", '<tool_call>{"name": "f'),
    "a long string": ("hermes", ""),
    "failing calls": ("mistral", "[TOOL_CALLS]f[ARGS]x"),
    "brackets": ("json", "[{"),
    "python": ("llama_pythonic", "[now(), "),
    "xml": ("qwen3_coder", "<tool_call><function=f><parameter=a>\n"),
    "braces": ("gemma4", '<|tool_call>call:f{a:<|"|>'),
    "glm": ("glm", "<tool_call>f\n<arg_key>a</arg_key><arg_value>"),
}


def num_calls(form, vocabulary, ids, step) -> int:
    """How many functions are called to read an answer: the same every time, unlike the time it takes."""
    parser = parser_for(form, vocabulary, tools=TOOLS)
    count = 0

    def counted(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        for start in range(0, len(ids), step):
            parser.push(ids[start : start + step])
        parser.finish()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_work_grows_with_the_length(name, step):
    tools, piece = LONG[name]
    form = AnswerFormat(tools, "think")
    vocabulary = vocabulary_of(form, "bytes")
    texts = [
        piece * n if piece else '<tool_call>{"name": "f", "arguments": {"a": "' + "x\n" * 20 * n for n in (40, 160)
    ]
    short, long = (num_calls(form, vocabulary, ids_of(vocabulary, text), step) for text in texts)
    assert long < 4.4 * short
