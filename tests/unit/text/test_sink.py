"""The sink against a reference that reads the whole text again after each token, without any state."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.errors import ConfigError
from exl.sampling_params import checked_texts
from exl.text.sink import Rewind, TextSink, Verdict
from exl.text.token_bytes import DecodingRules, TextDecoder, _byte_level_alphabet
from exl.text.tokenizer import Tokenizer
from tests.unit.text.tokenizer_folders import STORIES

SENTENCEPIECE = DecodingRules(byte_fallback=True, replacements=(("▁", " "),), strip_char=" ", strip_count=1)
BYTE_LEVEL = DecodingRules(byte_level=True)
SPELLED = {byte: char for char, byte in _byte_level_alphabet().items()}


class Cuts:
    """A tokenizer whose tokens are any bytes. With byte fallback, a token is whole text or one byte."""

    def __init__(self, tokens: Sequence[bytes], rules: DecodingRules) -> None:
        self.tokens, self.rules = tokens, rules

    def text_decoder(self, *, skip_special_tokens: bool = True) -> TextDecoder:
        return TextDecoder(self.rules, self._spelled)

    def _spelled(self, token_id: int) -> str:
        token = self.tokens[token_id]
        if self.rules.byte_level:
            return "".join(SPELLED[byte] for byte in token)
        return f"<0x{token[0]:02X}>" if len(token) == 1 else token.decode().replace(" ", "▁")


# ---- the reference ---------------------------------------------------------------------------------------------------


def _mark(error: UnicodeDecodeError) -> tuple[str, int]:
    return chr(0xE000 + error.end - error.start), error.end


codecs.register_error("test.mark", _mark)


def characters(data: bytes, rules: DecodingRules) -> tuple[list[tuple[str, int]], int]:
    """The complete characters with the offset of each one's first byte, and the offset of what is incomplete.

    No text of these tests holds characters from U+E000 on, which stand for broken bytes here.
    """
    found, at = [], 0
    for char in codecs.getincrementaldecoder("utf-8")("test.mark").decode(data):
        size = ord(char) - 0xE000 if 0xE000 < ord(char) < 0xE005 else len(char.encode())
        broken = 0xE000 < ord(char) < 0xE005
        if broken and rules.byte_fallback:
            found += [("\ufffd", at + i) for i in range(size)]
        else:
            found.append(("\ufffd" if broken else char, at))
        at += size
    return found, at


class Reference:
    """Generates as the engine does, and after each token knows what must have been given out."""

    def __init__(self, tokens: Sequence[bytes], rules: DecodingRules, prompt: bytes, stop, banned) -> None:
        self.tokens, self.rules, self.prompt, self.stop, self.banned = tokens, rules, prompt, stop, banned
        self.ids: list[int] = []
        self.num_final = 0  # tokens that are never taken back

    def _read(self, num_tokens: int) -> tuple[list[tuple[str, int]], int, list[int]]:
        """Characters with first bytes, first incomplete byte, and each token's first byte: behind the prompt's."""
        data = b"".join(self.tokens[i] for i in self.ids[:num_tokens])
        whole, incomplete = characters(self.prompt + data, self.rules)
        if self.rules.strip_count and not self.prompt and whole[:1] == [(" ", 0)]:
            del whole[0]
        incomplete_before = characters(self.prompt, self.rules)[1]
        starts = [len(self.prompt) + len(b"".join(self.tokens[i] for i in self.ids[:n])) for n in range(num_tokens)]
        return [found for found in whole if found[1] >= incomplete_before], incomplete, starts

    def _owner(self, byte: int, starts: list[int]) -> int:
        return max([n for n, start in enumerate(starts) if start <= byte], default=0)

    def push(self, token_id: int) -> tuple[str, str | None, Rewind | None, int]:
        """Everything given out so far, the stop string, the rewind, and the number of final tokens."""
        self.ids.append(token_id)
        whole, incomplete, starts = self._read(len(self.ids))
        text = "".join(char for char, _ in whole)
        for end in range(len(text) + 1):
            for ban in sorted(self.banned, key=len):
                if text[:end].endswith(ban):
                    first = max(self._owner(whole[end - len(ban)][1], starts), self.num_final)
                    rewind = Rewind(len(self.ids) - first, self.ids[first])
                    del self.ids[first:]
                    return "", None, rewind, 0
            for stop in sorted(self.stop, key=len, reverse=True):
                if text[:end].endswith(stop):
                    return text[: end - len(stop)], stop, None, len(self.ids)
        data = self.prompt + b"".join(self.tokens[i] for i in self.ids)
        begun = [whole[len(text) - n][1] for n in self._open(text, self.banned)]
        begun += [incomplete] if self.banned and incomplete < len(data) else []
        owners = [self._owner(byte, starts) for byte in begun]
        self.num_final = max(self.num_final, min(owners, default=len(self.ids)))
        num = min(self._num_safe(n) for n in (self.num_final, len(self.ids)))
        return text[:num], None, None, self.num_final

    def _num_safe(self, num_tokens: int) -> int:
        """Characters of the first tokens that no stop string can cut off."""
        text = "".join(char for char, _ in self._read(num_tokens)[0])
        return len(text) - max(self._open(text, self.stop), default=0)

    @staticmethod
    def _open(text: str, strings: Sequence[str]) -> list[int]:
        return [n for n in range(1, len(text) + 1) for s in strings if n < len(s) and s[:n] == text[len(text) - n :]]


def check(tokens: Sequence[bytes], rules, prompt_ids, ranks, stop, banned) -> None:
    """Draws the best token that is not blocked, of one order of tokens per position, and compares after each."""
    sink = TextSink(Cuts(tokens, rules), prompt_ids, stop, banned)  # type: ignore[arg-type]
    reference = Reference(tokens, rules, b"".join(tokens[i] for i in prompt_ids), stop, banned)
    blocked: dict[int, set[int]] = {}
    given, rewinds, final = "", 0, 0
    while (position := len(reference.ids)) < len(ranks) and rewinds < 30:
        token_id = next((i for i in ranks[position] if i not in blocked.get(position, ())), None)
        if token_id is None:
            break
        verdict = sink.push(token_id)
        text, stopped, rewind, num_final = reference.push(token_id)
        assert verdict.rewind == rewind
        given += verdict.text
        assert sink.num_tokens == len(reference.ids)
        if rewind is not None:
            assert len(reference.ids) >= final
            assert verdict == Verdict(rewind=rewind)
            blocked = {at: ids for at, ids in blocked.items() if at <= len(reference.ids)}
            blocked.setdefault(len(reference.ids), set()).add(rewind.blocked)
            rewinds += 1
            continue
        assert (given, verdict.stopped, sink.num_final_tokens) == (text, stopped, num_final)
        final = num_final
        if stopped is not None:
            assert sink.push(token_id) == Verdict()
            assert sink.finish() == ""
            assert not any(ban in given for ban in banned)
            return
    whole, incomplete, _ = reference._read(len(reference.ids))
    text = "".join(char for char, _ in whole)
    data = reference.prompt + b"".join(tokens[i] for i in reference.ids)
    num_open = len(data) - incomplete
    text += "\ufffd" * (num_open if rules.byte_fallback else min(num_open, 1))
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    text = text[: min(ends)[1]] if ends else text
    assert given + sink.finish() == text
    assert not any(ban in text for ban in banned if "\ufffd" not in ban)


ALPHABET = ["a", "b", " ", "é", "🙂"]
TEXTS = st.text(alphabet=ALPHABET, min_size=1, max_size=4)
PIECES = st.text(alphabet=ALPHABET, min_size=2, max_size=3).map(str.encode).filter(lambda data: len(data) > 1)
BYTES = st.sampled_from([bytes([byte]) for char in ALPHABET for byte in char.encode()] + [b"\xff", b"\xf0", b"\xc3"])
# Any cut of such texts, also within characters, and bytes that are none.
RAW = st.lists(st.sampled_from([byte for char in ALPHABET for byte in char.encode()]), max_size=5).map(bytes)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]))
def test_it_does_what_the_reference_does(data, rules):
    kinds = BYTES | PIECES | RAW if rules.byte_level else BYTES | PIECES
    tokens = data.draw(st.lists(kinds, min_size=2, max_size=6, unique=True))
    order = st.permutations(range(len(tokens)))
    ranks = data.draw(st.lists(order, max_size=14))
    prompt_ids = data.draw(st.lists(st.sampled_from(range(len(tokens))), max_size=2))
    strings = st.lists(TEXTS | st.just("\ufffd"), max_size=2)
    check(tokens, rules, prompt_ids, ranks, data.draw(strings), data.draw(strings))


@pytest.fixture(scope="module")
def stories():
    return Tokenizer.from_folder(STORIES)


def test_a_banned_string_takes_its_tokens_back_and_is_not_shown_in_part(stories):
    once, upon, a, time = stories.encode("Once upon a time", bos=False)
    sink = TextSink(stories, [1], banned="upon a time")
    assert [sink.push(token_id).text for token_id in (once, upon, a)] == ["Once", "", ""]
    assert sink.num_final_tokens == 1
    # The ban begins with "u", whose token is " upon": the space, held back with it, is taken back, too.
    assert sink.push(time) == Verdict(rewind=Rewind(3, upon))
    assert (sink.num_tokens, sink.num_final_tokens) == (1, 1)
    assert sink.push(a).text == " a"
    assert sink.finish() == ""


def test_what_is_given_out_stays_though_a_ban_begins_in_it():
    sink = TextSink(Cuts([b"x", b"y"], BYTE_LEVEL), [], banned="xy")  # type: ignore[arg-type]
    assert [sink.push(0).text for _ in range(3)] == ["", "x", "x"]
    # The last x is taken back, and so would the one before it be for a y in its place: but that one is given out.
    assert [sink.push(1).rewind for _ in range(2)] == [Rewind(2, 0), Rewind(1, 1)]
    assert (sink.num_tokens, sink.num_final_tokens, sink.finish()) == (2, 2, "")


def test_a_final_token_whose_text_is_held_for_a_stop_string_is_not_taken_back():
    sink = TextSink(Cuts([b"x", b"y"], BYTE_LEVEL), [], stop="xxz", banned="xy")  # type: ignore[arg-type]
    assert [sink.push(0).text for _ in range(2)] == ["", ""]
    assert sink.num_final_tokens == 1
    assert [sink.push(1).rewind for _ in range(2)] == [Rewind(2, 0), Rewind(1, 1)]
    assert (sink.num_tokens, sink.num_final_tokens, sink.finish()) == (1, 1, "x")


def test_case_counts(stories):
    ids = stories.encode("Once upon a time", bos=False)
    sink = TextSink(stories, [1], stop="UPON", banned=["once", "TIME"])
    assert "".join(sink.push(token_id).text for token_id in ids) + sink.finish() == "Once upon a time"


def test_a_stop_string_before_a_ban_ends_the_text_and_a_ban_with_it_does_not(stories):
    ids = stories.encode("Once upon a time", bos=False)
    sink = TextSink(stories, [1], stop=" upo", banned="upon")
    assert [sink.push(token_id) for token_id in ids[:2]] == [Verdict("Once"), Verdict("", " upo")]
    sink = TextSink(stories, [1], stop="on", banned="upon")
    assert [sink.push(token_id) for token_id in ids[:2]] == [Verdict("Once"), Verdict(rewind=Rewind(1, ids[1]))]


def test_nothing_is_held_for_a_ban_that_did_not_come(stories):
    sink = TextSink(stories, [1], banned="Once upon a tree")
    ids = stories.encode("Once upon a time, there", bos=False)
    pieces = [sink.push(token_id).text for token_id in ids]
    assert pieces[:3] == ["", "", ""]
    assert pieces[3] == "Once upon a time"
    assert sink.num_final_tokens == len(ids)


def test_tokens_are_taken_back_unless_their_text_is_out(stories):
    once, upon, a, time = stories.encode("Once upon a time", bos=False)
    sink = TextSink(stories, [1], stop="upon a time")
    for token_id in (once, upon, a):
        sink.push(token_id)  # "Once " is given out
    sink.truncate(3)
    sink.truncate(2)
    assert sink.push(time).text == "upon time"
    for num_tokens in (2, 0, -1, 4):
        with pytest.raises(ValueError, match=f"truncate: found {num_tokens}, expected"):
            sink.truncate(num_tokens)
    sink = TextSink(stories, [1])
    smile = stories.encode("\U0001f642", bos=False)[-4:]
    for token_id in smile[:3]:
        assert sink.push(token_id) == Verdict()
    sink.truncate(1)
    assert [sink.push(token_id).text for token_id in smile[1:]] == ["", "", "\U0001f642"]


def test_taking_back_is_as_if_it_had_never_been(stories):
    ids = stories.encode("Once upon a time, there was a \U0001f642", bos=False)
    for kept in range(len(ids)):
        straight, back = (TextSink(stories, [1], stop=["never", "time, there was X"]) for _ in range(2))
        for token_id in ids[:kept]:
            assert straight.push(token_id) == back.push(token_id)
        if back.push(ids[5]).text:
            continue
        back.truncate(kept)
        for token_id in ids[kept:]:
            assert straight.push(token_id) == back.push(token_id)
        assert straight.finish() == back.finish()


@pytest.mark.parametrize("value", [[""], ["a", 1], 3, b"a", ["a"] * 65, ["a" * 1025], {"a"}])
def test_wrong_strings_are_named(stories, value):
    with pytest.raises(ConfigError, match=r"^banned_strings: found"):
        TextSink(stories, [], (), value)
    with pytest.raises(ConfigError, match=r"^stop: found"):
        TextSink(stories, [], value)


def test_strings_are_kept_as_a_tuple():
    assert checked_texts("banned_strings", "a") == ("a",)
    assert checked_texts("banned_strings", ["a", "b"]) == ("a", "b")
    assert checked_texts("banned_strings", ()) == ()
