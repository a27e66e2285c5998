"""Streams of text against one decode of all tokens by the tokenizers library; stop strings against brute force."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from exl.errors import ConfigError
from exl.sampling_params import SamplingParams
from exl.text.sink import TextSink
from exl.text.token_bytes import DecodingRules, TextDecoder
from exl.text.tokenizer import Tokenizer
from tests.unit.text.tokenizer_folders import CORPUS, STORIES, byte_level, plain, sentencepiece, write_folder

KINDS = ("byte_level", "sentencepiece", "no_strip", "metaspace", "no_decoder")
REPLACE, FUSE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text(alphabet=CORPUS)


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory):
    made = {}
    for kind in KINDS:
        added = ("<|end|>", plain("<think>"), plain("<终>"))
        tokenizer_json = byte_level(*added) if kind == "byte_level" else sentencepiece(*added)
        if kind == "no_strip":  # Gemma's decoder
            tokenizer_json["decoder"]["decoders"] = [REPLACE, {"type": "ByteFallback"}, FUSE]
        elif kind == "metaspace":
            tokenizer_json["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
        elif kind == "no_decoder":
            tokenizer_json["decoder"] = None
        folder = write_folder(tmp_path_factory.mktemp(kind), tokenizer_json)
        made[kind] = Tokenizer.from_folder(folder), Backend.from_file(str(folder / "tokenizer.json"))
    return made


def decoded(backend: Backend, ids: list[int]) -> str:
    """The library's decoding, with invalid byte tokens handled here: the library would replace their whole run."""
    if not isinstance(backend.decoder, decoders.Sequence):
        return backend.decode(ids, skip_special_tokens=False)
    tokens, i = [], 0
    strings = [token for token in map(backend.id_to_token, ids) if token is not None]
    while i < len(strings):
        size = next((n for n in (1, 2, 3, 4) if is_character(strings[i : i + n])), 1)
        if size == 1 and byte_of(strings[i]) is None:
            tokens.append(strings[i])
        else:
            tokens += ["", *strings[i : i + size], ""] if tokens else [*strings[i : i + size], ""]
        i += size
    return backend.decoder.decode(tokens)


def byte_of(token: str) -> bytes | None:
    match = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return None if match is None else bytes.fromhex(match[1])


def is_character(tokens: list[str]) -> bool:
    values = [byte_of(token) for token in tokens]
    if None in values:
        return False
    try:
        return len(b"".join(values).decode()) == 1
    except UnicodeDecodeError:
        return False


