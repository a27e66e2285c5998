"""Messages with tool calls reach templates in the form that they read."""

from __future__ import annotations

import json

import pytest

from exl.errors import ConfigError
from exl.parse.messages import MessageForms
from exl.text.chat_template import ChatTemplate
from tests.unit.text.chat_templates import CHATML, DEEPSEEK_R1, MISTRAL, QWEN_25

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 2}'}}
CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "x", "parameters": {"type": "object"}}}]

# Modelled on the templates of the models named: how they read calls and results.
_LOOP = "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content or '' }}"
_CALLS = "{% for t in m.tool_calls or [] %}"
GLM = _LOOP + _CALLS + "{{ t.function.name }}{% for k, v in t.function.arguments.items() %}<k>{{ k }}</k>" \
    "<v>{{ v | tojson if v is not string else v }}</v>{% endfor %}{% endfor %}{% endfor %}"  # fmt: skip
DEEPSEEK_V31 = (
    _LOOP + _CALLS + "{{ t['function']['name'] + '<sep>' + t['function']['arguments'] }}{% endfor %}{% endfor %}"
)
APRIEL = _LOOP + _CALLS + "{{ t.function.arguments | string }}{% endfor %}{% endfor %}"
MISTRAL_9 = (
    _LOOP + "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}" + _CALLS + "{% if t.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ t.id }}{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
KIMI = _LOOP + _CALLS + "<|tool_call_begin|>{{ t.id }}<|tool_call_argument_begin|>{{ t.function.arguments | tojson }}" \
    "{% endfor %}{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}{% endif %}{% endfor %}"  # fmt: skip
GEMMA_4 = _LOOP + _CALLS + "call:{{ t.function.name }}{% endfor %}{% for r in m.tool_responses or [] %}" \
    "response:{{ r.name }}{{ r.response }}{% endfor %}{% endfor %}"  # fmt: skip
HARMONY = "{% for m in messages %}{% if m.role == 'developer' %}# {{ m.content }}{% endif %}{% endfor %}"


def rendered(template: str, messages=CHAT) -> str:
    chat_template = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    fitted = MessageForms.of(chat_template).fit(messages)
    return chat_template.render(fitted, add_generation_prompt=False, tools=TOOLS)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN_25, '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}'),
        (DEEPSEEK_R1, '{"city": "Köln", "days": 2}'),
        (DEEPSEEK_V31, 'weather<sep>{"city": "Köln", "days": 2}'),
        (APRIEL, '{"city": "Köln", "days": 2}'),
        (GLM, "weather<k>city</k><v>Köln</v><k>days</k><v>2</v>"),
        (KIMI, 'functions.weather:0<|tool_call_argument_begin|>{"city": "Köln", "days": 2}'),
        (GEMMA_4, "call:weatherresponse:weatherRain."),
    ],
)
def test_arguments_are_what_a_template_writes(template, expected):
    assert expected in rendered(template)


def test_a_list_of_calls_with_arguments_as_objects():
    text = rendered(MISTRAL, [*CHAT[:1], {**CHAT[1], "tool_calls": [{**CALL, "id": "abcdefghi"}]}])
    calls = json.loads(text.partition("[TOOL_CALLS] ")[2].removesuffix("</s>"))
    assert calls[0]["function"]["arguments"] == {"city": "Köln", "days": 2}


def test_ids_that_a_template_refuses_are_replaced_alike_in_calls_and_results():
    forms = MessageForms.of(ChatTemplate(MISTRAL_9))
    assert forms.ids == "nine"
    two = [CHAT[0], {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]}]
    two += [{"role": "tool", "tool_call_id": "call_2", "content": "a"}, CHAT[2]]
    fitted = forms.fit(two)
    first, second = (call["id"] for call in fitted[1]["tool_calls"])
    assert first != second
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in (first, second))
    assert [message["tool_call_id"] for message in fitted[2:]] == [second, first]
    assert forms.fit(two) == fitted
    kept = forms.fit([CHAT[0], {"role": "assistant", "tool_calls": [{**CALL, "id": "abcDEF123"}]}])
    assert kept[1]["tool_calls"][0]["id"] == "abcDEF123"
    assert rendered(MISTRAL_9).count(forms.fit(CHAT)[1]["tool_calls"][0]["id"]) == 2


def test_kimis_ids_count_calls():
    fitted = MessageForms.of(ChatTemplate(KIMI)).fit([*CHAT, *CHAT[1:]])
    assert [m["tool_calls"][0]["id"] for m in fitted if "tool_calls" in m] == [
        "functions.weather:0",
        "functions.weather:1",
    ]
    assert [m["tool_call_id"] for m in fitted if m["role"] == "tool"] == ["functions.weather:0", "functions.weather:1"]


def test_a_result_gets_its_functions_name():
    fitted = MessageForms().fit(CHAT)
    assert fitted[2] == {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "Rain."}
    assert MessageForms().fit([{"role": "tool", "tool_call_id": "x", "content": "a"}])[0].get("name") is None
    assert MessageForms().fit([*CHAT[:2], {**CHAT[2], "name": "mine"}])[2]["name"] == "mine"


def test_the_messages_themselves_stay():
    before = json.dumps(CHAT)
    MessageForms(arguments_as_text=True, ids="kimi", tool_responses=True).fit(CHAT)
    assert json.dumps(CHAT) == before


def test_older_messages_with_functions():
    old = [
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "Rain."},
    ]
    called, result = MessageForms().fit(old)
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    assert "function_call" not in called
    assert result["role"] == "tool"
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]


def test_developers_are_the_system_where_no_template_knows_them():
    asked = [{"role": "developer", "content": "Be brief."}]
    assert MessageForms.of(ChatTemplate(CHATML)).fit(asked)[0]["role"] == "system"
    assert MessageForms.of(ChatTemplate(HARMONY)).fit(asked)[0]["role"] == "developer"


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert MessageForms().fit([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


def test_a_list_without_calls_is_no_list():
    assert MessageForms().fit([{"role": "assistant", "content": "a", "tool_calls": []}]) == [
        {"role": "assistant", "content": "a"}
    ]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("x", "messages[0].tool_calls: found str, expected a list"),
        ([1], "messages[0].tool_calls[0]: found no function with a name"),
        ([{"function": {"name": ""}}], "messages[0].tool_calls[0]: found no function with a name"),
        ([{"function": {"name": "f"}, "id": 1}], "messages[0].tool_calls[0].id: found 1"),
        ([{"function": {"name": "f", "arguments": "{a"}}], "messages[0].tool_calls[0].function.arguments: not JSON"),
        (
            [{"function": {"name": "f", "arguments": "[1]"}}],
            "arguments: found list, expected the text of a JSON object",
        ),
        ([{"function": {"name": "f", "arguments": "[" * 99999}}], "arguments: not JSON"),
    ],
)
def test_malformed_calls_are_named(calls, words):
    with pytest.raises(ConfigError) as raised:
        MessageForms().fit([{"role": "assistant", "tool_calls": calls}])
    assert words in str(raised.value)


def test_messages_that_are_none():
    with pytest.raises(ConfigError, match="messages: found str"):
        MessageForms().fit("x")
    with pytest.raises(ConfigError, match=r"messages\[0\]: found int"):
        MessageForms().fit([1])


def test_a_broken_template_is_not_this_modules_matter():
    assert MessageForms.of(ChatTemplate("{% if")) == MessageForms.of(None) == MessageForms()
