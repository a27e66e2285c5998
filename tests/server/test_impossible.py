"""Requests that no token may answer: their own fault, told as such, and nobody else's."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    "more",
    [
        {"choices": ["yes"], "banned_strings": ["y"]},
        {"regex": "a+", "banned_strings": ["aa"], "min_tokens": 8},
    ],
)
def test_a_constraint_and_banned_strings_that_leave_nothing(running, client, more):
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="stories", prompt="Say", max_tokens=8, extra_body=more)
    assert found.value.code == "constraint"
    assert client.completions.create(model="stories", prompt="Say", max_tokens=2).usage.completion_tokens == 2
