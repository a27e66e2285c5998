"""Anthropic's protocol by Anthropic's own client. Prompts are held against transformers' templates, answers against the
same request to the engine without a server."""

from __future__ import annotations

import json

import pytest
import transformers

from exl.engine.request import Outcome
from exl.parse.parts import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.server.generation import Generation, Update
from tests.server.chat_models import TOOLS_ONLY, loader
from tests.server.running import RunningServer

anthropic = pytest.importorskip("anthropic")

HELLO = [{"role": "user", "content": "Tell me of a dog."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_FUNCTION = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": WEATHER["input_schema"],
    },
}


@pytest.fixture(scope="module")
def client(chatting):
    return anthropic.Anthropic(base_url=chatting.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def prompt(chatting):
    """Token ids by transformers: of messages, as OpenAI's API has them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatting.llm.folder)

    def ids(messages, thinks=False, **options):
        variables = {"enable_thinking": thinks, "add_generation_prompt": True, **options}
        return tokenizer.apply_chat_template(messages, **variables)["input_ids"]

    return ids


def ask(client, messages=HELLO, **options):
    """``sampling``: fields that the client has no arguments for (any more)."""
    sampling = {"seed": 5, **options.pop("sampling", {})}
    options = {"model": "chat", "max_tokens": 12, "extra_body": sampling, **options}
    return client.messages.create(messages=messages, **options)


# Answers


def test_an_answer_is_the_engines_own(client, chatting, prompt):
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    found = ask(client, system="Be brief.", sampling=sampling)
    ids = prompt([{"role": "system", "content": "Be brief."}, *HELLO])
    expected = chatting.llm.generate(ids, max_tokens=12, seed=5, **sampling)
    (block,) = found.content
    assert (block.type, block.text) == ("text", expected.text)
    assert (found.type, found.role, found.model) == ("message", "assistant", "chat")
    assert (found.stop_reason, found.stop_sequence) == ("max_tokens", None)
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(ids)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 12)
    again = ask(client, system="Be brief.", sampling=sampling)
    assert again.usage.cache_read_input_tokens > 0
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == len(ids)


def test_a_streams_events_come_in_anthropics_order(plain_chatting, chatting, prompt):
    body = {"model": "chat", "max_tokens": 12, "messages": HELLO, "seed": 5, "stream": True}
    response = plain_chatting.post("/v1/messages?beta=true", json=body, headers={"anthropic-version": "2023-06-01"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [lines.split("\n") for lines in response.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    data = [json.loads(text.removeprefix("data: ")) for _, text in events]
    assert [one["type"] for one in data] == names
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    ids = prompt(HELLO)
    assert data[0]["message"]["usage"]["input_tokens"] == len(ids)
    assert data[0]["message"]["content"] == []
    assert data[0]["message"]["stop_reason"] is None
    assert data[2] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    text = "".join(one["delta"]["text"] for one in data[3:-3])
    assert text == chatting.llm.generate(ids, max_tokens=12, seed=5).text
    assert data[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == 12


def test_the_clients_accumulator_makes_the_whole_answer_of_a_stream(client):
    whole = ask(client, sampling={"temperature": 0.7})
    options = {"model": "chat", "max_tokens": 12, "extra_body": {"seed": 5, "temperature": 0.7}}
    with client.messages.stream(messages=HELLO, **options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    total = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert total == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(client, chatting, prompt):
    found = ask(client, max_tokens=100, stop_sequences=["Lily", "."])
    expected = chatting.llm.generate(prompt(HELLO), max_tokens=100, stop=["Lily", "."])
    assert expected.stop_reason in ("Lily", ".")
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", expected.stop_reason)
    assert found.content[0].text == expected.text


def test_an_answer_that_ends_by_itself_is_a_turn(client, chatting, prompt):
    for seed in range(20):
        expected = chatting.llm.generate(prompt(HELLO), max_tokens=300, temperature=1.0, seed=seed)
        if expected.finish_reason == "stop":
            break
    found = ask(client, max_tokens=300, sampling={"temperature": 1.0, "seed": seed})
    assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)


def test_an_answer_ends_with_the_context(client, chatting):
    found = ask(client, max_tokens=5000, sampling={"ignore_eos": True})
    assert found.stop_reason == "model_context_window_exceeded"
    usage = found.usage
    total = usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens
    assert chatting.llm.context - 1 <= total <= chatting.llm.context


def test_no_tokens_fill_the_cache_alone(client):
    found = ask(client, max_tokens=0)
    assert (found.content, found.stop_reason, found.usage.output_tokens) == ([], "max_tokens", 0)


def test_the_last_assistants_message_is_gone_on_with(client, chatting, prompt):
    begun = [*HELLO, {"role": "assistant", "content": "Spot was a"}]
    ids = prompt(HELLO) + chatting.llm.encode("Spot was a")[1:]
    assert ask(client, begun).content[0].text == chatting.llm.generate(ids, max_tokens=12, seed=5).text
    assert client.messages.count_tokens(model="chat", messages=begun).input_tokens == len(ids)
    empty = [*HELLO, {"role": "assistant", "content": ""}]
    assert ask(client, empty).content[0].text == ask(client, HELLO).content[0].text


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """A server of a model that calls tools and does not think."""
    with RunningServer(loader(tmp_path_factory.mktemp("models") / "calling", TOOLS_ONLY), "chat") as server:
        yield server


@pytest.fixture(scope="module")
def caller(calling):
    return anthropic.Anthropic(base_url=calling.url, api_key="none", max_retries=0)


def test_a_schema_of_output_config_holds(caller):
    schema = {"enum": [{"name": "Spot"}, {"name": "Rex"}]}
    format = {"type": "json_schema", "schema": schema}
    found = ask(caller, max_tokens=60, output_config={"format": format})
    assert json.loads(found.content[0].text) in schema["enum"]
    assert found.stop_reason == "end_turn"


# Tools: grammars force the bundled model to call them, and its calls go the whole way that real ones go.


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_used_and_its_result_is_answered(caller, calling, choice):
    cities = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tool = {**WEATHER, "input_schema": {**cities, "additionalProperties": False}, "strict": True}
    options = {"tools": [tool], "tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 200}
    found = ask(caller, **options)
    (use,) = found.content
    assert (use.type, use.name, found.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert use.input["city"] in ("Rome", "Oslo")
    with caller.messages.stream(model="chat", messages=HELLO, extra_body={"seed": 5}, **options) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert json.loads("".join(pieces)) == use.input == streamed.content[0].input
    assert streamed.stop_reason == "tool_use"

    result = {"type": "tool_result", "tool_use_id": use.id, "content": "warm"}
    messages = [*HELLO, {"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    call = {"type": "function", "function": {"name": use.name, "arguments": use.input}}
    expected = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "warm"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(calling.llm.folder)
    ids = tokenizer.apply_chat_template(expected, add_generation_prompt=True)["input_ids"]
    answer = ask(caller, messages)
    assert answer.content[0].text == calling.llm.generate(ids, max_tokens=12, seed=5).text


def test_tools_that_are_not_used_leave_a_text(client):
    found = ask(client, tools=[WEATHER], tool_choice={"type": "auto"})
    assert [block.type for block in found.content] == ["text"]
    assert found.stop_reason == "max_tokens"


# Prompts

CONVERSATIONS = {
    "texts and blocks": (
        {"system": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        [
            {"role": "system", "content": "One.\nTwo."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    ),
    "tools and thinking": (
        {"tools": [WEATHER]},
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "warm"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no city", "is_error": True},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}},
                    {"type": "function", "function": {"name": "get_weather", "arguments": {}}},
                ],
            },
            {"role": "tool", "content": "warm"},
            {"role": "tool", "content": "Error: no city"},
            {"role": "user", "content": "And?"},
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_transformers(client, chatting, prompt, name):
    options, messages, expected = CONVERSATIONS[name]
    ids = prompt(expected, tools=[WEATHER_FUNCTION] if "tools" in options else None)
    found = ask(client, messages, **options)
    assert found.content[0].text == chatting.llm.generate(ids, max_tokens=12, seed=5).text
    counted = client.messages.count_tokens(model="chat", messages=messages, **options)
    assert counted.input_tokens == len(ids)


@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 2048}, {"type": "adaptive"}])
def test_thinking_is_asked_of_the_template(client, prompt, thinking):
    counted = client.messages.count_tokens(model="chat", messages=HELLO, thinking=thinking)
    assert counted.input_tokens == len(prompt(HELLO, thinks=True)) < len(prompt(HELLO))
    for other in ({"thinking": {"type": "disabled"}}, {}):
        assert client.messages.count_tokens(model="chat", messages=HELLO, **other).input_tokens == len(prompt(HELLO))


def test_no_tools_are_shown_with_tool_choice_none(client, prompt):
    options = {"model": "chat", "messages": HELLO, "tools": [WEATHER]}
    with_tools = client.messages.count_tokens(**options, tool_choice={"type": "auto"}).input_tokens
    assert with_tools == len(prompt(HELLO, tools=[WEATHER_FUNCTION]))
    assert client.messages.count_tokens(**options, tool_choice={"type": "none"}).input_tokens == len(prompt(HELLO))


# Blocks: the parts of an answer are given, since the bundled model tells stories.

_CALLS = [
    Reasoning("Let me "),
    Reasoning("see."),
    Text("I "),
    Text("look."),
    ToolCallBegin(0, "get_weather"),
    ToolCallArguments(0, '{"city": "R'),
    ToolCallArguments(0, 'ome"}'),
    ToolCallEnd(0),
    ToolCallBegin(1, "now", "own-id"),
    ToolCallArguments(1, "{}"),
    ToolCallEnd(1),
]


@pytest.fixture
def answers(monkeypatch):
    """``answers(parts, outcome)``: what every request is answered with from then on, a part an update."""

    def give(parts, outcome=None, is_whole=True):
        async def updates(self):
            for part in parts:
                yield Update(0, [part], (7,))
            yield Update(0, [], (), None, outcome or Outcome("stop", 1), is_whole)
            self.close()

        monkeypatch.setattr(Generation, "updates", updates)

    return give


def both_ways(client, **options):
    options = {"model": "chat", "max_tokens": 50, "messages": HELLO, **options}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        return whole, stream.get_final_message()


def test_every_kind_of_block_reaches_the_client(client, answers):
    answers(_CALLS)
    for found in both_ways(client, tools=[WEATHER]):
        thinking, text, first, second = found.content
        assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Let me see.", "exl")
        assert (text.type, text.text) == ("text", "I look.")
        assert (first.type, first.name, first.input) == ("tool_use", "get_weather", {"city": "Rome"})
        assert first.id.startswith("toolu_")
        assert (second.id, second.name, second.input) == ("own-id", "now", {})
        assert found.stop_reason == "tool_use"


def test_a_blocks_events_are_bracketed(client, answers):
    answers(_CALLS)
    events = client.messages.create(model="chat", max_tokens=50, messages=HELLO, stream=True)
    told = [
        (event.type.removeprefix("content_block_"), event.index, getattr(getattr(event, "delta", None), "type", None))
        for event in events
        if event.type.startswith("content_block_")
    ]
    assert told == [
        ("start", 0, None),
        ("delta", 0, "thinking_delta"),
        ("delta", 0, "thinking_delta"),
        ("delta", 0, "signature_delta"),
        ("stop", 0, None),
        ("start", 1, None),
        ("delta", 1, "text_delta"),
        ("delta", 1, "text_delta"),
        ("stop", 1, None),
        ("start", 2, None),
        ("delta", 2, "input_json_delta"),
        ("delta", 2, "input_json_delta"),
        ("stop", 2, None),
        ("start", 3, None),
        ("delta", 3, "input_json_delta"),
        ("stop", 3, None),
    ]


def test_thinking_can_be_left_out(client, answers):
    answers(_CALLS[:4])
    for found in both_ways(client, thinking={"type": "adaptive", "display": "omitted"}):
        thinking, text = found.content
        assert (thinking.thinking, thinking.signature, text.text) == ("", "exl", "I look.")


@pytest.mark.parametrize("outcome", [Outcome("length", limit="max_tokens"), Outcome("stop", 1)])
def test_half_a_call_is_told_and_is_no_tool_use(client, answers, outcome):
    answers([*_CALLS[:4], ToolCallBegin(0, "get_weather"), ToolCallArguments(0, '{"city": "R')], outcome, False)
    for found in both_ways(client):
        assert found.stop_reason == "max_tokens"
        assert found.content[-1].name == "get_weather"
        assert found.content[-1].input in ({"city": "R"}, {})  # the client's own reader leaves half a text out


@pytest.mark.parametrize("limit", ["deadline", None])
def test_an_answer_that_is_cut_off_is_told_as_max_tokens(client, answers, limit):
    answers([Text("Once")], Outcome("cancelled", limit=limit))
    for found in both_ways(client):
        assert (found.content[0].text, found.stop_reason) == ("Once", "max_tokens")


def test_text_of_any_kind_survives_the_stream(client, answers):
    text = '"\\\n\r\u2028\x00 <é日🤖'
    answers([Text(text), Text("\ud800")])
    whole, streamed = both_ways(client)
    assert whole.content[0].text == streamed.content[0].text == f"{text}?"


def test_an_error_in_a_stream_is_an_event(client, monkeypatch):
    async def updates(self):
        yield Update(0, [Text("Once")], (7,))
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr(Generation, "updates", updates)
    asked = client.messages.stream(model="chat", max_tokens=5, messages=HELLO)
    with asked as stream, pytest.raises(anthropic.APIStatusError) as raised:
        stream.get_final_message()
    assert raised.value.body["error"] == {"type": "api_error", "message": "internal error"}


def test_a_model_without_a_template_answers_a_transcript(running):
    client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    options = {"model": "stories", "max_tokens": 10, "system": "A story."}
    found = client.messages.create(messages=HELLO, **options)
    expected = running.llm.generate("A story.\nUser: Tell me of a dog.\nAssistant:", 10)
    assert found.content[0].text == expected.text
    found = client.messages.create(messages=[*HELLO, {"role": "assistant", "content": "Spot"}], **options)
    expected = running.llm.generate("A story.\nUser: Tell me of a dog.\nAssistant: Spot", 10)
    assert found.content[0].text == expected.text
    with pytest.raises(anthropic.BadRequestError, match="tools: this model has no chat template"):
        client.messages.create(messages=HELLO, tools=[WEATHER], **options)


def test_the_client_knows_what_kind_of_error_it_is(client):
    with pytest.raises(anthropic.NotFoundError, match="found 'claude', this server has 'chat'"):
        ask(client, model="claude")
    with pytest.raises(anthropic.BadRequestError, match="context"):
        ask(client, [{"role": "user", "content": "dog " * 1200}])
