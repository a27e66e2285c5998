"""``/v1/embeddings`` by OpenAI's own client, held against ``LLM.embed``."""

from __future__ import annotations

import asyncio
import time

import httpx
import numpy as np
import pytest

from tests.server.running import SECONDS, wait_until

openai = pytest.importorskip("openai")
CreateEmbeddingResponse = openai.types.CreateEmbeddingResponse

TEXTS = ["A dog ran to the park.", "The sun is warm.", "One"]


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def vectors_of(answer):
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


def test_vectors_are_those_of_the_engine(running, client):
    """The client itself asks for base64 and decodes it."""
    answer = client.embeddings.create(model="stories", input=TEXTS)
    assert np.array_equal(vectors_of(answer), running.llm.embed(TEXTS, normalize=True).numpy())
    assert answer.usage.prompt_tokens == sum(len(running.llm.encode(text)) for text in TEXTS)
    floats = client.embeddings.create(model="stories", input=TEXTS, encoding_format="float")
    assert np.array_equal(vectors_of(floats), vectors_of(answer))
    last = client.embeddings.create(model="stories", input=TEXTS[0], extra_body={"pooling": "last", "normalize": False})
    assert np.array_equal(vectors_of(last), running.llm.embed(TEXTS[0], "last").numpy())


def test_token_ids_and_many_texts(running, client):
    ids = [running.llm.encode(text) for text in TEXTS]
    expected = running.llm.embed(TEXTS, normalize=True).numpy()
    assert np.array_equal(vectors_of(client.embeddings.create(model="stories", input=ids)), expected)
    assert np.array_equal(vectors_of(client.embeddings.create(model="stories", input=ids[0])), expected[:1])
    many = [f"{TEXTS[i % 3]} {i}" for i in range(100)]  # more than the queue takes at once
    found = vectors_of(client.embeddings.create(model="stories", input=many, dimensions=64))
    parts = [running.llm.embed(many[start : start + 50], normalize=True).numpy() for start in (0, 50)]
    assert np.array_equal(found, np.concatenate(parts))


def test_the_body_is_of_the_clients_own_type(running):
    found = httpx.post(f"{running.url}/v1/embeddings", json={"model": "stories", "input": "a"})
    CreateEmbeddingResponse.model_validate_json(found.content, strict=True)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"input": ""}, "input", "found an empty text"),
        ({"input": []}, "input", "expected a text"),
        ({"input": ["a", "x " * 900]}, "input", "input[1]: found 1802 tokens, the context holds 512"),
        ({"input": [[1], [99999]]}, "input", "input[1]: found token id 99999"),
        ({"input": "a", "dimensions": 8}, "dimensions", "found 8, this model's vectors have 64"),
        ({"input": "a", "extra_body": {"pooling": "max"}}, "pooling", "found 'max'"),
    ],
)
def test_refused(client, options, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="stories", **options)
    assert words in caught.value.body["message"]
    assert caught.value.param == param


def test_a_client_that_leaves_holds_up_nothing(running, client):
    """Of many long texts, only those that have begun are still computed."""
    texts = [f"{i} " + "word " * 150 for i in range(400)]
    before = running.llm.stats().prompt_tokens

    async def leave():
        """Once the first texts are computed."""
        async with httpx.AsyncClient(timeout=SECONDS) as leaver:
            asked = asyncio.ensure_future(leaver.post(f"{running.url}/v1/embeddings", json={"input": texts}))
            await asyncio.to_thread(wait_until, lambda: running.llm.stats().prompt_tokens > before)
            assert asked.cancel()
            await asyncio.wait([asked])

    asyncio.run(leave())
    wait_until(lambda: not running.server.num_open)
    wait_until(lambda: not (running.llm.stats().running or running.llm.stats().waiting))
    computed = running.llm.stats().prompt_tokens - before
    time.sleep(0.1)
    assert running.llm.stats().prompt_tokens - before == computed < 400 * 300
    assert client.embeddings.create(model="stories", input="a").data
