"""llama-server's routes, held against the tokenizers library, transformers and the engine itself."""

from __future__ import annotations

import json

import pytest
import transformers

from tests.server.running import wait_until

TEXT = "Tom's dog said: hé, 日本 </s> 1234"


def ask(plain, path, **body):
    response = plain.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(plain, path, body):
    response = plain.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def test_tokens_are_those_of_the_tokenizers_library(plain, library):
    ids = library.encode(TEXT, add_special_tokens=False).ids
    assert ask(plain, "/tokenize", content=TEXT) == {"tokens": ids}
    assert 2 in ids  # </s> was read as a token
    assert ask(plain, "/tokenize", content=TEXT, add_special=True) == {"tokens": [1, *ids]}
    spelled = ask(plain, "/tokenize", content=TEXT, parse_special=False)["tokens"]
    assert 2 not in spelled
    assert ask(plain, "/detokenize", tokens=spelled)["content"] == TEXT


def test_pieces_are_texts_or_bytes(plain, library):
    found = ask(plain, "/tokenize", content="a 日", with_pieces=True)["tokens"]
    assert [token["id"] for token in found] == library.encode("a 日", add_special_tokens=False).ids
    assert [token["piece"] for token in found] == [" a", " ", [0xE6], [0x97], [0xA5]]


def test_detokenize_shows_special_tokens(plain, library):
    ids = library.encode(TEXT, add_special_tokens=False).ids
    assert ask(plain, "/detokenize", tokens=[1, *ids])["content"] == library.decode(
        [1, *ids], skip_special_tokens=False
    )
    assert ask(plain, "/detokenize", tokens=[]) == {"content": ""}


@pytest.mark.parametrize("token", [-1, 512, 2**40])
def test_detokenize_names_ids_that_are_no_token(plain, token):
    message = refused(plain, "/detokenize", {"tokens": [5, token]})
    assert message == f"tokens[1]: found {token}, expected the id of a token, below 512"


def test_inputs_is_text_generation_inferences_word(plain, library):
    found = ask(plain, "/tokenize", inputs=TEXT)
    encoded = library.encode(TEXT, add_special_tokens=False)
    assert found[0] == {"id": 1, "text": "", "start": 0, "stop": 0}
    assert [token["id"] for token in found[1:]] == encoded.ids
    assert [(token["start"], token["stop"]) for token in found[1:]] == encoded.offsets
    assert all(token["text"] == TEXT[token["start"] : token["stop"]] for token in found)
    assert ask(plain, "/tokenize", inputs="<s>Tom")[0] == {"id": 1, "text": "<s>", "start": 0, "stop": 3}
    assert ask(plain, "/tokenize", inputs="<s>Tom")[1]["id"] != 1
    assert {"id": 2, "text": "</s>", "start": TEXT.index("</s>"), "stop": TEXT.index("</s>") + 4} in found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "content, inputs: found neither of the two"),
        ({"content": "a", "inputs": "a"}, "content, inputs: found both"),
        ({"inputs": "a", "with_pieces": True}, "with_pieces: found with inputs, expected with content"),
        ({"inputs": "a", "parse_special": False}, "parse_special: found with inputs"),
        ({"content": "a", "add_bos": True}, "add_bos: unknown field"),
        ({"content": ["a"]}, "content: input should be a valid string"),
    ],
)
def test_tokenize_refuses_by_name(plain, body, message):
    assert refused(plain, "/tokenize", body).startswith(message)


def test_a_model_without_a_template_gets_a_transcript(plain, running):
    messages = [{"role": "system", "content": "A story."}, {"role": "user", "content": "Tell me of a dog."}]
    prompt = ask(plain, "/apply-template", messages=messages)["prompt"]
    assert prompt == "A story.\nUser: Tell me of a dog.\nAssistant:"
    found = ask(plain, "/apply-template", messages=messages, add_generation_prompt=False)["prompt"]
    assert found == "A story.\nUser: Tell me of a dog."


def test_a_template_is_applied_as_transformers_does(chatting, plain_chatting):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "It is é <b>."},
        {"role": "user", "content": "And?"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatting.llm.folder)
    for options, variables in (
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"tools": tools}, {"add_generation_prompt": True, "tools": tools}),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"add_generation_prompt": True, "enable_thinking": False},
        ),
    ):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        assert ask(plain_chatting, "/apply-template", messages=messages, **options)["prompt"] == expected
    assert plain_chatting.get("/props").json()["chat_template"] == tokenizer.chat_template
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert "messages[0].content[0]: this model reads text" in refused(plain_chatting, "/apply-template", body)
    body = {"messages": messages, "chat_template_kwargs": {"tools": []}}
    assert refused(plain_chatting, "/apply-template", body).startswith("chat_template_kwargs: found 'tools'")


def test_apply_template_refuses_by_name(plain):
    assert "messages" in refused(plain, "/apply-template", {"messages": []})
    message = refused(plain, "/apply-template", {"messages": [{"role": "user", "content": "a"}], "grammar": "x"})
    assert message == "grammar: unknown field"
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": 1}}
    assert refused(plain, "/apply-template", body) == "chat_template_kwargs: this model has no chat template"


def test_props_tell_no_path(plain, running):
    props = plain.get("/props").json()
    assert props["model_path"] == running.llm.folder.name
    assert str(running.llm.folder.parent) not in json.dumps(props)
    assert props["total_slots"] == 8
    assert props["default_generation_settings"]["n_ctx"] == running.llm.context
    assert (props["bos_token"], props["eos_token"], props["chat_template"]) == ("<s>", "</s>", "")
    params = props["default_generation_settings"]["params"]
    assert params["temperature"] == 0.0
    assert params["repeat_penalty"] == 1.0
    assert params["n_predict"] == -1
    assert props["modalities"] == {"vision": False, "audio": False}
    assert plain.post("/props", json={}).status_code == 405


def test_unknown_models_are_named(plain):
    for response in (plain.get("/props?model=x"), plain.get("/slots?model=x")):
        assert response.status_code == 404
        assert "found 'x'" in response.json()["error"]["message"]


def test_slots_count_what_runs(plain, running):
    def busy():
        slots = plain.get("/slots").json()
        assert [slot["id"] for slot in slots] == list(range(8))
        assert all(set(slot) == {"id", "n_ctx", "is_processing", "speculative"} for slot in slots)
        return sum(slot["is_processing"] for slot in slots)

    wait_until(lambda: busy() == 0)  # requests of other tests were cancelled a moment ago
    with running.llm.submit("Once", max_tokens=400, ignore_eos=True, n=3, max_unread=1) as unread:
        next(unread)
        wait_until(lambda: busy() == 3)
        assert plain.get("/slots?fail_on_no_slot=1").status_code == 200
    wait_until(lambda: busy() == 0)
    with running.llm.submit("Once", max_tokens=400, ignore_eos=True, n=8, max_unread=1) as full:
        next(full)
        wait_until(lambda: busy() == 8)
        response = plain.get("/slots?fail_on_no_slot=1")
        assert response.status_code == 503
        assert "all 8 slots are busy" in response.text
