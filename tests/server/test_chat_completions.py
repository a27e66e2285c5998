"""``/v1/chat/completions`` by OpenAI's own client, held against the same request to the engine without a server."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "system", "content": "A story."}, {"role": "user", "content": "Tell me of a dog."}]


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def alone(running, **options):
    prompt = "A story.\nUser: Tell me of a dog.\nAssistant:"
    return running.llm.generate(prompt, **options)


def test_an_answer_is_the_engines_own(running, client):
    answer = client.chat.completions.create(model="stories", messages=MESSAGES, max_tokens=20, seed=3, temperature=0.8)
    expected = alone(running, max_tokens=20, seed=3, temperature=0.8)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == expected.num_tokens == 20


def test_a_streams_pieces_join_to_the_answer(running, client):
    stream = client.chat.completions.create(
        model="stories",
        messages=MESSAGES,
        max_tokens=20,
        seed=3,
        temperature=0.8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(running, max_tokens=20, seed=3, temperature=0.8).text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 20


def test_an_unknown_model_is_named(client):
    with pytest.raises(openai.NotFoundError, match="found 'gpt-4', this server has 'stories'"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
