"""Which format a model's answers have: by its template, its vocabulary, or by name."""

from __future__ import annotations

import pytest

from exl.errors import ConfigError
from exl.parse.choose import (
    REASONING_FORMAT_NAMES,
    TOOL_FORMAT_NAMES,
    AnswerFormat,
    choose,
    choose_for,
    parser_for,
)
from exl.parse.formats import REASONING_FORMATS, REASONING_RULES, TOOL_FORMATS, TOOL_RULES
from exl.parse.parts import Reasoning, Text, ToolCallBegin
from exl.text.chat_template import ChatTemplate
from exl.text.tokenizer import Tokenizer
from tests.unit.parse.vocabularies import byte_level, ids_of, stories, tokenizer
from tests.unit.text.chat_templates import CHATML, DEEPSEEK_R1, LLAMA_3, MISTRAL, QWEN_3, QWEN_25

# What decides in the templates of the models named, as they write it.
TEMPLATES = {
    "qwen 2.5": (QWEN_25, "hermes", "none"),
    "qwen 3, without its tools": (QWEN_3, "json", "think"),
    "qwen 3": (QWEN_3 + "{{ '<tool_call>\n{\"name\": ' }}", "hermes", "think"),
    "deepseek r1": (DEEPSEEK_R1, "deepseek", "think"),
    "mistral 2024": (MISTRAL, "mistral", "none"),
    "no tools": (CHATML, "json", "none"),
    "llama 3": (LLAMA_3, "json", "none"),
    "qwen 3 coder": ("{{ '<tool_call>\n<function=' + t.name + '>\n' }}<parameter=", "qwen3_coder", "none"),
    "glm": ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{{ '\n<think></think>' }}", "glm", "think"),
    "seed": ("{%- set t = '<seed:tool_call>' -%}<function=a>{{ '<seed:think>' }}", "seed", "seed"),
    "minimax": ("{% set t = '<minimax:tool_call>' %}<invoke name=\"{{ '<think>' }}", "minimax", "think"),
    "deepseek v3.1": (
        "{{'<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>' + t }}{{ '</think>' }}",
        "deepseek",
        "think",
    ),
    "deepseek v3.2": ("{% set d = '\uff5cDSML\uff5c' %}<{{ d }}invoke name=\"{{ '<think>' }}", "deepseek_v32", "think"),
    "kimi": ("<|tool_calls_section_begin|><|tool_call_begin|>{{ i }}<think></think>", "kimi", "think"),
    "llama 3.1": ("{{ '<|python_tag|>' + t.name + '.call(' }}", "llama3_json", "none"),
    "llama 3.2": ("{{ 'Environment: ipython\n' }}", "llama3_json", "none"),
    "llama 4": ("{{ '<|python_start|>' }}[func_name1(params_name1=", "llama_pythonic", "none"),
    "ministral": ("{{ '[TOOL_CALLS]' + t.name + '[ARGS]' + a }}[THINK]", "mistral", "mistral"),
    "command": ("<|START_THINKING|>{{ r }}<|END_THINKING|><|START_ACTION|>[", "command", "command"),
    "gemma 3": ("{{ '<start_of_turn>' + role }}", "gemma", "none"),
    "functiongemma": ("<start_function_call>call:{{ n }}<start_of_turn>", "functiongemma", "none"),
    "gemma 4": ("{{ '<|tool_call>call:' + n }}{{ '<|channel>thought\n<channel|>' }}", "gemma4", "gemma4"),
    "gpt-oss": ("<|start|>assistant<|channel|>final<|message|>", "harmony", "harmony"),
    "granite": ("<|tool_call|>", "granite", "none"),
    "lfm 2": ("<|tool_call_start|>[", "lfm2", "none"),
    "olmo 3": ("<function_calls>", "olmo3", "none"),
    "nemotron": ("<TOOLCALL>[</TOOLCALL>{{ '<think>' }}", "nemotron", "think"),
    "apriel": ("within <tool_call></tool_call> tags: <tool_calls>[<thinking>", "tool_calls", "thinking"),
    "exaone deep": ("<thought>", "json", "thought"),
    "apertus": ("<|inner_prefix|>", "json", "apertus"),
    "kimi vl": ("\u25c1think\u25b7", "json", "kimi_vl"),
    "<reasoning>": ("<reasoning>", "json", "reasoning"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_it(name):
    template, tools, reasoning = TEMPLATES[name]
    expected = AnswerFormat(tools, reasoning)
    assert choose(template, stories()) == expected
    literal = ChatTemplate(template).literal_text
    assert choose(literal, stories()) == expected
    with_template = Tokenizer(byte_level(), chat_template=ChatTemplate(template))
    assert choose_for(with_template) == expected


def test_each_format_is_chosen_for_some_template():
    assert {tools for _, tools, _ in TEMPLATES.values()} == {*TOOL_FORMATS, "harmony"}
    assert {reasoning for _, _, reasoning in TEMPLATES.values()} == {*REASONING_FORMATS, "harmony", "none"}
    assert {rule.name for rule in TOOL_RULES} <= {*TOOL_FORMATS, "harmony"}
    assert {rule.name for rule in REASONING_RULES} == {*REASONING_FORMATS, "harmony"}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (("<tool_call>", "</tool_call>"), AnswerFormat("hermes", "none")),
        (("<tool_call>", "<think>", "</think>"), AnswerFormat("hermes", "think")),
        (("[TOOL_CALLS]", "[THINK]"), AnswerFormat("mistral", "mistral")),
        (("<|python_tag|>",), AnswerFormat("llama3_json", "none")),
        (("<|channel|>", "<|message|>"), AnswerFormat("harmony", "harmony")),
        ((), AnswerFormat("json", "none")),
    ],
)
@pytest.mark.parametrize("kind", ["special", "added"])
def test_the_vocabulary_says_it_where_the_template_does_not(kind, tags, expected):
    assert choose(None, tokenizer(kind, tags)) == expected
    assert choose(CHATML, tokenizer(kind, tags)) == expected
    assert choose(TEMPLATES["glm"][0], tokenizer(kind, tags)) == AnswerFormat("glm", "think")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATES["exaone deep"][0], AnswerFormat("json", "thought")),
        (QWEN_25, AnswerFormat("hermes", "none")),
        (TEMPLATES["qwen 3"][0], AnswerFormat("hermes", "think")),
    ],
)
def test_a_template_of_another_format_counts_more_than_harmonys_vocabulary(template, expected):
    assert choose(template, tokenizer("special", ("<|channel|>", "<|message|>"))) == expected


