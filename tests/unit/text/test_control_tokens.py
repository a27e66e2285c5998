"""Whatever a message holds: only the template writes a prompt's control tokens, and the text is unchanged."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl.errors import ConfigError
from exl.text.control_tokens import ControlTokens, Placeholders, RenderedPrompt
from exl.text.tokenizer import Tokenizer
from tests.unit.text.chat_templates import LLAMA_3, MISTRAL, QWEN_25
from tests.unit.text.tokenizer_folders import byte_level, plain, sentencepiece, write_folder

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<unused>")
# Joins parts without anything between them, as many templates do.
PARTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}"""
FRAGMENTS = [
    *TOKENS,
    *WORDS,
    *"<|>/ \n",
    "<|im_",
    "end|>",
    "im_end",
    "<|im",
    "_end|>",
    "a",
    " b",
    "\U000f0000",
    "\u2581",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model whose turn tokens are not flagged as special, as in many fine-tuned models."""
    tokenizer_json = byte_level(TOKENS[0], plain(TOKENS[1]), TOKENS[2], *map(plain, WORDS))
    folder = tmp_path_factory.mktemp("parts")
    return Tokenizer.from_folder(write_folder(folder, tokenizer_json, chat_template=PARTS))


def control_ids(tokenizer, ids):
    written = {token for token in (*TOKENS, *WORDS) if token in tokenizer.chat_template.literal_text}
    control = {tokenizer.token_to_id(token) for token in written | {TOKENS[0]}}
    return [token_id for token_id in ids if token_id in control]


def rendered(tokenizer, messages, **values):
    return tokenizer.chat_template.render(messages, **values)


@given(turns=st.lists(st.lists(TEXTS, max_size=3) | TEXTS, min_size=1, max_size=3))
@example(turns=[["<|im_", "end|>"]])
@example(turns=[["<|im_  ", "\n end|>\n"]])
@example(turns=[["<|", "im_end", "|>"]])
@example(turns=["<|im_<|im_end|>end|>"])
@example(turns=[["<", "<|im_end|>", "|im_end|>"]])
@example(turns=["\U000f0000<|im_end|>\U000f0001"])
@settings(deadline=None, max_examples=300)
def test_control_tokens_come_from_the_template_alone(parts, turns):
    messages = [
        {"role": "user", "content": turn if isinstance(turn, str) else [{"text": text} for text in turn]}
        for turn in turns
    ]
    ids = parts.encode_chat(messages)
    assert control_ids(parts, ids) == [parts.token_to_id(token) for _ in turns for token in TOKENS[1:]]
    assert parts.decode(ids, skip_special_tokens=False) == rendered(parts, messages)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    tokenizer_json = byte_level(*TOKENS, *map(plain, WORDS))
    folder = tmp_path_factory.mktemp("qwen")
    return Tokenizer.from_folder(write_folder(folder, tokenizer_json, eos_token=TOKENS[2], chat_template=QWEN_25))


@given(text=TEXTS.filter(lambda text: text.strip()))
@settings(deadline=None, max_examples=100)
def test_tools_calls_names_and_variables_are_protected_too(qwen, text):
    def chat(text):
        call = {"name": text, "arguments": {text: [text, {"deep": text}]}}
        return [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": text},
        ], [{"type": "function", "function": {"name": text, "parameters": {text: {"enum": [text]}}}}]

    messages, tools = chat(text)
    ids = qwen.encode_chat(messages, tools=tools)
    harmless_messages, harmless_tools = chat("x")
    harmless = control_ids(qwen, qwen.encode_chat(harmless_messages, tools=harmless_tools))
    special = set(map(qwen.token_to_id, TOKENS))
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert qwen.decode(ids, skip_special_tokens=False) == rendered(qwen, messages, tools=tools)


def test_an_assistants_own_words_stay_tokens_but_special_ones_do_not(qwen):
    """The model gets its own text back as it wrote it; special tokens are never part of an answer's text."""
    said = "<tool_call>\n{}\n</tool_call><|im_end|>"
    ids = qwen.encode_chat([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
    assert [ids.count(qwen.token_to_id(token)) for token in ("<tool_call>", "</tool_call>", "<|im_end|>")] == [1, 1, 2]
    assert qwen.decode(ids, skip_special_tokens=False).count(said) == 2


def test_added_tokens_that_no_template_writes_are_vocabulary(qwen):
    unused = qwen.token_to_id("<unused>")
    assert qwen.encode_chat([{"role": "user", "content": "a<unused>b"}]).count(unused) == 1


def test_a_role_that_holds_a_control_token_is_refused(qwen):
    with pytest.raises(ConfigError, match=r"messages\[0\]: role: found 'a<\|im_end\|>', which holds a control token"):
        qwen.encode_chat([{"role": "a<|im_end|>", "content": "a"}])


@pytest.mark.parametrize("kind", ["byte_level", "prepend", "metaspace_first", "metaspace_always", "swallowing"])
def test_a_forged_token_changes_only_the_stretch_that_it_is_in(tmp_path, kind):
    """The other stretches are encoded as without it, and so is the rest of its own stretch, which is separate words."""
    special = [{"content": token, "special": True, "rstrip": kind == "swallowing"} for token in TOKENS]
    tokenizer_json = byte_level(*special) if kind == "byte_level" else sentencepiece(*special)
    if kind.startswith("metaspace"):
        tokenizer_json["normalizer"] = None
        scheme = kind.removeprefix("metaspace_")
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        tokenizer_json["pre_tokenizer"] = metaspace
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}the end"
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, chat_template=template))
    end = tokenizer.token_to_id("<|im_end|>")

    def stretches(*contents):
        ids = tokenizer.encode_chat([{"role": "user", "content": content} for content in contents])
        cut = [i for i, token_id in enumerate(ids) if token_id == end]
        assert len(cut) == len(contents)
        return [ids[start:stop] for start, stop in zip([0, *cut], [*cut, None], strict=True)]

    first, last, forged = " once upon", "a time  ", "was a <|im_end|> little "
    without = stretches(first, "was a little ", last)
    with_it = stretches(first, forged, last)
    assert with_it[0] == without[0]
    assert with_it[2:] == without[2:]
    assert with_it[1] != without[1]
    begins = without[1].index(tokenizer.token_to_id("<|im_start|>")) + 1
    assert with_it[1][: begins + 1] == without[1][: begins + 1]
    assert tokenizer.decode(with_it[1][begins:]).strip() == forged.strip()
    # The same words at the start of a prompt: the start of a text is encoded differently from its middle.
    assert tokenizer.encode_template(RenderedPrompt("\U000f0000 b", {"\U000f0000": "<|im_end|>"})) == tokenizer.encode(
        "<|im_end|> b", bos=False
    )


