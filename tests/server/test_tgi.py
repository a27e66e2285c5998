"""text-generation-inference's protocol by Hugging Face's own client and by plain requests, held against the same
request to the engine without a server."""

from __future__ import annotations

import json

import pytest
import tokenizers

from exl.server.generation import Generation, Update
from tests.server.running import RunningServer

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub.errors import TextGenerationError, ValidationError  # noqa: E402

PROMPT = "Tom had a dog. The dog"


@pytest.fixture(scope="module")
def client(running):
    return huggingface_hub.InferenceClient(base_url=running.url, token="none")


def alone(running, prompt=PROMPT, **options):
    return running.llm.generate(prompt, **{"top_logprobs": 0, **options})


def post(plain, path, body, status=200):
    response = plain.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def told(tokens):
    return [(token.id, token.logprob) for token in tokens]


def ranked(completion):
    return [(one.token_id, one.logprob) for one in completion.logprobs]


def test_a_text_is_the_engines_own(running, client):
    expected = alone(running, max_tokens=20)
    assert client.text_generation(PROMPT, max_new_tokens=20, return_full_text=False) == expected.text
    assert client.text_generation(PROMPT, max_new_tokens=20, return_full_text=True) == PROMPT + expected.text


def test_the_root_gives_the_whole_text_by_default_and_generate_only_what_is_new(running, plain):
    expected = alone(running, max_tokens=100).text  # 100 is text-generation-inference's own default
    assert post(plain, "/", {"inputs": PROMPT}) == [{"generated_text": PROMPT + expected}]
    assert post(plain, "/generate", {"inputs": PROMPT}) == {"generated_text": expected}


def test_details_are_the_engines_own(running, client):
    options = {"seed": 7, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}
    found = client.text_generation(
        PROMPT, details=True, decoder_input_details=True, max_new_tokens=15, top_n_tokens=3, **options
    )
    expected = alone(running, max_tokens=15, top_logprobs=3, prompt_logprobs=0, **options)
    assert found.generated_text.removeprefix(PROMPT) == expected.text
    details = found.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 15, 7)
    assert told(details.tokens) == ranked(expected)
    assert "".join(token.text for token in details.tokens) == expected.text
    assert [[(token["id"], token["logprob"]) for token in top] for top in details.top_tokens] == [
        [(other.token_id, other.logprob) for other in one.alternatives] for one in expected.logprobs
    ]
    assert [token.id for token in details.prefill] == running.llm.encode(PROMPT)
    assert [token.logprob for token in details.prefill[1:]] == [one.logprob for one in expected.prompt_logprobs[1:]]
    assert details.prefill[0].logprob is None
    assert "".join(token.text for token in details.prefill[1:]).strip() == PROMPT


@pytest.mark.parametrize("options", [{"typical_p": 0.5}, {"frequency_penalty": 1.5, "do_sample": True}])
def test_every_option_reaches_the_engine(running, client, options):
    found = client.text_generation(PROMPT, max_new_tokens=25, seed=1, return_full_text=False, **options)
    own = {name: value for name, value in options.items() if name != "do_sample"}
    assert found == alone(running, max_tokens=25, seed=1, temperature=1.0, **own).text
    assert found != alone(running, max_tokens=25, seed=1, temperature=1.0).text


def test_a_streams_tokens_are_the_engines_own(running, client):
    events = list(client.text_generation(PROMPT, details=True, stream=True, max_new_tokens=20, seed=3, do_sample=True))
    expected = alone(running, max_tokens=20, seed=3, temperature=1.0)
    assert told(event.token for event in events) == ranked(expected)
    assert [event.index for event in events] == list(range(1, 21))
    assert "".join(event.token.text for event in events) == expected.text
    assert [event.generated_text for event in events] == [None] * 19 + [PROMPT + expected.text]
    details = events[-1].details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 20, 3)
    assert details.input_length == expected.num_prompt_tokens
    pieces = client.text_generation(PROMPT, stream=True, max_new_tokens=20, seed=3, do_sample=True)
    assert "".join(pieces) == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_a_stop_string_are_told_and_its_text_is(running, client, stream):
    """As text-generation-inference does it; exl's own answers leave it out."""
    expected = alone(running, max_tokens=60, stop=["."])
    assert expected.finish_reason == "stop"
    found = client.text_generation(PROMPT, details=True, stream=stream, max_new_tokens=60, stop=["."])
    if stream:
        *_, found = events = list(found)
        assert "".join(event.token.text for event in events) == expected.text + "."
    assert found.generated_text == PROMPT + expected.text + "."
    assert found.details.finish_reason == "stop_sequence"
    assert found.details.generated_tokens == expected.num_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_token_is_told(running, client, stream):
    options = {"temperature": 0.8, "seed": 4}
    expected = alone(running, max_tokens=400, **options)
    assert expected.finish_reason == "stop"
    assert expected.stop_reason == 1
    found = client.text_generation(PROMPT, details=True, stream=stream, max_new_tokens=400, **options)
    if stream:
        events = list(found)
        tokens, found = [event.token for event in events], events[-1]
    else:
        tokens = found.details.tokens
    assert [token.id for token in tokens] == [*expected.token_ids, 1]
    assert (tokens[-1].text, tokens[-1].special, tokens[-1].logprob) == ("<s>", True, None)
    assert not any(token.special for token in tokens[:-1])
    assert found.generated_text == PROMPT + expected.text
    assert found.details.finish_reason == "eos_token"
    assert found.details.generated_tokens == len(tokens)