def test_a_broken_template_counts_as_none():
    broken = Tokenizer(byte_level(), chat_template=ChatTemplate("{% if <tool_call>"))
    assert choose_for(broken) == AnswerFormat("json", "none")


def test_a_name_decides():
    template = TEMPLATES["qwen 3"][0]
    assert choose(template, stories(), tool_format="mistral") == AnswerFormat("mistral", "think")
    assert choose(template, stories(), reasoning_format="none") == AnswerFormat("hermes", "none")
    assert choose(template, stories(), tool_format="none", reasoning_format="none") == AnswerFormat()
    harmony = TEMPLATES["gpt-oss"][0]
    assert choose(harmony, stories(), reasoning_format="none") == AnswerFormat("harmony", "none")
    assert choose(harmony, stories(), tool_format="hermes") == AnswerFormat("hermes", "none")
    assert choose(harmony, stories(), reasoning_format="think") == AnswerFormat("json", "think")
    assert choose(template, stories(), tool_format="harmony") == AnswerFormat("harmony", "harmony")
    assert choose(template, stories(), reasoning_format="harmony") == AnswerFormat("harmony", "harmony")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tool_format": "qwen"}, ("auto", *TOOL_FORMAT_NAMES)),
        ({"reasoning_format": "qwen"}, ("auto", *REASONING_FORMAT_NAMES)),
    ],
)
def test_a_wrong_name_lists_the_right_ones(options, names):
    with pytest.raises(ConfigError) as raised:
        choose(None, stories(), **options)
    assert str(raised.value).endswith(f"format: found 'qwen', expected one of {', '.join(names)}")


def test_formats_that_do_not_go_together_are_named():
    with pytest.raises(ConfigError, match="'hermes' and 'harmony', expected 'harmony' for both"):
        choose(None, stories(), tool_format="hermes", reasoning_format="harmony")
    with pytest.raises(ConfigError, match="reasoning format: found 'x'"):
        AnswerFormat("hermes", "x")


def test_stop_strings_are_checked():
    with pytest.raises(ConfigError, match="stop"):
        parser_for(AnswerFormat(), stories(), stop=[""])


@pytest.mark.parametrize("kind", ["special", "added"])
def test_an_unfinished_turn_before_opens_nothing(kind):
    """Reasoning that an earlier turn has left open ended with that turn."""
    vocabulary = tokenizer(kind, ("<think>", "</think>"))
    prompt = ids_of(vocabulary, "assistant: <think>Hm<|eos|>user: so?\nassistant: ")
    form = AnswerFormat("none", "think")
    assert parser_for(form, vocabulary, prompt_ids=prompt).push(ids_of(vocabulary, "a")) == [Text("a")]
    prompt += ids_of(vocabulary, "<think>\n") + [vocabulary.encode("x", bos=False)[0]] * 100
    assert parser_for(form, vocabulary, prompt_ids=prompt).push(ids_of(vocabulary, "a")) == [Reasoning("a")]


def test_a_tool_of_any_shape_is_no_error():
    vocabulary = tokenizer("bytes")
    tools = [{"type": "function"}, {"function": "x"}, {"function": {"name": 1}}, {"name": "f", "parameters": [1]}]
    tools += [{"name": "g", "parameters": {"properties": {"a": 1, "b": {"type": 7}, "c": {"anyOf": [{}] * 3}}}}]
    text = "<tool_call><function=g><parameter=a>1</parameter><parameter=b>x</parameter></function></tool_call>"
    parser = parser_for(AnswerFormat("qwen3_coder", "none"), vocabulary, tools=tools)
    parts = [*parser.push(ids_of(vocabulary, text)), *parser.finish()]
    assert parts[0] == ToolCallBegin(0, "g")
    assert parts[1].text == '{"a": 1, "b": "x"}'
