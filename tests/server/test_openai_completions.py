"""``/v1/completions`` by OpenAI's own client, held against the engine without a server."""

from __future__ import annotations

from itertools import pairwise

import httpx
import pytest

from tests.server.running import wait_until

openai = pytest.importorskip("openai")
Completion = openai.types.Completion

PROMPTS = ["One day, a dog", "Tom was sad. He"]


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ask(client):
    def ask(prompt=PROMPTS[0], **options):
        return client.completions.create(model="stories", prompt=prompt, **options)

    return ask


def test_a_text_goes_on_as_in_the_engine(running, ask):
    expected = running.llm.generate(PROMPTS[0], 16)
    answer = ask()
    assert answer.choices[0].text == expected.text  # 16 is OpenAI's default
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.num_prompt_tokens, 16)
    ids = running.llm.encode(PROMPTS[0])
    assert ask(ids).choices[0].text == expected.text
    assert [choice.text for choice in ask([ids, ids[:3]]).choices] == [
        running.llm.generate(prompt, 16).text for prompt in (ids, ids[:3])
    ]


def test_choices_of_several_prompts_are_in_openais_order(running, ask):
    options = {"max_tokens": 10, "n": 2, "seed": 4, "temperature": 0.9}
    expected = [choice.text for text in PROMPTS for choice in running.llm.generate(text, **options).choices]
    answer = ask(PROMPTS, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 40
    assert answer.usage.prompt_tokens == sum(len(running.llm.encode(text)) for text in PROMPTS)
    told = [""] * 4
    chunks = list(ask(PROMPTS, **options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == expected
    assert chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_best_of(running, ask):
    options = {"max_tokens": 8, "n": 1, "best_of": 5, "seed": 4, "temperature": 1.3}
    assert ask(**options).choices[0].text == running.llm.generate(PROMPTS[0], **options).text


def test_an_echo_tells_how_likely_the_prompt_was(running, ask):
    expected = running.llm.generate(PROMPTS[0], max_tokens=3, top_logprobs=2, prompt_logprobs=2)
    tokens = [*expected.prompt_logprobs, *expected.logprobs]
    for options in ({}, {"stream": True}):
        choices = ask(max_tokens=3, echo=True, logprobs=2, **options)
        choices = [choices.choices[0]] if not options else [chunk.choices[0] for chunk in choices]
        text = "".join(choice.text for choice in choices)
        assert text == PROMPTS[0] + expected.text
        found = {
            name: [value for choice in choices if choice.logprobs for value in getattr(choice.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert found["tokens"] == ["<s>", *(token.text for token in tokens[1:])]
        assert found["token_logprobs"] == [None, *(token.logprob for token in tokens[1:])]
        for token, ranked in zip(tokens[1:], found["top_logprobs"][1:], strict=True):
            assert ranked == {one.text: one.logprob for one in (*token.alternatives, token)}
        offsets = [*found["text_offset"], len(text)]
        pieces = [text[start:stop] for start, stop in pairwise(offsets)]
        assert pieces == ["", found["tokens"][1].lstrip(), *found["tokens"][2:]]


def test_only_the_prompt(running, ask):
    answer = ask(max_tokens=0, echo=True, logprobs=0)
    expected = running.llm.generate(PROMPTS[0], max_tokens=0, prompt_logprobs=0)
    assert answer.choices[0].text == PROMPTS[0]
    assert answer.choices[0].logprobs.token_logprobs[1:] == [one.logprob for one in expected.prompt_logprobs[1:]]
    assert answer.usage.completion_tokens == 0
    assert ask(max_tokens=0).choices[0].text == ""


def test_without_an_echo_offsets_count_the_answer(ask):
    choice = ask(max_tokens=5, logprobs=1).choices[0]
    assert choice.logprobs.text_offset[0] == 0
    starts = choice.logprobs.text_offset
    assert "".join(choice.logprobs.tokens) == choice.text
    assert starts[1] == len(choice.logprobs.tokens[0])


def test_control_tokens_of_a_template_count_here(running, ask):
    """Whoever sends a prompt has applied the template; a BOS that it begins with is not doubled."""
    answer = ask(f"<s>{PROMPTS[0]}", max_tokens=5)
    expected = running.llm.generate(PROMPTS[0], 5)
    assert (answer.usage.prompt_tokens, answer.choices[0].text) == (expected.num_prompt_tokens, expected.text)
    without = ask(PROMPTS[0], max_tokens=5, extra_body={"add_special_tokens": False})
    assert without.usage.prompt_tokens == expected.num_prompt_tokens - 1


def test_bodies_are_of_the_clients_own_types(running):
    body = {"model": "stories", "prompt": PROMPTS, "max_tokens": 3, "logprobs": 1}
    url = f"{running.url}/v1/completions"
    Completion.model_validate_json(httpx.post(url, json=body).content, strict=True)
    events = httpx.post(url, json=body | {"stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("prompt", "options", "param", "words"),
    [
        ("x", {"suffix": "y"}, "suffix", "fills no gaps"),
        ([1, "x"], {}, "prompt", "expected a text, token ids, or a list"),
        ([], {}, "prompt", "expected a text, token ids, or a list"),
        ([[1], []], {}, "prompt", "number 1 is another"),
        ([1, 10**6], {}, "prompt", "found token id 1000000"),
        ("x", {"best_of": 2, "stream": True}, "best_of", "found 2 with stream"),
        ("x", {"best_of": 1, "n": 2}, "best_of", "expected n, 2, or more"),
        ("x", {"logprobs": 100}, "logprobs", "less than or equal to 20"),
        ("x " * 900, {}, "prompt", "the context holds 512"),
        (["x"] * 100, {"n": 2}, None, "queue"),
    ],
)
def test_refused(ask, prompt, options, param, words):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(prompt, **options)
    assert words in caught.value.body["message"]
    assert caught.value.param == param
    assert caught.value.status_code == (429 if words == "queue" else 400)


def test_one_of_several_that_is_refused_ends_all(running, ask):
    with pytest.raises(openai.BadRequestError):
        ask(["One day", "x " * 900], max_tokens=400, extra_body={"ignore_eos": True})
    wait_until(lambda: not running.llm.stats().running)
