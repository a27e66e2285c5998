"""``/v1/chat/completions`` by OpenAI's own client, held against the same request to the engine without a server."""

from __future__ import annotations

import json

import httpx
import pytest

from exl.parse.parts import Text
from exl.server.generation import Update
from exl.server.openai.chat_answer import ChatAnswer
from tests.server.running import wait_until

openai = pytest.importorskip("openai")
ChatCompletion, ChatCompletionChunk = openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk

MESSAGES = [{"role": "system", "content": "A story."}, {"role": "user", "content": "Tell me of a dog."}]
PROMPT = "A story.\nUser: Tell me of a dog.\nAssistant:"  # the model has no chat template


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ask(client):
    def ask(messages=MESSAGES, **options):
        return client.chat.completions.create(model="stories", messages=messages, **options)

    return ask


def alone(running, prompt=PROMPT, **options):
    return running.llm.generate(prompt, **options)


def texts_of(chunks):
    """The text of each choice."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def test_an_answer_is_the_engines_own(running, ask):
    answer = ask(max_tokens=20, seed=3, temperature=0.8)
    expected = alone(running, max_tokens=20, seed=3, temperature=0.8)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == expected.num_tokens == 20
    assert answer.usage.total_tokens == expected.num_prompt_tokens + 20


def test_a_streams_pieces_join_to_the_answer(running, ask):
    chunks = list(ask(max_tokens=20, seed=3, temperature=0.8, stream=True, stream_options={"include_usage": True}))
    assert texts_of(chunks) == {0: alone(running, max_tokens=20, seed=3, temperature=0.8).text}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 20
    assert chunks[-1].choices == []
    assert chunks[0].choices[0].delta.role == "assistant"


def test_choices_are_those_of_the_engine_in_streams_too(running, ask):
    options = {"max_tokens": 12, "seed": 5, "temperature": 0.9, "n": 3}
    expected = {i: choice.text for i, choice in enumerate(alone(running, **options).choices)}
    assert len(set(expected.values())) == 3
    answer = ask(**options)
    assert {choice.index: choice.message.content for choice in answer.choices} == expected
    assert answer.usage.completion_tokens == 36
    assert texts_of(ask(**options, stream=True)) == expected


def test_best_of_keeps_the_likeliest(running, ask):
    options = {"max_tokens": 8, "seed": 5, "temperature": 1.2, "n": 2}
    expected = alone(running, **options, best_of=6)
    answer = ask(**options, extra_body={"best_of": 6})
    assert [choice.message.content for choice in answer.choices] == [choice.text for choice in expected.choices]
    assert answer.usage.completion_tokens > 16  # of all six


def test_logprobs_are_those_of_the_engine(running, ask):
    expected = alone(running, max_tokens=6, top_logprobs=3)
    (choice,) = ask(max_tokens=6, logprobs=True, top_logprobs=3).choices
    found = choice.logprobs.content
    assert [bytes(token.bytes) for token in found] == [token.token_bytes for token in expected.logprobs]
    assert [token.logprob for token in found] == [token.logprob for token in expected.logprobs]
    assert [[other.token for other in token.top_logprobs] for token in found] == [
        [other.text for other in token.alternatives] for token in expected.logprobs
    ]
    chunks = list(ask(max_tokens=6, logprobs=True, top_logprobs=3, stream=True))
    told = [token for chunk in chunks for c in chunk.choices if c.logprobs for token in c.logprobs.content]
    assert told == found
    assert ask(max_tokens=6).choices[0].logprobs is None


def test_a_stop_string_and_a_bias(running, ask):
    plain = alone(running, max_tokens=40)
    word = plain.text.split()[4]
    answer = ask(max_tokens=40, stop=[word])
    assert answer.choices[0].message.content == plain.text[: plain.text.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    first = plain.token_ids[0]
    biased = ask(max_tokens=1, logit_bias={str(first): -100}).choices[0].message.content
    assert (
        biased == alone(running, max_tokens=1, logit_bias={first: -100}).text != running.llm.tokenizer.decode([first])
    )


def test_the_engines_own_options_are_fields(running, ask):
    options = {"min_p": 0.2, "repetition_penalty": 1.3, "dry_multiplier": 0.8, "top_k": 30}
    expected = alone(running, max_tokens=15, seed=2, temperature=1.1, **options)
    answer = ask(max_tokens=15, seed=2, temperature=1.1, extra_body=options)
    assert answer.choices[0].message.content == expected.text


def test_a_schema_is_followed(ask):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 20}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "dog", "schema": schema, "strict": True}}
    answer = ask(response_format=form, max_tokens=100)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"}
    assert found["age"] <= 20
    text = ask(response_format={"type": "json_object"}, max_tokens=200, seed=1).choices[0].message.content
    assert text.lstrip().startswith("{")
    words = ask(extra_body={"choices": ["a cat", "a dog"]}, max_tokens=20).choices[0].message.content
    assert words in ("a cat", "a dog")


def test_the_default_is_what_the_context_leaves(ask, running):
    answer = ask(extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == running.llm.context
    assert ask(max_completion_tokens=3).usage.completion_tokens == 3


def test_a_second_request_tells_what_was_cached(ask):
    messages = [{"role": "user", "content": "Tell me of a fox and of a hen that met by the river one day in May."}]
    first, second = (ask(messages, max_tokens=4) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    timings = second.model_extra["timings"]
    assert (timings["cache_n"], timings["prompt_n"]) == (second.usage.prompt_tokens - 1, 1)
    assert timings["predicted_n"] == 4
    assert timings["predicted_ms"] > 0


def test_messages_in_other_forms_are_the_same(ask):
    plain = ask(max_tokens=10).choices[0].message.content
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "A story."}]},
        {"role": "user", "content": [{"type": "text", "text": "Tell me of a dog."}]},
    ]
    assert ask(parts, max_tokens=10).choices[0].message.content == plain


def test_an_answer_that_has_begun_goes_on(running, ask):
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon a time"}]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    answer = ask(messages, max_tokens=10, extra_body=flags)
    assert answer.choices[0].message.content == alone(running, f"{PROMPT} Once upon a time", max_tokens=10).text
    another = ask(messages, max_tokens=10).choices[0].message.content  # else it is a turn that is over
    assert another == alone(running, f"{PROMPT} Once upon a time\nAssistant:", max_tokens=10).text


def test_bodies_are_of_the_clients_own_types(running):
    body = {"model": "stories", "messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 1, "n": 2}
    url = f"{running.url}/v1/chat/completions"
    ChatCompletion.model_validate_json(httpx.post(url, json=body).content, strict=True)
    streamed = httpx.post(url, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate_json(event, strict=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")


def test_a_client_that_leaves_frees_its_request(running, ask):
    stream = ask(extra_body={"ignore_eos": True}, n=2, stream=True)
    next(iter(stream))
    assert running.llm.stats().running == 2
    stream.close()
    wait_until(lambda: not running.llm.stats().running)


def test_unusual_text_survives(running):
    """Quotes, control characters, emoji and half characters pass through the chunks that are put together by hand."""
    text = 'a"b\\c\n\x01\u2028 \U0001f600 \ud800'
    told = ChatAnswer(running.server.models.states[0].served, wants_usage=False)
    event = told.chunks(Update(0, [Text(text)]), None).decode().split("\n\n")[1]
    delta = ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")).choices[0].delta
    assert delta.content == text.replace("\ud800", "?")


REFUSED = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "found no content"),
    ({"messages": [{"role": "function", "content": "a", "name": "f"}]}, "messages[0].role", "found 'function'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
        "messages[0].content[0]",
        "this model reads text and no images: the part 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", "no sound"),
    ({"temperature": -1}, "temperature", "expected a number from 0 to 100"),
    ({"n": 100000}, "n", "expected a whole number from 1 to 128"),
    ({"top_logprobs": 2}, "top_logprobs", "expected both"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "another number in max_tokens"),
    ({"logit_bias": {"dog": 1}}, "logit_bias", "expected token ids"),
    ({"modalities": ["text", "audio"]}, "modalities", "writes text only"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio", "no sound"),
    ({"functions": [{"name": "f"}]}, "functions", "expected tools"),
    ({"web_search_options": {}}, "web_search_options", "searches nothing"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "speculate"),
    ({"store": True}, "store", "keeps no answers"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "expected json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        "response_format",
        "nonsense",
    ),
    ({"response_format": {"type": "json_object"}, "json_schema": {}}, "response_format", "one of the two"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "one of"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "not 'web_search'"),
    ({"tool_choice": "required"}, "tool_choice", "no tool_choice without tools"),
    ({"best_of": 3, "stream": True}, "best_of", "found 3 with stream"),
    ({"continue_final_message": True}, "messages", "found no text of an assistant's at the end"),
    ({"response_format": {"type": "json_object"}, "grammar": "start: A"}, "grammar", "with response_format or tools"),
    ({"max_completion_tokens": -2}, "max_completion_tokens", "found -2"),
    ({"max_tokens": -2, "max_completion_tokens": -2}, "max_tokens", "found -2"),
    ({"max_tokens": 3, "max_completion_tokens": 2}, "max_completion_tokens", "another number in max_tokens"),
    ({"timeout": -1}, "timeout", "greater than 0"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "no chat template"),
    ({"nonsense": 1}, "nonsense", "unknown field"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(ask, body, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**{"messages": MESSAGES, "extra_body": body})
    error = caught.value
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert words in error.body["message"]


def test_numbers_that_json_cannot_hold(running):
    """Parsers read 1e999 as infinity."""
    tool = '{"type": "function", "function": {"name": "f", "parameters": {"default": 1e999}}}'
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{tool}]}}'
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{running.url}/v1/chat/completions", content=body, headers=headers)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools[0].function.parameters")


def test_what_changes_nothing_is_taken(ask):
    plain = ask(max_tokens=5).choices[0].message.content
    same = ask(
        max_tokens=5,
        user="u",
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        store=False,
        modalities=["text"],
        parallel_tool_calls=False,
        verbosity="medium",
        reasoning_effort="low",
        response_format={"type": "text"},
    )
    assert same.choices[0].message.content == plain
    assert same.system_fingerprint.startswith("fp_")


def test_a_prompt_beyond_the_context_is_told_as_such(ask):
    with pytest.raises(openai.BadRequestError, match="tokens, the context holds 512") as caught:
        ask([{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_named(client):
    with pytest.raises(openai.NotFoundError, match="found 'gpt-4', this server has 'stories'"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)


def test_hugging_faces_client(running):
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(base_url=f"{running.url}/v1", api_key="none")
    expected = alone(running, max_tokens=12).text
    answer = client.chat_completion(MESSAGES, model="stories", max_tokens=12)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 12
    chunks = client.chat_completion(MESSAGES, model="stories", max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_an_answer_to_a_transcript_ends_where_the_user_would_speak(running, client, monkeypatch):
    """Also for a request with stop strings of its own."""
    submit, asked = type(running.llm).submit, []

    def submit_and_note(self, prompt, *args, **options):
        asked.append(options.get("stop"))
        return submit(self, prompt, *args, **options)

    monkeypatch.setattr(type(running.llm), "submit", submit_and_note)
    client.chat.completions.create(model="stories", messages=MESSAGES, max_tokens=3)
    client.chat.completions.create(model="stories", messages=MESSAGES, max_tokens=3, stop=["xyz"])
    assert asked == [("\nUser:",), ("xyz", "\nUser:")]