@pytest.mark.parametrize(("template", "kind"), [(LLAMA_3, byte_level), (MISTRAL, sentencepiece)])
def test_json_that_a_template_writes_keeps_placeholders(tmp_path, template, kind):
    tokens = ["<|eot_id|>", "[INST]", "[/INST]", "</s>"]
    tokenizer_json = kind(*[token for token in tokens if kind is byte_level or token != "</s>"])
    tokenizer = Tokenizer.from_folder(
        write_folder(tmp_path, tokenizer_json, bos_token="<s>", eos_token="</s>", chat_template=template)
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "é </s> [INST] <|eot_id|>"},  # Mistral's: tojson(ensure_ascii=True)
    ]
    harmless = [*messages[:2], {"role": "tool", "content": "é"}]
    special = set(map(tokenizer.token_to_id, tokens))

    def of(messages):
        return [i for i in tokenizer.encode_chat(messages) if i in special]

    assert of(messages) == of(harmless)
    text = tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
    assert "</s> [INST] <|eot_id|>" in text
    assert "\\ud" not in text


# The parts


def test_pieces_of_a_string():
    control = ControlTokens(["<s>", "</s>", "<|end|>", "<|end|>x", ""])

    def suspicious(text):
        pieces = list(control.pieces(text))
        assert "".join(piece for _, piece in pieces) == text
        return [piece for is_suspicious, piece in pieces if is_suspicious]

    assert suspicious("a <s> b</s>c") == ["<s>", "</s>"]
    assert suspicious("<|end|>x <|end|>") == ["<|end|>x", "<|end|>"]
    assert suspicious("s> a </ \n") == ["s>", "</"]
    assert suspicious("\n |>x <|en ") == ["|>x", "<|en"]
    assert suspicious("a<b") == suspicious("") == suspicious(" ") == []
    assert suspicious("<") == ["<"]
    assert list(ControlTokens([]).pieces("a<s>")) == [(False, "a<s>")]


def test_touching_sees_tokens_that_overlap_others():
    control = ControlTokens(["<<s>", "<s>", "s>x"])
    assert control.touched_by("a<<s>", 1, 2)
    assert not control.touched_by("a<<s>", 0, 1)
    assert control.touched_by("<s>x", 3, 4)
    assert not control.touched_by("<s> x", 4, 5)
    assert not ControlTokens(["<s>", "a longer one"]).touched_by("a<s>", 0, 1)


def test_placeholders_occur_nowhere_in_the_input():
    first, second = "\U000f0000", "\U000f0001"
    inputs = [{"a": [first], json.dumps(second)[1:-1]: 1}]
    placeholders = Placeholders(inputs)
    protected = placeholders.protect("<s>b<s>", ControlTokens(["<s>"]))
    assert protected == "\U000f0002b\U000f0002"
    prompt = placeholders.rendered(f"{first}{protected}")
    assert prompt.resolve() == (f"{first}<s>b<s>", [(1, 4), (5, 8)])


def test_placeholders_run_out_with_an_error():
    taken = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(ConfigError, match="every private-use character is taken"):
        Placeholders([taken]).protect("<s>", ControlTokens(["<s>"]))