class TextStream(TextSink):
    """A sink that bans nothing, of which only the text is wanted."""

    def push(self, token_id: int) -> str:
        return super().push(token_id).text


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join([*map(stream.push, ids), stream.finish()])


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The shortest prefix that ends in a stop string, without the longest stop string that it ends in."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=300)
def test_a_stream_of_any_tokens_adds_up_to_one_decode(tokenizers_, data, kind):
    """Ids of every kind: bytes that form no character, special and added tokens, and ids beyond the vocabulary."""
    tokenizer, backend = tokenizers_[kind]
    bytes_first = st.integers(3, 258) if kind != "byte_level" else st.integers(0, 255)
    ids = data.draw(st.lists(bytes_first | st.integers(0, tokenizer.vocab_size + 2)))
    whole = decoded(backend, ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole
    assert streamed(TextStream(tokenizer, skip_special_tokens=False), ids) == whole
    split = data.draw(st.integers(0, len(ids)))
    rest = streamed(TextStream(tokenizer, ids[:split], skip_special_tokens=False), ids[split:])
    shown = whole[: len(whole) - len(rest)]
    assert whole == shown + rest
    # All text of the prompt belongs to the prompt, except a character that the continuation completes.
    before = decoded(backend, ids[:split])
    assert before.startswith(shown)
    assert before[len(shown) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)


@given(prompt=TEXTS, text=TEXTS, kind=st.sampled_from(KINDS[:3]))
@settings(deadline=None, max_examples=200)
def test_a_stream_shows_each_character_when_its_last_byte_is_there(tokenizers_, prompt, text, kind):
    tokenizer, backend = tokenizers_[kind]
    prompt_ids, ids = tokenizer.encode(prompt, bos=False), tokenizer.encode(text, bos=False)
    whole = backend.decode(prompt_ids + ids)
    begins = len(backend.decode(prompt_ids))
    assume(whole[:begins] == backend.decode(prompt_ids))  # no run of byte tokens across the boundary
    stream = TextStream(tokenizer, prompt_ids)
    shown, done = "", b""
    for token_id in ids:
        shown += stream.push(token_id)
        done += tokenizer.token_bytes(token_id)
        complete = done.decode(errors="ignore")  # only its end can be incomplete
        assert whole[begins:].startswith(shown)
        assert len(shown) >= len(complete) - 1  # one space may be stripped from the start
    assert shown + stream.finish() == whole[begins:]


@given(text=TEXTS, data=st.data(), kind=st.sampled_from(KINDS[:3]))
@example(text="aXbcd", data=None, kind="byte_level")
@settings(deadline=None, max_examples=400)
def test_stop_strings_cut_where_brute_force_cuts(tokenizers_, text, data, kind):
    tokenizer, backend = tokenizers_[kind]
    ids = tokenizer.encode(text, bos=False)
    whole = backend.decode(ids)
    if data is None:
        stops = ["Xbcd", "bc", "c", "Xb"]
    else:
        starts = st.integers(0, max(len(whole) - 1, 0))
        piece = st.builds(lambda start, size: whole[start : start + size], starts, st.integers(1, 6))
        changed = st.builds(lambda piece, end: piece[:-1] + end, piece, st.sampled_from("aé \ufffd"))
        stops = [stop for stop in data.draw(st.lists(piece | changed, max_size=4)) if stop]
    expected, stopped = cut(whole, stops)
    stream = TextStream(tokenizer, [], stops)
    shown = ""
    for n, token_id in enumerate(ids, 1):
        shown += stream.push(token_id)
        assert expected.startswith(shown)
        if stopped is not None and stopped in backend.decode(ids[:n]).removesuffix("\ufffd"):
            assert stream.stopped is not None
    assert shown + stream.finish() == expected
    assert stream.stopped == stopped


# Examples


def test_the_space_before_a_continuation():
    tokenizer = Tokenizer.from_folder(STORIES)
    once_upon, a_time = tokenizer.encode("Once upon"), [261, 378]
    assert tokenizer.decode([*once_upon, *a_time]) == "Once upon a time"
    assert streamed(TextStream(tokenizer, once_upon), a_time) == " a time"
    assert streamed(TextStream(tokenizer, [1]), [*once_upon[1:], *a_time]) == "Once upon a time"
    assert streamed(TextStream(tokenizer), a_time) == "a time"
    assert TextStream(tokenizer, [1]).push(403) == "Once"


def test_a_character_of_byte_tokens_comes_whole():
    tokenizer = Tokenizer.from_folder(STORIES)
    smile = [3 + byte for byte in "🙂".encode()]
    stream = TextStream(tokenizer, [1, 403])
    assert [stream.push(token_id) for token_id in [*smile, *smile, 403]] == [*["", "", "", "🙂"] * 2, " Once"]
    for n in range(4):
        assert streamed(TextStream(tokenizer, [1, 403, *smile, 407, *smile[:n]]), smile[n:]) == "🙂"
    assert streamed(TextStream(tokenizer, [1, 403]), smile[:3]) == "\ufffd\ufffd\ufffd"
    # Text that was shown is never taken back, even if the run of byte tokens continues with an invalid byte.
    assert streamed(TextStream(tokenizer, [1, 403]), [*smile, 3 + 0xFF]) == "🙂\ufffd"


def test_replacement_characters_that_are_meant_are_not_held_back(tokenizers_):
    for kind in KINDS[:3]:
        tokenizer, _ = tokenizers_[kind]
        stream = TextStream(tokenizer, tokenizer.encode("a"))
        ids = tokenizer.encode("\ufffd" * 50)
        shown = [stream.push(token_id) for token_id in ids]
        assert "".join(shown).lstrip() == "\ufffd" * 50
        assert shown[-1]
        assert max(map(len, shown)) <= 2
        broken = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id) == b"\xff"]
        stream = TextStream(tokenizer)
        assert [stream.push(broken[0]) for _ in range(9)] == ["\ufffd"] * 9


