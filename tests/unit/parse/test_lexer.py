"""The lexer's text is the engine's, and is cut in the same place."""

from __future__ import annotations

from functools import lru_cache

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from exl.parse.lexer import Lexer, Tag
from exl.text.sink import TextSink
from exl.text.tokenizer import Tokenizer
from tests.unit.parse.vocabularies import byte_level, ids_of, stories

TAGS = ("<a>", "</a>", "[B]")


@lru_cache(maxsize=1)
def vocabulary() -> Tokenizer:
    """Bytes, two special tags, one that is not, and a special token that is no tag."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<a>", "</a>", "<x>")])
    backend.add_tokens([AddedToken("[B]", special=False, normalized=False)])
    return Tokenizer(backend)


def sink_text(ids: list[int], prompt: list[int], stop: list[str]) -> tuple[str, str | None]:
    sink = TextSink(vocabulary(), prompt, stop)
    text = "".join([sink.push(token_id).text for token_id in ids]) + sink.finish()
    return text, sink.stopped


def lexed(ids: list[int], prompt: list[int], stop: list[str], cuts: list[int]) -> tuple[list, str | None]:
    lexer = Lexer(vocabulary(), TAGS, prompt, stop)
    found = [
        item for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True) for item in lexer.push(ids[start:end])
    ]
    items: list = []
    for item in [*found, *lexer.finish()]:
        if items and isinstance(item, str) and isinstance(items[-1], str):
            items[-1] += item
        else:
            items.append(item)
    assert lexer.stopped is None or lexer.push(ids) == lexer.finish() == []
    return items, lexer.stopped


def text_of(items: list) -> str:
    return "".join(item if isinstance(item, str) else item.text for item in items)


PIECES = st.sampled_from(["<a>", "</a>", "[B]", "<x>", "<", "a", ">", "b", "B]", "[", "é", "東"])
STOPS = st.lists(st.sampled_from(["ab", "b[B", "B]", "]b", "[B]", "aé", "a<", "[B]b", "<a>", "\ufffd"]), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12), STOPS, st.data())
@example(["a", "<a>", "b"], ["ab"], None)
@example(["a", "[B]", "b"], ["[B]b"], None)
def test_the_text_is_the_engines_and_tags_are_where_they_were(pieces, stop, data):
    ids = [token_id for piece in pieces for token_id in ids_of(vocabulary(), piece)]
    if data is not None and ids and data.draw(st.booleans()):  # bytes that are no characters
        del ids[data.draw(st.integers(0, len(ids) - 1))]
    cuts = [] if data is None else sorted(data.draw(st.sets(st.integers(1, max(len(ids) - 1, 1)), max_size=4)))
    cuts = [cut for cut in cuts if cut < len(ids)]
    items, stopped = lexed(ids, [], stop, cuts)
    assert (text_of(items), stopped) == sink_text(ids, [], stop)
    assert (items, stopped) == lexed(ids, [], stop, list(range(1, len(ids))))
    if not stop:
        own = {vocabulary().added_ids[tag]: tag for tag in TAGS}
        assert [item.name for item in items if isinstance(item, Tag)] == [own[i] for i in ids if i in own]


def test_a_tag_behind_the_beginning_of_a_stop_string_goes_with_it():
    assert lexed(ids_of(vocabulary(), "xa<a>b"), [], ["ab"], []) == (["x"], "ab")
    assert lexed(ids_of(vocabulary(), "xa<a>c"), [], ["ab"], [1, 2, 3]) == (["xa", Tag("<a>", ""), "c"], None)
    assert lexed(ids_of(vocabulary(), "x<a>ab"), [], ["ab"], []) == (["x", Tag("<a>", "")], "ab")


def test_a_stop_string_inside_a_tag_makes_its_beginning_text():
    assert lexed(ids_of(vocabulary(), "x[B]y"), [], ["B"], []) == (["x["], "B")


def test_a_spelled_tag_is_text_where_the_vocabulary_has_it():
    ids = [token_id for char in "[B]<a>" for token_id in ids_of(vocabulary(), char)]
    assert lexed(ids, [], [], []) == (["[B]<a>"], None)


def test_a_character_that_the_prompt_left_incomplete_is_the_answers():
    ids = ids_of(vocabulary(), "東")
    assert lexed(ids[1:], ids[:1], [], []) == (["東"], None)


def test_a_sentencepiece_answer_behind_a_prompt_keeps_its_space():
    tokenizer = stories()
    lexer = Lexer(tokenizer, (), tokenizer.encode("Once"))
    assert lexer.push(tokenizer.encode("upon", bos=False)) == [" upon"]
