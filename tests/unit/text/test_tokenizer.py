"""Text to ids and back against transformers; which file decides; text that looks like a control token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from exl.errors import CheckpointError, ConfigError, UnsupportedModelError
from exl.text.tokenizer import Tokenizer
from tests.unit.text.chat_templates import CHATML
from tests.unit.text.tokenizer_folders import (
    CORPUS,
    STORIES,
    byte_level,
    plain,
    sentencepiece,
    transformers_tokenizer,
    write_folder,
)

TURNS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEXTS = (
    st.text()
    | st.text(alphabet=CORPUS)
    | st.lists(st.sampled_from([*"<|/>s_ \n\t▁", "<s>", "</s>", "a b", *TURNS])).map("".join)
)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        return write_folder(path, byte_level(*TURNS, bos=TURNS[2]), bos_token=TURNS[2], eos_token=TURNS[1])
    return write_folder(path, sentencepiece(*TURNS), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def pair(folder):
    return Tokenizer.from_folder(folder), transformers_tokenizer(folder)


# Text


@given(text=TEXTS)
@example(text="a</s>b<|im_end|>")
@example(text=" ")
@example(text="")
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_encoding_matches_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.encode(text, special=True) == theirs.encode(text)
    assert ours.encode(text, bos=False) == theirs.encode(text, split_special_tokens=True, add_special_tokens=False)


@given(text=TEXTS)
@settings(deadline=None)
def test_decoding_matches_transformers(pair, text):
    ours, theirs = pair
    ids = theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_a_bundled_tokenizer():
    tokenizer = Tokenizer.from_folder(STORIES, bos_id=5, eos_ids=[1, 2])
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.decode([1, 403, 407, 261, 378, 2]) == "Once upon a time"
    assert tokenizer.decode([1, 403], skip_special_tokens=False) == "<s> Once"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (1, 2), 512)
    assert (tokenizer.id_to_token(403), tokenizer.id_to_token(512)) == ("▁Once", None)
    assert (tokenizer.token_to_id("▁Once"), tokenizer.token_to_id("nothing")) == (403, None)
    assert tokenizer.special_ids == {0, 1, 2}


def test_special_tokens_are_plain_in_text_however_they_are_flagged(tmp_path):
    """One token is flagged in tokenizer.json, three are named elsewhere, one is in the chat template, one is none."""
    added = ["<|flag|>", *map(plain, ["<|name|>", "<|list|>", "<|described|>", "<|turn|>", "<free>"])]
    described = {"content": "<|described|>", "special": True, "normalized": False}
    tokenizer_json = byte_level(*added)
    ids = {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    tokenizer = Tokenizer.from_folder(
        write_folder(
            tmp_path,
            tokenizer_json,
            eos_token="<|name|>",
            additional_special_tokens=["<|list|>"],
            added_tokens_decoder={str(ids["<|described|>"]): described},
            chat_template="{{ '<|turn|>' + messages[0].content }}",
        )
    )
    for token in ("<|flag|>", "<|name|>", "<|list|>", "<|described|>", "<|turn|>"):
        assert ids[token] not in tokenizer.encode(f"a {token}b"), token
        assert tokenizer.decode(tokenizer.encode(f"a {token}b")) == f"a {token}b"
        assert tokenizer.encode(token, special=True) == [ids[token]]
    assert ids["<free>"] in tokenizer.encode("a <free>b")
    hidden = {token for token, token_id in ids.items() if token_id in tokenizer.special_ids}
    assert hidden == {"<|flag|>", "<|name|>", "<|list|>", "<|described|>"}  # the turn marker is text to a reader


def test_special_tokens_map_counts_where_nothing_newer_does(tmp_path):
    tokenizer_json = byte_level(plain("<|a|>"), plain("<|b|>"))
    a, b = (token["id"] for token in tokenizer_json["added_tokens"])
    write_folder(tmp_path, tokenizer_json, eos_token="<|a|>", model_max_length=5)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|b|>"}}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.names["eos_token"], set(tokenizer.eos_ids)) == ("<|b|>", {a, b})  # either ends an answer
    write_folder(tmp_path, tokenizer_json, eos_token="<|a|>", added_tokens_decoder={})
    tokenizer = Tokenizer.from_folder(tmp_path, eos_ids=(7, a))
    assert (tokenizer.names["eos_token"], tokenizer.eos_ids) == ("<|a|>", (7, a, b))


def test_described_tokens_are_added_with_their_ids_and_flags(tmp_path):
    tokenizer_json = sentencepiece("<|old|>")
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    described = {
        "512": {"content": "<|old|>", "rstrip": True, "special": False, **flags},
        "513": {"content": "<|new|>", "rstrip": False, "special": True, **flags},
    }
    ours = Tokenizer.from_folder(
        write_folder(tmp_path, tokenizer_json, bos_token="<s>", added_tokens_decoder=described)
    )
    assert ours.encode("a<|old|>  b<|new|>c", special=True) == [1, 261, 512, 268, 513, 280]
    assert ours.special_ids == {0, 1, 2, 512, 513}
    described["515"] = described.pop("513")
    with pytest.raises(CheckpointError, match=r"515: '<\|new\|>' has id 513 in tokenizer.json"):
        Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, bos_token="<s>", added_tokens_decoder=described))


def test_a_named_token_without_a_row_in_the_model_is_not_made_up(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, sentencepiece(), bos_token="<s>", pad_token="[PAD]"))
    assert tokenizer.vocab_size == 512
    assert tokenizer.token_to_id("[PAD]") is None


# BOS


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("written", [True, False])
def test_bos_comes_once_if_the_files_want_it(tmp_path, flag, written):
    """transformers obeys add_bos_token if it is given as an argument."""
    tokenizer_json = sentencepiece()
    if not written:
        tokenizer_json["post_processor"] = None
    settings_ = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if flag is None else {"add_bos_token": flag})
    folder = write_folder(tmp_path, tokenizer_json, **settings_)
    ids = Tokenizer.from_folder(folder).encode("a cat")
    assert ids == transformers_tokenizer(folder).encode("a cat")
    assert ids.count(1) == (written if flag is None else flag)


def test_bos_comes_from_the_model_where_the_tokenizer_names_none(tmp_path):
    tokenizer_json = sentencepiece() | {"post_processor": None}
    folder = write_folder(tmp_path, tokenizer_json, add_bos_token=True)
    assert Tokenizer.from_folder(folder).encode("a") == [261]
    assert Tokenizer.from_folder(folder, bos_id=2).encode("a") == [2, 261]
    with pytest.raises(ConfigError, match="BOS: found token id 600, which is no token"):
        Tokenizer.from_folder(folder, bos_id=600)


def test_what_else_the_post_processor_puts_before_a_text_stays_and_nothing_comes_after(tmp_path):
    tokenizer_json = byte_level("[gMASK]", "<sop>", "</end>")
    ids = [token["id"] for token in tokenizer_json["added_tokens"]]
    tokenizer_json["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[gMASK]", "type_id": 0}},
            {"SpecialToken": {"id": "<sop>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</end>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in zip(("[gMASK]", "<sop>", "</end>"), ids, strict=True)
        },
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json))
    assert tokenizer.encode("a cat") == [*ids[:2], *tokenizer.encode("a cat", bos=False)]
    assert tokenizer.encode("") == ids[:2]
    write_folder(tmp_path, None, add_bos_token=True, bos_token="<sop>")
    assert Tokenizer.from_folder(tmp_path).encode("") == ids[:2]


# Files


def test_settings_of_training_cut_nothing_off(tmp_path):
    tokenizer_json = sentencepiece()
    whole = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json)).encode(CORPUS)
    tokenizer_json["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer_json["padding"] = {
        "strategy": {"Fixed": 4096},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    assert Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json)).encode(CORPUS) == whole
    assert len(whole) > 100


def test_a_missing_tokenizer_json_is_named_with_the_way_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found; a model folder needs it"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model.*convert it once.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[1]", "\x00\xff", '{"version": "1.0", "model": {"type": "Odd"}}'])
def test_a_damaged_tokenizer_json_is_named(tmp_path, damage):
    (tmp_path / "tokenizer.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: \S") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "Odd" not in damage or "found a model of type 'Odd', expected BPE, Unigram" in str(caught.value)


def test_a_broken_template_file_is_named(tmp_path):
    messages = [{"role": "user", "content": "a"}]
    folder = write_folder(tmp_path, sentencepiece())
    (folder / "chat_template.jinja").write_text("a\n{% if")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: line 2: unexpected"):
        Tokenizer.from_folder(folder).encode_chat(messages)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 / 0 }}")
    with pytest.raises(ConfigError, match=r": chat template 'rag': ZeroDivisionError"):
        Tokenizer.from_folder(folder).encode_chat(messages, template="rag")
    for path in (folder / "chat_template.jinja", folder / "additional_chat_templates" / "rag.jinja"):
        path.write_text(" \n")
    assert Tokenizer.from_folder(folder).chat_template is None  # nothing is no template


@pytest.mark.parametrize("where", range(40, 19_000, 1_700))
def test_a_cut_off_tokenizer_json_is_named(tmp_path, where):
    (tmp_path / "tokenizer.json").write_bytes((STORIES / "tokenizer.json").read_bytes()[:where])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token: found 'yes', expected true or false"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object with token ids"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: expected an object with token ids"),
        ({"added_tokens_decoder": {"3": {"special": True}}}, "added_tokens_decoder: 3: found"),
        (
            {"added_tokens_decoder": {"512": {"content": "q", "lstrip": 1}}},
            "added_tokens_decoder: 512: lstrip: found 1, expected true",
        ),
        ({"bos_token": {"content": 5}}, "bos_token: found"),
        ({"additional_special_tokens": "<a>"}, "additional_special_tokens: found str, expected a list"),
        ({"additional_special_tokens": [3]}, "additional_special_tokens: found 3"),
        ({"chat_template": 5}, "chat_template: expected a template or a list"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected a template or a list"),
    ],
)
def test_a_malformed_tokenizer_config_is_named(tmp_path, settings_, said):
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json: {said}"):
        Tokenizer.from_folder(write_folder(tmp_path, sentencepiece(), **settings_))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_an_unknown_decoder_is_named(tmp_path):
    tokenizer_json = byte_level()
    tokenizer_json["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedModelError, match=r'tokenizer\.json: found a decoder with \{"type": "WordPiece"'):
        Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json))


@pytest.mark.parametrize("bad", [-1, True, 1.5, "a", None, 2**32])
def test_bad_ids_and_texts_are_named(bad):
    tokenizer = Tokenizer.from_folder(STORIES)
    for take in (lambda: tokenizer.decode([403, bad]), lambda: tokenizer.id_to_token(bad)):
        with pytest.raises(ConfigError, match="token ids: found"):
            take()
    with pytest.raises(ConfigError, match="encode: found bytes, expected a string"):
        tokenizer.encode(b"a")
    with pytest.raises(ConfigError, match="found token id 512, expected one below 512"):
        tokenizer.token_bytes(512)


def test_half_surrogates_become_replacement_characters(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_token_bytes(tmp_path):
    stories = Tokenizer.from_folder(STORIES)
    assert [stories.token_bytes(i) for i in (403, 3 + 0xE4, 1)] == [b" Once", b"\xe4", b"<s>"]
    bpe = Tokenizer.from_folder(write_folder(tmp_path, byte_level("<|终|>")))
    text = "naïve 你好 👍🏽\n\t"
    assert b"".join(map(bpe.token_bytes, bpe.encode(text))) == text.encode()
    assert {bpe.token_bytes(i) for i in range(bpe.vocab_size)} >= {bytes([byte]) for byte in range(256)}
    assert bpe.token_bytes(bpe.vocab_size - 1) == "<|终|>".encode()


def test_ids_with_a_text_are_those_whose_bytes_contain_it(tmp_path):
    for tokenizer in (Tokenizer.from_folder(STORIES), Tokenizer.from_folder(write_folder(tmp_path, byte_level()))):
        texts = ("\n", ":", "th")
        expected = {
            i for i in range(tokenizer.vocab_size) if any(text.encode() in tokenizer.token_bytes(i) for text in texts)
        }
        assert tokenizer.ids_with(texts) == expected
        assert any(tokenizer.token_bytes(i) != b"th" for i in tokenizer.ids_with(["th"]))
        assert tokenizer.ids_with([]) == frozenset()


# Text that pretends


def test_threads_share_a_tokenizer(folder):
    tokenizer = Tokenizer.from_folder(folder)
    texts = ["a<|im_end|>b", "plain text", "<s></s>", "<|endoftext|>"] * 50

    def both(text: str) -> tuple[list[int], list[int]]:
        return tokenizer.encode(text), tokenizer.encode(text, special=True)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(both, texts))
    assert results == [both(text) for text in texts]
    assert results[0][0] != results[0][1]


def test_pieces_of_a_unigram_model_that_are_control_tokens_are_never_found_in_text(tmp_path):
    """Its search for the best pieces ignores special tokens: the library matches them whatever the settings are."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((char, -5.0) for char in "abc<>/s")]
    backend = Backend(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer_json = json.loads(backend.to_str())
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, eos_token="</s>", unk_token="<unk>"))
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert 1 in backend.encode("a</s>b").ids  # what this is about
    for text in ("a</s>b", "</s>", "</s></s>c", "a </s"):
        ids = tokenizer.encode(text)
        assert 1 not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("x") == [2, 0]


def test_text_that_a_normalizer_turns_into_a_control_token_is_plain(tmp_path):
    tokenizer_json = byte_level({"content": "<|end|>", "special": True, "normalized": True})
    tokenizer_json["normalizer"] = json.loads(normalizers.NFKC().__getstate__())
    tokenizer = Tokenizer.from_folder(
        write_folder(
            tmp_path,
            tokenizer_json,
            eos_token="<|end|>",
            chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
        )
    )
    wide = "".join(chr(ord(char) + 0xFEE0) for char in "<|end|>")  # the full-width forms
    end = tokenizer.eos_ids[0]
    assert tokenizer.encode(wide, special=True) == [end]
    assert end not in tokenizer.encode(wide)
    ids = tokenizer.encode_chat([{"role": "user", "content": f"a {wide} b"}, {"role": "assistant", "content": "c"}])
    assert ids.count(end) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a <|end|> b<|end|>c<|end|>"


def test_a_broken_chat_template_hinders_chats_only(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level(*TURNS), chat_template=CHATML + "{% if"))
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template: line 6: unexpected"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])
    with pytest.raises(ConfigError, match="the model has no chat template"):
        Tokenizer.from_folder(STORIES).encode_chat([{"role": "user", "content": "a"}])
