"""An answer whose text is constrained: JSON of a schema, behind reasoning, or calls instead of it."""

from __future__ import annotations

import json

import jsonschema
import pytest

from exl.errors import ConfigError
from exl.parse.choose import AnswerFormat, parser_for
from exl.parse.constrain import constrain_text
from exl.parse.parts import Reasoning, Text, ToolCallBegin
from tests.unit.parse.test_constrain import FORMATS, NOW, TOOLS, check, draw, format_of, grammars_of

SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
    "required": ["place", "far"],
    "additionalProperties": False,
}


def texts(form, tokenizer, ids, tools=()):
    parser = parser_for(form, tokenizer, tools=tools)
    parts = [*parser.push(ids), *parser.finish()]
    joined = {kind: "".join(part.text for part in parts if isinstance(part, kind)) for kind in (Text, Reasoning)}
    return joined[Text], joined[Reasoning], any(isinstance(part, ToolCallBegin) for part in parts)


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("tools", FORMATS)
def test_the_text_follows_the_schema_and_calls_follow_theirs(tools, with_tools):
    form = format_of(tools, thinks=True)
    tokenizer, grammars = grammars_of(form, "special")
    given = TOOLS if with_tools else []
    grammar = constrain_text(form, tokenizer, SCHEMA, tools=given)["grammar"]
    num_texts = num_calls = num_thoughts = 0
    for seed in range(16):
        ids, ended = draw(grammars, grammar, seed)
        text, thought, calls = texts(form, tokenizer, ids, given)
        num_thoughts += bool(thought)
        if calls:
            assert with_tools
            num_calls += check(form, tokenizer, ids, ended, required=False)
        elif ended:
            jsonschema.validate(json.loads(text), SCHEMA)
            num_texts += 1
    assert num_texts
    assert num_thoughts
    assert bool(num_calls) == with_tools


class AsPydantic:
    @staticmethod
    def model_json_schema():
        return NOW


def test_without_reasoning_and_tools_it_is_the_schema_itself():
    form = AnswerFormat("hermes", "none")
    tokenizer, _ = grammars_of(form, "added")
    assert constrain_text(form, tokenizer, SCHEMA) == {"json_schema": SCHEMA}
    assert constrain_text(form, tokenizer, True) == {"json_schema": True}
    form = format_of("hermes", thinks=True)
    tokenizer, _ = grammars_of(form, "added")
    same = [constrain_text(form, tokenizer, schema) for schema in (True, "object", {"type": "object"})]
    assert same[0] == same[1] == same[2]
    assert constrain_text(form, tokenizer, json.dumps(NOW)) == constrain_text(form, tokenizer, NOW)
    assert constrain_text(form, tokenizer, AsPydantic) == constrain_text(form, tokenizer, NOW)
    for wrong in ("{", "[]", 5):
        with pytest.raises(ConfigError, match=r"json_schema: .*expected a JSON schema as a dictionary"):
            constrain_text(form, tokenizer, wrong)


def test_reasoning_that_the_prompt_has_opened_comes_first():
    form = format_of("hermes", thinks=True)
    tokenizer, grammars = grammars_of(form, "special")
    opened = [tokenizer.added_ids["<think>"]]
    grammar = constrain_text(form, tokenizer, SCHEMA, prompt_ids=opened)["grammar"]
    close = tokenizer.added_ids["</think>"]
    for seed in range(5):
        ids, ended = draw(grammars, grammar, seed)
        assert close in ids or not ended
        if ended:
            jsonschema.validate(json.loads(tokenizer.decode(ids[ids.index(close) + 1 :])), SCHEMA)
