"""Calls that are constrained follow their schemas, whatever the model says: random draws, and a real model's."""

from __future__ import annotations

import json
import random
from functools import cache

import jsonschema
import numpy as np
import pytest

import exl
from exl.engine.constraints import Constraint, Grammars
from exl.errors import ConfigError
from exl.parse.choose import TOOL_FORMAT_NAMES, AnswerFormat, parser_for
from exl.parse.constrain import constrain
from exl.parse.parts import Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.text.tokenizer import Tokenizer
from tests.unit.parse.vocabularies import REASONING_OF, vocabulary_of

pytest.importorskip("llguidance")
BOOK = {
    "type": "object",
    "properties": {
        "seats": {"type": "integer", "minimum": 1, "maximum": 9},
        "class": {"enum": ["first", "second"]},
        "window": {"type": "boolean"},
        "note": {"type": "string"},
        "stops": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["seats", "class"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "book", "strict": True, "parameters": BOOK}},
    {"type": "function", "function": {"name": "now", "strict": True, "parameters": NOW}},
]
SCHEMAS = {"book": BOOK, "now": NOW}
FORMATS = [name for name in TOOL_FORMAT_NAMES if name != "none"]
_CLOSERS = (b'"', b"}", b"]", b")", b"<", b"|", b">", b"/", b"`", b"\n")


def format_of(tools: str, thinks: bool) -> AnswerFormat:
    if tools == "harmony":
        return AnswerFormat("harmony", "harmony")
    return AnswerFormat(tools, REASONING_OF.get(tools, "think") if thinks else "none")