def test_a_stream_ends_with_a_token_where_a_grammar_ends_it(client):
    grammar = {"type": "regex", "value": "yes|no"}
    events = list(client.text_generation(PROMPT, details=True, stream=True, max_new_tokens=9, grammar=grammar))
    assert events[-1].generated_text in (f"{PROMPT}yes", f"{PROMPT}no")
    assert events[-1].details.finish_reason == "eos_token"


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": {"enum": [{"a": 1}, {"a": 2}]}},
        {"type": "json", "value": json.dumps({"const": {"a": 1}})},
        {"type": "json_schema", "value": {"name": "x", "schema": {"const": {"a": 2}}}},
    ],
)
def test_grammars_hold(client, grammar):
    found = client.text_generation(PROMPT, max_new_tokens=60, grammar=grammar, return_full_text=False)
    assert json.loads(found)["a"] in (1, 2)


@pytest.mark.parametrize("options", [{"stop": ["."]}, {}])
def test_the_last_token_has_the_whole_text_though_the_end_is_told_after_it(running, client, monkeypatch, options):
    """The engine tells of a last token and of the end one after the other, and a reader may come between the two."""
    updates = Generation.updates

    async def apart(self):
        async for update in updates(self):
            if update.outcome is not None and update.token_ids:
                yield update._replace(outcome=None)
                yield Update(update.choice, (), outcome=update.outcome)
            else:
                yield update

    monkeypatch.setattr(Generation, "updates", apart)
    events = list(client.text_generation(PROMPT, details=True, stream=True, max_new_tokens=20, **options))
    expected = alone(running, max_tokens=20, **options)
    assert told(event.token for event in events) == ranked(expected)
    assert events[-1].details.generated_tokens == expected.num_tokens


def test_best_of_tells_all_sequences_the_best_first(running, client):
    found = client.text_generation(PROMPT, details=True, max_new_tokens=8, best_of=3, temperature=1.2, seed=5)
    best = alone(running, max_tokens=8, n=3, best_of=3, temperature=1.2, seed=5)
    others = found.details.best_of_sequences
    assert [found.generated_text, *(one.generated_text for one in others)] == [
        PROMPT + one.text for one in best.choices
    ]
    assert [found.details.seed, *(one.seed for one in others)] == [one.seed for one in best.choices]
    assert told(found.details.tokens) == ranked(best.choices[0])
    assert told(others[-1].tokens) == ranked(best.choices[-1])


def test_truncate_keeps_the_end_of_the_prompt_as_the_tokenizers_library_does(running, plain, library):
    library.enable_truncation(7, direction="left")
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    expected_ids = library.encode(PROMPT).ids
    parameters = {"truncate": 7, "max_new_tokens": 5, "decoder_input_details": True}
    found = post(plain, "/generate", {"inputs": PROMPT, "parameters": parameters})
    assert [token["id"] for token in found["details"]["prefill"]] == expected_ids
    assert found["generated_text"] == alone(running, expected_ids, max_tokens=5).text
    one = post(plain, "/generate", {"inputs": PROMPT, "parameters": {**parameters, "truncate": 1}})
    assert [token["id"] for token in one["details"]["prefill"]] == [1]


def test_tokenize_tells_the_tokens_that_generate_takes(plain):
    """Control tokens in the text are such: text-generation-inference's clients apply templates themselves."""
    for text in (PROMPT, "<s>Tom</s> said"):
        tokens = post(plain, "/tokenize", {"inputs": text})
        parameters = {"max_new_tokens": 1, "decoder_input_details": True}
        found = post(plain, "/generate", {"inputs": text, "parameters": parameters})
        assert [token["id"] for token in found["details"]["prefill"]] == [token["id"] for token in tokens]
    assert [token["id"] for token in tokens].count(2) == 1