def test_a_stop_string_within_and_across_tokens():
    tokenizer = Tokenizer.from_folder(STORIES)
    ids = tokenizer.encode("Once upon a time, Lily")
    for stop, expected in [
        ("pon a t", "Once u"),
        ("O", ""),
        ("y", "Once upon a time, Lil"),
        (" upon", "Once"),
        ("nc", "O"),
    ]:
        stream = TextStream(tokenizer, [], ["never", stop, "Once upon a time, Lily!"])
        shown = [stream.push(token_id) for token_id in ids]
        assert "".join(shown) == expected
        assert stream.stopped == stop
        assert stream.push(403) == stream.finish() == ""


def test_of_several_stop_strings_the_first_to_be_complete_counts_and_at_equal_ends_the_longest():
    tokenizer = Tokenizer.from_folder(STORIES)
    for stops, expected in [(["Once", "nc"], ("O", "nc")), (["ce", "Once", "nce"], ("", "Once"))]:
        stream = TextStream(tokenizer, [], stops)
        assert (stream.push(403), stream.stopped) == expected


def test_what_only_looked_like_a_stop_string_is_shown_when_it_turns_out():
    tokenizer = Tokenizer.from_folder(STORIES)
    stream = TextStream(tokenizer, [], ["Once upon a tree", "time!"])
    ids = tokenizer.encode("Once upon a time", bos=False)
    shown = [stream.push(token_id) for token_id in ids]
    assert shown[:3] == ["", "", ""]
    assert "".join(shown) == "Once upon a "
    assert stream.finish() == "time"
    assert stream.stopped is None
    assert stream.finish() == ""
    assert stream.push(403) == ""


def test_a_stop_string_may_be_what_an_incomplete_character_becomes():
    tokenizer = Tokenizer.from_folder(STORIES)
    stream = TextStream(tokenizer, [403], ["\ufffd"])
    assert stream.push(3 + 0xF0) == ""
    assert stream.stopped is None
    assert stream.finish() == ""
    assert stream.stopped == "\ufffd"


def test_special_tokens_are_left_out_unless_asked_for():
    tokenizer = Tokenizer.from_folder(STORIES)
    assert streamed(TextStream(tokenizer, [1]), [403, 2, 407]) == "Once upon"
    assert streamed(TextStream(tokenizer, [1], skip_special_tokens=False), [403, 2, 407]) == " Once</s> upon"


def test_bad_stop_strings_are_refused():
    tokenizer = Tokenizer.from_folder(STORIES)
    for stop in (5, [""], [b"a"], [None]):
        with pytest.raises(ConfigError, match="stop: found "):
            TextStream(tokenizer, [], stop)
    assert TextStream(tokenizer, [], SamplingParams(stop=("a",)).stop).stopped is None


def test_a_token_is_looked_at_once_and_a_prompt_at_its_ends():
    """The cost of a token does not grow with the text before it."""
    rules = DecodingRules(byte_fallback=True, strip_char=" ", strip_count=1)
    looked_at = []
    decoder = TextDecoder(rules, lambda token_id: looked_at.append(token_id) or "ab")
    decoder.skip(range(100_000))
    assert len(looked_at) <= 4
    looked_at.clear()
    assert "".join(map(decoder.push, range(1000))) == "ab" * 1000
    assert looked_at == list(range(1000))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]),
    ],
)
def test_decoders_that_are_not_known_are_not_guessed(decoder):
    backend = Backend(models.BPE())
    backend.decoder = decoder
    with pytest.raises(Exception, match="file: found a decoder with"):
        DecodingRules.of(backend.decoder, "file")