@cache
def grammars_of(form: AnswerFormat, kind: str) -> tuple[Tokenizer, Grammars]:
    tokenizer = vocabulary_of(form, kind)
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def draw(grammars: Grammars, grammar: str, seed: int, most: int = 500) -> tuple[list[int], bool]:
    """Random tokens among those allowed, soon mostly such as bring the text to its end; and whether it has ended."""
    matcher = grammars.matcher(Constraint.of(grammar=grammar))
    seeded = random.Random(seed)
    words = np.zeros(-(-grammars.vocab_size // 32), np.uint32)
    ids: list[int] = []
    while len(ids) < most and not matcher.is_finished:
        assert matcher.mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: grammars.vocab_size]
        choices = np.flatnonzero(bits).tolist()
        closers = [i for i in choices if i in grammars.eos_ids or i > 256 or grammars.token_bytes[i] in _CLOSERS]
        chosen = seeded.choice(closers if closers and seeded.random() < 0.5 + len(ids) / 200 else choices)
        if chosen in grammars.eos_ids:
            return ids, True
        matcher.consume(chosen)
        ids.append(chosen)
    return ids, matcher.is_finished


def check(
    form: AnswerFormat, tokenizer: Tokenizer, ids, ended: bool, required: bool, schemas=SCHEMAS, tools=TOOLS
) -> int:
    """All calls that are whole follow their schemas, and with an answer that ended all are. Returns how many."""
    parser = parser_for(form, tokenizer, tools=tools)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    num_whole = 0
    parts = [*parser.push(ids), *parser.finish()]
    for part in parts:
        if isinstance(part, ToolCallBegin):
            names[part.index], arguments[part.index] = part.name, ""
        elif isinstance(part, ToolCallArguments):
            arguments[part.index] += part.text
        elif isinstance(part, ToolCallEnd):
            jsonschema.validate(json.loads(arguments[part.index]), schemas[names[part.index]])
            num_whole += 1
    assert names.keys() <= arguments.keys()
    assert set(names.values()) <= schemas.keys()
    if ended:
        assert parser.is_whole
        assert num_whole == len(names)
        if required:
            assert num_whole
            assert not any(isinstance(part, Text) and part.text.strip() for part in parts)
    return num_whole


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("kind", ["special", "added"])
@pytest.mark.parametrize("tools", FORMATS)
def test_random_draws_give_calls_that_follow_their_schemas(tools, kind, choice, thinks):
    if tools == "harmony" and not thinks:
        return
    form = format_of(tools, thinks)
    tokenizer, grammars = grammars_of(form, kind)
    grammar = constrain(form, tokenizer, TOOLS, tool_choice=choice)["grammar"]
    num_calls = num_ended = 0
    for seed in range(4):
        ids, ended = draw(grammars, grammar, seed)
        num_calls += check(form, tokenizer, ids, ended, choice == "required")
        num_ended += ended
    assert num_ended
    assert num_calls or choice == "auto"


@pytest.mark.parametrize("tools", [name for name in FORMATS if name not in ("deepseek", "harmony")])
@pytest.mark.sample(3)
def test_a_real_models_calls_follow_their_schemas(llm, tools):
    """The bundled model, at temperature 1.5; its vocabulary has no tags, so they are text. Twenty seeds."""
    form = AnswerFormat(tools, "none")
    # Without lists and free text, which such a model does not bring to an end: it would have to spell a tag.
    properties = {key: value for key, value in BOOK["properties"].items() if key not in ("stops", "note")}
    tools = [{"type": "function", "function": {"name": "book", "parameters": {**BOOK, "properties": properties}}}]
    options = constrain(form, llm.tokenizer, tools, tool_choice="required", parallel=False)
    handles = [
        llm.submit("Once upon a time", max_tokens=300, temperature=1.5, seed=seed, **options) for seed in range(20)
    ]
    answers = [handle.result() for handle in handles]
    ended = [answer.finish_reason == "stop" for answer in answers]
    calls = [check(form, llm.tokenizer, a.token_ids, e, True) for a, e in zip(answers, ended, strict=True)]
    assert all(num == 1 for num, e in zip(calls, ended, strict=True) if e)
    assert sum(ended) >= 15


@pytest.fixture(scope="module")
def llm():
    with exl.load() as loaded:
        yield loaded


def test_a_real_model_thinks_first(llm):
    form = AnswerFormat("hermes", "think")
    prompt = llm.tokenizer.encode("Tom was sad.<think>")
    options = constrain(form, llm.tokenizer, TOOLS, tool_choice="required", prompt_ids=prompt)
    assert "[lazy]" in options["grammar"]
    answer = llm.generate(prompt, 40, seed=1, temperature=1.0, **options)
    parser = parser_for(form, llm.tokenizer, tools=TOOLS, prompt_ids=prompt)
    parts = [*parser.push(answer.token_ids), *parser.finish()]
    assert "".join(part.text for part in parts if not isinstance(part, ToolCallBegin | ToolCallEnd)).strip()
    assert not any(isinstance(part, Text) for part in parts)


def test_a_named_function_is_the_one_that_is_called():
    form = format_of("hermes", False)
    tokenizer, grammars = grammars_of(form, "added")
    choice = {"type": "function", "function": {"name": "now"}}
    grammar = constrain(form, tokenizer, TOOLS, tool_choice=choice, parallel=False)["grammar"]
    ids, ended = draw(grammars, grammar, 0)
    assert ended
    assert check(form, tokenizer, ids, ended, True, {"now": NOW}) == 1
    assert tokenizer.decode(ids).startswith('<tool_call>\n{"name": "now", "arguments": {')


@pytest.mark.parametrize("tools", FORMATS)
def test_without_parallel_there_is_one_call(tools):
    form = format_of(tools, tools == "harmony")
    tokenizer, grammars = grammars_of(form, "special")
    grammar = constrain(form, tokenizer, TOOLS, tool_choice="required", parallel=False)["grammar"]
    for seed in range(3):
        ids, ended = draw(grammars, grammar, seed)
        num_calls = check(form, tokenizer, ids, ended, True)
        assert num_calls == 1 or not ended


def test_where_no_function_is_strict_nothing_is_constrained():
    form = format_of("hermes", True)
    tokenizer, _ = grammars_of(form, "added")
    loose = [{"type": "function", "function": {"name": "now"}}]
    assert constrain(form, tokenizer, loose) == constrain(form, tokenizer, TOOLS, tool_choice="none") == {}
    assert constrain(form, tokenizer, [*loose, TOOLS[0]]).keys() == {"grammar"}
    assert constrain(form, tokenizer, loose, parallel=False).keys() == {"grammar"}
    assert constrain(AnswerFormat(), tokenizer, TOOLS) == constrain(form, tokenizer, [], parallel=False) == {}


def test_a_schema_may_refer_to_its_own_definitions():
    schema = {
        "type": "object",
        "properties": {"way": {"$ref": "#/$defs/way"}},
        "required": ["way"],
        "$defs": {"way": {"enum": ["north", "south"]}},
    }
    tools = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
    form = format_of("hermes", False)
    tokenizer, grammars = grammars_of(form, "added")
    grammar = constrain(form, tokenizer, tools, tool_choice="required", parallel=False)["grammar"]
    for seed in range(3):
        ids, ended = draw(grammars, grammar, seed)
        assert check(form, tokenizer, ids, ended, True, {"go": schema}) == 1


@pytest.mark.parametrize("tools", ["qwen3_coder", "glm", "deepseek_v32", "minimax"])
def test_values_that_a_schema_refers_to_are_constrained(tools):
    schema = {
        "type": "object",
        "properties": {
            "way": {"$ref": "#/$defs/way"},
            "by": {"$ref": "#/$defs/by"},
            "name": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["way", "by", "name"],
        "$defs": {
            "way": {"enum": ["north", "1"]},
            "by": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
    declared = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
    form = format_of(tools, False)
    tokenizer, grammars = grammars_of(form, "special")
    grammar = constrain(form, tokenizer, declared, tool_choice="required", parallel=False)["grammar"]
    for seed in range(4):
        ids, ended = draw(grammars, grammar, seed)
        num = check(form, tokenizer, ids, ended, True, {"go": schema}, declared)
        assert num == ended


def tool(**properties):
    return [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]


@pytest.mark.parametrize(
    ("tools", "properties", "words"),
    [
        ("llama_pythonic", {"a": {"type": "object"}}, "f.a: found an object"),
        ("llama_pythonic", {"a": {"type": "string", "pattern": "x"}}, "f.a: found 'pattern'"),
        ("llama_pythonic", {"a": {"$ref": "#/x"}}, "f.a: found '$ref'"),
        ("llama_pythonic", {"a-b": {"type": "string"}}, "found a parameter 'a-b'"),
        ("llama_pythonic", {"a": {"type": "array"}}, "without a schema for its items"),
        ("qwen3_coder", {"a": {"type": "string", "maxLength": 3}}, "f.a: found 'maxLength'"),
        ("qwen3_coder", {"a": {}}, "f.a: found no 'type'"),
        ("qwen3_coder", {"a": {"type": ["string", "integer"]}}, "f.a: found the types"),
        ("qwen3_coder", {"a>": {"type": "string"}}, "found a parameter 'a>'"),
        ("glm", {"a": {"enum": ["x", 1]}}, "f.a: found the values"),
        ("glm", {"a": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]}}, "f.a: found 'format'"),
        ("gemma4", {"a": {"anyOf": [{"type": "string"}]}}, "f.a: found 'anyOf'"),
    ],
)
def test_what_a_format_has_no_grammar_for_is_refused_by_name(tools, properties, words):
    form = format_of(tools, False)
    tokenizer, _ = grammars_of(form, "special")
    with pytest.raises(ConfigError) as raised:
        constrain(form, tokenizer, tool(**properties), tool_choice="required")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("choice", "tools", "words"),
    [
        ("always", TOOLS, "tool_choice: found 'always', expected one of auto, none, required"),
        ({"type": "custom"}, TOOLS, "tool_choice: found {'type': 'custom'}"),
        ({"type": "function", "function": {"name": "fly"}}, TOOLS, "the function 'fly', expected one of book, now"),
        ("required", [], "without tools"),
        ("required", [{"type": "function"}], "tools[0]: found no function with a name"),
        ("required", [{"function": {"name": "f", "parameters": {"type": "array"}}}], "the schema of an object"),
        ("required", [{"function": {"name": "a b"}}], "tools[0]: found the name 'a b'"),
        ("required", [{"function": {"name": "f", "parameters": {"default": float("nan")}}}], "that are JSON"),
    ],
)
def test_malformed_choices_and_tools_are_named(choice, tools, words):
    form = format_of("hermes", False)
    tokenizer, _ = grammars_of(form, "added")
    with pytest.raises(ConfigError) as raised:
        constrain(form, tokenizer, tools, tool_choice=choice)
    assert words in str(raised.value)


def test_a_model_without_a_tool_format_cannot_be_made_to_call():
    tokenizer, _ = grammars_of(format_of("hermes", False), "added")
    with pytest.raises(ConfigError, match="--tool-format"):
        constrain(AnswerFormat(), tokenizer, TOOLS, tool_choice="required")