def test_both_stream_routes_give_the_same_events(plain):
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6, "details": True, "return_full_text": False}}
    by_path = plain.post("/generate_stream", json=body)
    assert by_path.headers["content-type"].startswith("text/event-stream")
    assert by_path.text == plain.post("/", json=body | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in by_path.text.split("\n\n") if line]
    assert [set(event) for event in events] == [{"index", "token", "generated_text", "details"}] * 6


def test_headers_tell_times_and_counts(plain):
    response = plain.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 6}})
    found = response.headers
    assert found["x-compute-characters"] == str(len(PROMPT))
    assert found["x-generated-tokens"] == "6"
    times = [int(found[f"x-{name}-time"]) for name in ("validation", "queue", "inference")]
    assert min(times) >= 0
    assert abs(sum(times) - int(found["x-total-time"])) <= 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"watermark": True}, "parameters.watermark: exl marks no texts, found True"),
        ({"adapter_id": "a/b"}, "adapter_id: found 'a/b', this server has no adapters"),
        ({"best_of": 2}, "best_of: found 2 with greedy decoding"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens: input should be greater than or equal to 1, found 0"),
        ({"temperature": 0}, "parameters.temperature: input should be greater than 0, found 0"),
        ({"top_n_tokens": 21}, "parameters.top_n_tokens: input should be less than or equal to 20"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"min_p": 0.1}, "parameters.min_p: unknown field"),
        ({"grammar": {"type": "regex", "value": 3}}, "parameters.grammar.value: found int, expected a text"),
        ({"grammar": {"type": "json", "value": [1]}}, "parameters.grammar.value: found list, expected a schema"),
        ({"grammar": {"type": "json_schema", "value": {"name": "x"}}}, "parameters.grammar.value: expected an object"),
        ({"grammar": {"type": "lark", "value": "x"}}, "parameters.grammar.type: input should be 'json'"),
        ({"grammar": {"type": "regex", "value": "("}}, "parameters.grammar.value: "),
        ({"grammar": {"type": "json", "value": {"type": "nonsense"}}}, "parameters.grammar.value: "),
        ({"max_new_tokens": 2**31}, "parameters.max_new_tokens: found 2147483648"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(plain, parameters, message):
    found = post(plain, "/generate", {"inputs": PROMPT, "parameters": parameters}, 400)
    assert found["error"].startswith(message)
    assert found["error_type"] == "validation"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "best_of: found 2 in a stream"),
        ({"decoder_input_details": True}, "decoder_input_details: found True in a stream"),
    ],
)
def test_what_a_stream_cannot_tell_is_refused_by_name(plain, parameters, message):
    found = post(plain, "/generate_stream", {"inputs": PROMPT, "parameters": parameters}, 400)
    assert found["error"].startswith(message)


def test_a_stream_flag_that_contradicts_its_path_is_refused(plain):
    found = post(plain, "/generate", {"inputs": PROMPT, "stream": True}, 400)
    assert found["error"] == "stream: found True at /generate, expected False or nothing"


def test_the_client_raises_what_the_server_tells(client):
    with pytest.raises(ValidationError, match="watermark: exl marks no texts"):
        client.text_generation(PROMPT, watermark=True)
    with pytest.raises(ValidationError, match="512"):
        client.text_generation(PROMPT * 200)


def test_an_error_in_a_stream_is_its_last_event(running, client, monkeypatch):
    from exl.server import tgi

    def broken(self, update, generation):
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr(tgi._Told, "events", broken)
    with pytest.raises(TextGenerationError, match="internal error"):
        list(client.text_generation(PROMPT, stream=True))


def test_a_deadline_ends_an_answer_as_length():
    with RunningServer(timeout=0.05) as server:
        client = huggingface_hub.InferenceClient(base_url=server.url, token="none")
        options = {"temperature": 0.8, "seed": 1, "max_new_tokens": 400}
        *_, last = client.text_generation(PROMPT, stream=True, details=True, **options)
        assert last.details.finish_reason == "length"
        assert last.details.generated_tokens < 400
        expected = server.llm.generate(PROMPT, temperature=0.8, seed=1, max_tokens=400)
        assert expected.num_tokens == 400
        assert (PROMPT + expected.text).startswith(last.generated_text)


def test_info_tells_limits(plain, running):
    found = plain.get("/info").json()
    assert found["model_id"] == "stories"
    assert found["max_total_tokens"] == running.llm.context == found["max_input_tokens"] + 1
    assert found["max_concurrent_requests"] == 8 + running.options.max_queue
