"""``/v1/responses`` by OpenAI's own client, whose accumulator checks the events."""

from __future__ import annotations

import json

import httpx
import pytest
from pydantic import TypeAdapter

from exl.server.generation import Generation
from tests.server.running import wait_until

openai = pytest.importorskip("openai")
Response, ResponseStreamEvent = openai.types.responses.Response, openai.types.responses.ResponseStreamEvent

PROMPT = "A story.\nUser: Tell me of a dog.\nAssistant:"  # the model has no chat template
ASKED = {"model": "stories", "instructions": "A story.", "input": "Tell me of a dog."}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_an_answer_is_the_engines_own(running, client):
    options = {"seed": 3, "temperature": 0.8}
    expected = running.llm.generate(PROMPT, 20, **options)
    answer = client.responses.create(**ASKED, max_output_tokens=20, temperature=0.8, extra_body={"seed": 3})
    assert answer.output_text == expected.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (expected.num_prompt_tokens, 20)
    assert (answer.instructions, answer.max_output_tokens, answer.temperature) == ("A story.", 20, 0.8)
    ended = client.responses.create(**ASKED, extra_body={"stop": "."})
    assert (ended.status, ended.incomplete_details) == ("completed", None)
    assert ended.usage.input_tokens_details.cached_tokens == expected.num_prompt_tokens - 1


def test_events_come_in_openais_order(running, client):
    expected = running.llm.generate(PROMPT, stop=".")
    types, numbers = [], []
    with client.responses.stream(**ASKED, extra_body={"stop": "."}) as stream:
        for event in stream:
            numbers.append(event.sequence_number)
            if not types or types[-1] != event.type:
                types.append(event.type)
        answer = stream.get_final_response()
    assert answer.output_text == expected.text
    assert types == [*TEXT_EVENTS, "response.completed"]
    assert numbers == list(range(len(numbers)))


def test_a_stream_that_is_cut_off_ends_as_incomplete(client):
    events = list(client.responses.create(**ASKED, max_output_tokens=5, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == deltas
    assert events[-1].response.output[0].status == "incomplete"


def test_items_are_the_conversation(running, client):
    items = [
        {"role": "developer", "content": "A story."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Tell me of a cat."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "It ran.", "annotations": []}],
        },
        {"role": "user", "content": "Tell me of a dog."},
    ]
    prompt = "A story.\nUser: Tell me of a cat.\nAssistant: It ran.\nUser: Tell me of a dog.\nAssistant:"
    answer = client.responses.create(model="stories", input=items, max_output_tokens=12)
    assert answer.output_text == running.llm.generate(prompt, 12).text
    again = client.responses.create(
        model="stories", input=[*items[:1], *items[1:2], *answer.output, items[-1]], max_output_tokens=5
    )
    assert again.status == "incomplete"  # an answer's own items are taken


def test_a_format_and_logprobs(running, client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema | {"additionalProperties": False}}}
    answer = client.responses.create(**ASKED, text=form, max_output_tokens=60)
    assert set(json.loads(answer.output_text)) == {"n"}
    assert answer.text.format.type == "json_schema"
    expected = running.llm.generate(PROMPT, 4, top_logprobs=2).logprobs
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 4}
    found = client.responses.create(**ASKED, **options).output[0].content[0].logprobs
    assert [token.logprob for token in found] == [token.logprob for token in expected]
    events = list(client.responses.create(**ASKED, **options, stream=True))
    told = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [token.token for token in told] == [token.text for token in expected]


def test_bodies_are_of_the_clients_own_types(running):
    url = f"{running.url}/v1/responses"
    body = ASKED | {"max_output_tokens": 4, "include": ["message.output_text.logprobs"], "metadata": {"a": "b"}}
    Response.model_validate_json(httpx.post(url, json=body).content)
    adapter = TypeAdapter(ResponseStreamEvent)
    events = httpx.post(url, json=body | {"stream": True}).text.strip().split("\n\n")
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {adapter.validate_json(data.removeprefix('data: ')).type}"
    assert len(events) >= 9


def test_an_error_in_a_stream_is_told_as_failed(running, client, monkeypatch):
    plain, seen = Generation._update, []

    def fails(self, event):
        seen.append(event)
        if len(seen) == 3:
            raise ValueError("what nobody expected")
        return plain(self, event)

    monkeypatch.setattr(Generation, "_update", fails)
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.error.message == "internal error"
    wait_until(lambda: not running.llm.stats().running)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "found 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "no images",
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0]", "found no call_id"),
        ({"input": []}, "input", "at least 1 item"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "c"}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "keeps no answers"),
        ({"store": True}, "store", "keeps no answers"),
        ({"truncation": "auto"}, "truncation", "drops nothing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "not 'web_search'"),
        ({"include": ["file_search_call.results"]}, "include", "found 'file_search_call.results'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "expected a schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
            "text.format",
            "nonsense",
        ),
        ({"extra_body": {"json_schema": {"type": "nonsense"}}}, "json_schema", "nonsense"),
        ({"max_output_tokens": -2}, "max_output_tokens", "found -2"),
        ({"extra_body": {"n": 2}}, "n", "one answer"),
        ({"extra_body": {"max_tokens": 2}}, "max_tokens", "expected max_output_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, options, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED | options)
    assert words in caught.value.body["message"]
    assert caught.value.param == param


def test_what_changes_nothing_is_taken(client):
    plain = client.responses.create(**ASKED, max_output_tokens=4).output_text
    same = client.responses.create(
        **ASKED,
        max_output_tokens=4,
        store=False,
        background=False,
        truncation="disabled",
        reasoning={"effort": "low", "summary": "auto"},
        metadata={"a": "b"},
        user="u",
        parallel_tool_calls=False,
    )
    assert same.output_text == plain
    assert (same.metadata, same.store if hasattr(same, "store") else False) == ({"a": "b"}, False)
