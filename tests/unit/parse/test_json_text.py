"""JSON that comes piece by piece is what Python's json reads."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.parse.json_text import MAX_DEPTH, JsonText, checked_object
from exl.parse.reader import Malformed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def copied(text: str, cuts: tuple[int, ...] = ()) -> str | None:
    """A copy of a value with a space behind it; None if it is none."""
    value = JsonText()
    out = []
    text += " "
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        try:
            at, copy = value.feed(text[start:stop])
        except Malformed:
            return None
        out.append(copy)
        if value.done:
            return "".join(out) if not text[start + at :].strip(" \t\n\r") else None
    return None


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans(), st.booleans(), st.data())
def test_json_is_copied_as_it_is(value, ascii_only, spaced, data):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1 if spaced else None)
    cuts = tuple(sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4))))
    assert copied(text, cuts) == copied(text) == text


@settings(max_examples=1500, deadline=None)
@given(st.text(alphabet='{}[]",:\\ue12.-+0 truefalsn\n', max_size=12))
def test_it_takes_what_python_takes(text):
    """Control characters in strings are taken, as with ``strict=False``, and then are escaped."""
    try:
        expected = json.loads(text, strict=False)
    except ValueError:
        assert copied(text) is None
        return
    copy = copied(text)
    assert copy is not None
    assert json.loads(copy) == expected


@pytest.mark.parametrize("text", ["NaN", "Infinity", "01", "1.", ".5", "'a'", "{a: 1}", "[1,]", "{,}", "True", "// x"])
def test_what_is_no_json(text):
    assert copied(text) is None


def test_nesting_is_bounded():
    assert copied("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert copied("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None
    assert copied("[" * (MAX_DEPTH - 1) + '{"a":1}' + "]" * (MAX_DEPTH - 1)) is not None


def test_the_wrong_character_is_named_with_what_was_read():
    with pytest.raises(Malformed) as raised:
        JsonText().feed('{"a": x}')
    assert raised.value.args == (6, '{"a": ')


@pytest.mark.parametrize("text", ["[]", '{"a": 1} x', "", "1", '"{}"', "{"])
def test_arguments_in_a_string_are_an_object(text):
    with pytest.raises(Malformed):
        checked_object(text)
    assert checked_object(' {"a": 1} ').strip() == '{"a": 1}'
