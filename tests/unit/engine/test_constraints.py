"""Constraints against what defines them: jsonschema, Python's re, lists of texts, and a matcher made anew."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.engine.constraints import Constraint, Grammars, Matcher
from exl.errors import ConfigError, ConstraintError, ExlError
from exl.text.tokenizer import Tokenizer
from tests.unit.engine.json_schemas import document
from tests.unit.text.tokenizer_folders import byte_level, write_folder

assert llguidance  # without it this module is skipped
BUNDLED = Path(sys.modules["exl"].__file__).parent / "assets" / "stories"
PADDED = 37  # rows of a head for which there is no token


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> dict[str, Grammars]:
    """The bundled model's SentencePiece tokens, and byte-level ones with two tokens that end the text."""
    sentencepiece = Tokenizer.from_folder(BUNDLED)
    folder = write_folder(tmp_path_factory.mktemp("byte_level"), byte_level("<s>", "</s>", "<|im_end|>"))
    tokenizer = Tokenizer.from_folder(folder)
    eos = [tokenizer.token_to_id(token) for token in ("</s>", "<|im_end|>")]
    return {
        "sentencepiece": Grammars(sentencepiece, sentencepiece.vocab_size, sentencepiece.eos_ids),
        "byte_level": Grammars(tokenizer, tokenizer.vocab_size + PADDED, eos),
    }


@pytest.fixture(params=["sentencepiece", "byte_level"])
def grammars(request, kinds) -> Grammars:
    return kinds[request.param]


def allowed(matcher: Matcher, grammars: Grammars) -> list[int] | None:
    """The ids that may come next; None: all."""
    out = np.full(len(grammars.everything), 0xABABABAB, np.uint32)
    if not matcher.mask(out):
        assert (out == 0xABABABAB).all()
        return None
    bits = np.unpackbits(out.view(np.uint8), bitorder="little")
    assert not bits[grammars.vocab_size :].any()
    return np.flatnonzero(bits).tolist()


def ids_of(grammars: Grammars, text: str) -> list[int]:
    """Tokens of one byte each: any text has them, whatever the tokenizer merges."""
    first = {token: token_id for token_id, token in reversed(list(enumerate(grammars.token_bytes)))}
    return [first[bytes([byte])] for byte in text.encode()]


def text_of(grammars: Grammars, ids: list[int]) -> str:
    return b"".join(grammars.token_bytes[token_id] for token_id in ids).decode()


def generate(
    grammars: Grammars, matcher: Matcher, rng: random.Random, *, free: int = 40, most: int = 1500
) -> tuple[list[int], bool]:
    """Random tokens among those allowed; after ``free`` of them, mostly one that closes something. The tokens without
    an EOS, and whether the text ended."""
    closing = {b'"', b"}", b"]", b"@", *(b"%d" % digit for digit in range(10))}
    ids: list[int] = []
    while len(ids) < most:
        if matcher.is_finished:
            return ids, True
        choices = allowed(matcher, grammars)
        assert choices
        ends = [i for i in choices if i in grammars.eos_ids]
        assert not ends or set(ends) == grammars.eos_ids
        closers = ends or [i for i in choices if grammars.token_bytes[i] in closing]
        chosen = rng.choice(closers if closers and len(ids) >= free and rng.random() < 0.8 else choices)
        matcher.consume(chosen)
        if chosen in grammars.eos_ids:
            return ids, True
        ids.append(chosen)
    return ids, False


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_have_exls_bytes(grammars):
    for token_id, token in enumerate(grammars.token_bytes):
        if token and not token.startswith(b"\xff"):  # no text has this byte; llguidance means something by it
            assert grammars.tokens.decode_bytes([token_id]) == token
    assert grammars.tokens.vocab_size == grammars.vocab_size


def test_tokens_of_a_large_vocabulary_have_exls_bytes(smollm2):
    tokenizer = Tokenizer.from_folder(smollm2)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    for token_id, token in enumerate(grammars.token_bytes):
        assert token[:1] in (b"", b"\xff") or grammars.tokens.decode_bytes([token_id]) == token


def test_special_tokens_are_never_text(grammars):
    special = {i for i in range(grammars.vocab_size) if grammars.tokens.is_special_token(i)}
    matcher = grammars.matcher(Constraint("regex", "(.|\n)+"))
    first = set(allowed(matcher, grammars))
    assert not first & special
    matcher.consume(ids_of(grammars, "a")[0])
    assert set(allowed(matcher, grammars)) & special == grammars.eos_ids
    assert not any(grammars.token_bytes[i] == b"" for i in first)
    assert {i for i, token in enumerate(grammars.token_bytes) if token.isascii() and token} - special <= first


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_whatever_fulfils_200_random_schemas_is_valid(kinds, kind):
    grammars = kinds[kind]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    finished = 0
    for seed in range(200):
        rng = random.Random(seed)
        schema = document(rng)
        matcher = grammars.matcher(Constraint.of(json_schema=schema))
        ids, ended = generate(grammars, matcher, rng)
        finished += ended
        if ended:
            value = json.loads(text_of(grammars, ids))
            jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)
    assert finished >= 198


@pytest.mark.parametrize(
    "schema",
    [True, "object", {"type": "object"}, '{"type": "object"}'],
    ids=["true", "object", "dictionary", "text"],
)
def test_any_json_object(kinds, schema):
    grammars = kinds["byte_level"]
    for seed in range(5):
        ids, ended = generate(grammars, grammars.matcher(Constraint.of(json_schema=schema)), random.Random(seed))
        assert not ended or isinstance(json.loads(text_of(grammars, ids)), dict)


def test_a_pydantic_model_is_its_schema(kinds):
    pydantic = pytest.importorskip("pydantic")

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        people: int = pydantic.Field(ge=0)

    grammars = kinds["byte_level"]
    for seed in range(5):
        ids, ended = generate(grammars, grammars.matcher(Constraint.of(json_schema=City)), random.Random(seed))
        assert ended
        City.model_validate_json(text_of(grammars, ids))


def test_white_space_between_parts_of_json_is_bounded(kinds):
    grammars = kinds["byte_level"]
    constraint = Constraint.of(json_schema={"type": "array", "items": {"type": "integer"}})
    for text, taken in [
        ("[1, 2]", 6),
        ("[\n  1,\n  2\n]", 12),
        ("[  1", 2),
        ("[\n\n\n", 3),
        ("[" + "\n" + " " * 21, 22),
        (" [", 0),
    ]:
        ids = ids_of(grammars, text)
        out = np.zeros((len(ids) + 1, len(grammars.everything)), np.uint32)
        assert grammars.matcher(constraint).masks_ahead(ids, out) == taken, text


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{3}-[0-9]{4}",
        r"(yes|no|may be)",
        r"[A-Z][a-z]{0,5}( [A-Z][a-z]{0,5}){1,2}",
        r"é[^\n]{0,4}🙂",
        r"\d{2}[a-z_]\s",
        r"a/b\\c\"d",
        r"(?i)abc",
        r"x*y?z+",
        r"[\u4e00-\u9fff]{2}",
    ],
)
def test_regex(grammars, pattern):
    for seed in range(5):
        matcher = grammars.matcher(Constraint.of(regex=pattern))
        ids, ended = generate(grammars, matcher, random.Random(seed))
        assert not ended or re.fullmatch(pattern, text_of(grammars, ids))
        assert ended or "+" in pattern


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5))
def test_choices(kinds, choices):
    for grammars in kinds.values():
        found = set()
        for seed in range(4):
            ids, ended = generate(grammars, grammars.matcher(Constraint.of(choices=choices)), random.Random(seed))
            assert ended
            found.add(text_of(grammars, ids))
        assert found <= set(choices)


def test_each_choice_may_be_said(grammars):
    choices = ["Once", "Once upon", 'a "b"', "a\\b", "\n", "é", "🙂"]
    for choice in choices:
        matcher = grammars.matcher(Constraint.of(choices=choices))
        said = b""
        while said != choice.encode():
            rest = choice.encode()[len(said) :]
            # Where one continuation is forced, only its customary tokens are allowed.
            token_id = next(i for i in allowed(matcher, grammars) if rest.startswith(grammars.token_bytes[i] or b"?"))
            matcher.consume(token_id)
            said += grammars.token_bytes[token_id]
        assert matcher.is_finished or grammars.eos_ids < set(allowed(matcher, grammars))


def test_many_choices(grammars):
    choices = [f"{i * 7919 % 10_000} and more" for i in range(10_000)]
    for seed in range(3):
        ids, ended = generate(grammars, grammars.matcher(Constraint.of(choices=choices)), random.Random(seed))
        assert ended
        assert text_of(grammars, ids) in choices


SUMS = r"""
start: sum
sum: term (("+" | "-") term)*
term: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
SUMS_IN_GBNF = r"""
root ::= term (("+" | "-") term)*
term ::= number | "(" root ")"
number ::= [1-9] [0-9]{0,2}
"""


@pytest.mark.parametrize("grammar", [SUMS, SUMS_IN_GBNF], ids=["lark", "gbnf"])
def test_grammar(grammars, grammar):
    closing = 0
    for seed in range(10):
        matcher = grammars.matcher(Constraint.of(grammar=grammar))
        ids, ended = generate(grammars, matcher, random.Random(seed), most=400)
        if ended:
            text = text_of(grammars, ids)
            assert re.fullmatch(r"[0-9+()-]+", text)
            eval(text)
            closing += 1
    assert closing >= 5


# ---- where it begins -------------------------------------------------------------------------------------------------


def test_all_is_allowed_until_the_text_after_which_it_begins(grammars):
    matcher = grammars.matcher(Constraint.of(choices=["yes", "no"], after="So:"))
    for token_id in ids_of(grammars, "S S"):
        assert not matcher.has_begun
        allowed(matcher, grammars)
        matcher.consume(token_id)
        assert matcher.forced() == ()
        assert not matcher.is_finished
    for token_id in ids_of(grammars, "So:")[1:]:
        assert not matcher.has_begun
        matcher.consume(token_id)
    assert matcher.has_begun
    ids, ended = generate(grammars, matcher, random.Random(1))
    assert ended
    assert text_of(grammars, ids) in ("yes", "no")


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4), st.booleans())
def test_it_begins_behind_the_first_occurrence(kinds, text, after, as_ids):
    grammars = kinds["byte_level"]
    ids = ids_of(grammars, text)
    given_after = ids_of(grammars, after) if as_ids else after
    matcher = grammars.matcher(Constraint.of(regex="c+", after=given_after))
    for end in range(len(text) + 1):
        assert matcher.has_begun == (after in text[:end])
        if matcher.has_begun or end == len(text):
            break
        matcher.consume(ids[end])


def test_a_token_that_goes_beyond_the_beginning_is_forbidden(kinds):
    grammars = kinds["byte_level"]  # has " time there" in pieces, "the" among them
    token_ids = {token: token_id for token_id, token in enumerate(grammars.token_bytes)}
    t, the = token_ids[b"t"], token_ids[b" the"]
    matcher = grammars.matcher(Constraint.of(regex="x+", after="th"))
    first = allowed(matcher, grammars)
    assert first is not None
    beyond = {i for i, token in enumerate(grammars.token_bytes) if b"th" in token and token.split(b"th", 1)[1].strip()}
    assert the in beyond
    assert set(range(grammars.vocab_size)) - set(first) == beyond
    with pytest.raises(ConstraintError, match="goes on"):
        grammars.matcher(Constraint.of(regex="x+", after="th")).consume(the)
    matcher.consume(t)
    second = set(range(grammars.vocab_size)) - set(allowed(matcher, grammars))
    assert second >= {i for i, token in enumerate(grammars.token_bytes) if token[:1] == b"h" and token[1:].strip()}
    matcher.consume(token_ids[b"h"])
    assert matcher.has_begun


def test_white_space_behind_the_beginning_is_free(kinds):
    grammars = kinds["sentencepiece"]
    matcher = grammars.matcher(Constraint.of(regex="x+", after="d"))
    spaced = [i for i, token in enumerate(grammars.token_bytes) if re.fullmatch(rb"[a-z]*d\s+", token)]
    for token_id in spaced:
        copied = matcher.copy()
        copied.consume(token_id)
        assert copied.has_begun


def test_a_special_token_begins_it_as_it_is_written(kinds):
    grammars = kinds["byte_level"]
    token_id = grammars.token_bytes.index(b"<s>")
    for after in ("<s>", [token_id]):
        matcher = grammars.matcher(Constraint.of(choices=["a"], after=after))
        assert allowed(matcher, grammars) is None
        matcher.consume(token_id)
        assert text_of(grammars, allowed(matcher, grammars)) == "a"


# ---- back and ahead --------------------------------------------------------------------------------------------------

CONSTRAINTS = [
    Constraint.of(json_schema={"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}),
    Constraint.of(json_schema={"type": "array", "items": {"enum": ["Once upon a time", "there was", 17]}}),
    Constraint.of(regex="(ab|a)*c[0-9]{2,3}"),
    Constraint.of(grammar=SUMS),
    Constraint.of(choices=["Once upon a time", "Once there was", "On", "🙂🙃"]),
    Constraint.of(choices=["Once", "On"], after="the"),
    Constraint.of(regex="[0-9]+", after=[70, 71]),
]


def step(grammars: Grammars, matcher: Matcher, draw: int) -> int | None:
    """Consumes one allowed token, an EOS too; None where the text has ended."""
    if matcher.is_finished:
        return None
    choices = allowed(matcher, grammars)
    token_id = draw % grammars.vocab_size if choices is None else choices[draw % len(choices)]
    matcher.consume(token_id)
    return token_id


def same(grammars: Grammars, one: Matcher, other: Matcher) -> None:
    assert one.has_begun == other.has_begun
    assert one.is_finished == other.is_finished
    assert one.forced() == other.forced()
    assert allowed(one, grammars) == allowed(other, grammars)


DRAWS = st.lists(st.integers(0, 10**6), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["sentencepiece", "byte_level"]),
    st.sampled_from(CONSTRAINTS),
    st.lists(st.tuples(DRAWS, st.integers(0, 12)), min_size=1, max_size=3),
)
def test_a_matcher_taken_back_is_a_new_one(kinds, kind, constraint, trips):
    grammars = kinds[kind]
    matcher, ids = grammars.matcher(constraint), []
    for draws, back in trips:
        for draw in draws:
            token_id = step(grammars, matcher, draw)
            if token_id is None or token_id in grammars.eos_ids:
                ids += [] if token_id is None else [token_id]
                break
            ids.append(token_id)
        back = min(back, len(ids))
        if ids and ids[-1] in grammars.eos_ids:
            back = max(back, 1)  # nothing comes after the end
        matcher.rollback(back)
        del ids[len(ids) - back :]
        fresh = grammars.matcher(constraint)
        for token_id in ids:
            fresh.consume(token_id)
        same(grammars, matcher, fresh)
        same(grammars, matcher.copy(), fresh)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["sentencepiece", "byte_level"]),
    st.sampled_from(CONSTRAINTS),
    DRAWS,
    st.lists(st.integers(0, 10**6), max_size=5),
    st.booleans(),
)
def test_masks_ahead_are_those_step_by_step(kinds, kind, constraint, before, draws, wrong):
    grammars = kinds[kind]
    matcher = grammars.matcher(constraint)
    for draw in before:
        if step(grammars, copied := matcher.copy(), draw) is None or copied._ids[-1:] in [
            [i] for i in grammars.eos_ids
        ]:
            break
        matcher = copied
    drafts: list[int] = []
    walked = matcher.copy()
    for draw in draws:
        token_id = step(grammars, walked, draw)
        if token_id is None:
            break
        drafts.append(token_id)
        if token_id in grammars.eos_ids and walked.has_begun:
            break
    num_legal = len(drafts)
    last = matcher.copy()
    for token_id in drafts:
        last.consume(token_id)
    choices = allowed(last, grammars)
    forbidden = [] if choices is None else sorted(set(range(grammars.vocab_size)) - set(choices))
    if wrong and forbidden:
        drafts += [forbidden[sum(draws) % len(forbidden)], *drafts]
    out = np.full((len(drafts) + 1, len(grammars.everything)), 7, np.uint32)
    assert matcher.masks_ahead(drafts, out) == num_legal
    assert (out[num_legal + 1 :] == 7).all()
    fresh = matcher.copy()
    for row in range(num_legal + 1):
        expected = grammars.everything.copy()
        fresh.mask(expected)
        assert (out[row] == expected).all()
        if row < num_legal:
            fresh.consume(drafts[row])


def test_drafts_of_ids_that_no_mask_has_are_not_allowed(grammars):
    matcher = grammars.matcher(Constraint.of(regex="a+"))
    out = np.zeros((2, len(grammars.everything)), np.uint32)
    for token_id in (-1, grammars.vocab_size, 10**9):
        assert matcher.masks_ahead([token_id], out) == 0


def test_forced_tokens_are_the_only_ones_allowed(grammars):
    schema = {"type": "object", "properties": {"the woods": {"const": "Once upon a time"}}, "required": ["the woods"]}
    matcher = grammars.matcher(Constraint.of(json_schema=schema | {"additionalProperties": False}))
    seen = 0
    while not matcher.is_finished:
        for token_id in matcher.forced() or allowed(matcher, grammars)[:1]:
            assert matcher.forced()[:1] in [(), (token_id,)]
            assert token_id in allowed(matcher, grammars)
            seen += len(allowed(matcher, grammars)) == 1
            matcher.consume(token_id)
    assert seen >= 5


def test_matchers_of_one_grammar_do_not_disturb_each_other(grammars):
    constraint = Constraint.of(regex="a{3}|b{3}")
    one, other = grammars.matcher(constraint), grammars.matcher(constraint)
    one.consume(ids_of(grammars, "a")[0])
    other.consume(ids_of(grammars, "b")[0])
    assert not set(allowed(one, grammars)) & set(allowed(other, grammars))


def test_threads_submit_at_once(grammars):
    found, errors = [], []

    def submit(seed: int) -> None:
        try:
            rng = random.Random(seed)
            for _ in range(10):
                text = f"{rng.randint(0, 3)}-[a-c]{{2}}"
                ids, ended = generate(grammars, grammars.matcher(Constraint.of(regex=text)), rng)
                found.append(ended and re.fullmatch(text, text_of(grammars, ids)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 40
    assert all(found)


# ---- ends and errors -------------------------------------------------------------------------------------------------


def test_without_eos_the_text_ends_where_nothing_may_follow(kinds):
    tokenizer = kinds["sentencepiece"]._tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.vocab_size + 3])  # 512 tokens: a word more inside
    assert not grammars.eos_ids
    ids, ended = generate(grammars, grammars.matcher(Constraint.of(regex="[0-9]{4}")), random.Random(0))
    assert ended
    assert re.fullmatch("[0-9]{4}", text_of(grammars, ids))
    matcher = grammars.matcher(Constraint.of(regex="a+"))
    matcher.consume(ids_of(grammars, "a")[0])
    assert {grammars.token_bytes[i].strip(b"a") for i in allowed(matcher, grammars)} == {b""}


def test_finished_is_whole_and_nothing_may_follow(grammars):
    matcher = grammars.matcher(Constraint.of(regex="ab?"))
    a, b = ids_of(grammars, "ab")
    matcher.consume(a)
    assert not matcher.is_finished
    assert grammars.eos_ids < set(allowed(matcher, grammars))
    matcher.consume(b)
    assert matcher.is_finished
    assert set(allowed(matcher, grammars)) == grammars.eos_ids


def test_a_forbidden_token_ends_that_text_alone(grammars):
    constraint = Constraint.of(regex="[0-9]{3}")
    matcher = grammars.matcher(constraint)
    x, seven = ids_of(grammars, "x7")
    matcher.consume(seven)
    with pytest.raises(ConstraintError, match="doesn't satisfy the grammar") as raised:
        matcher.consume(x)
    assert isinstance(raised.value, ExlError)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConstraintError):
        matcher.mask(np.zeros_like(grammars.everything))
    matcher.rollback(1)  # also out of an error
    fresh = grammars.matcher(constraint)
    fresh.consume(seven)
    same(grammars, matcher, fresh)


def test_what_turns_out_too_complex_ends_that_text_alone(kinds, monkeypatch):
    tokenizer = kinds["byte_level"]._tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [])
    limits = llguidance.LLParserLimits(max_items_in_row=100, verbose_errors=False)
    monkeypatch.setattr(grammars, "_limits", limits)
    matcher = grammars.matcher(Constraint.of(grammar='start: start start | start start start | "a"'))
    a, out, taken = ids_of(grammars, "a")[0], np.zeros((4, len(grammars.everything)), np.uint32), 0
    while matcher.masks_ahead([a] * 3, out) == 3:
        matcher.consume(a)
        taken += 1
    before = matcher.copy()
    for _ in range(10):  # what is too complex is only where the drafts would lead: the matcher is where it was
        assert matcher.masks_ahead([a] * 3, out) < 3
        same(grammars, matcher, before)

    def go_on() -> None:
        for _ in range(10):
            matcher.mask(out[0])
            matcher.consume(a)

    with pytest.raises(ConstraintError, match="items"):
        go_on()
    assert taken > 5
    assert grammars.matcher(Constraint.of(regex="a")).mask(out[0])


def test_more_than_was_consumed_cannot_be_taken_back(grammars):
    matcher = grammars.matcher(Constraint.of(regex="a+"))
    matcher.consume(ids_of(grammars, "a")[0])
    for count in (2, -1):
        with pytest.raises(ValueError, match=f"rollback: found {count} tokens"):
            matcher.rollback(count)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "("}, "regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex: .*look-around"),
        ({"regex": r"[^\s\S]"}, "regex: no token may come here"),
        ({"regex": ""}, "regex: found a constraint that allows only the empty text"),
        ({"grammar": "start: foo"}, "grammar: .*unknown name"),
        ({"grammar": 'start: a\na: a "x"'}, "grammar: no token may come here"),
        ({"grammar": "root ::= foo"}, "grammar: .*foo"),
        ({"grammar": "start: " + "(" * 10**5}, "grammar: .*too deeply nested"),
        ({"grammar": ""}, "grammar: "),
        ({"json_schema": {"type": "foo"}}, "json_schema: Invalid type: foo"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema: Unsatisfiable schema"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema: Unimplemented keys.*uniqueItems"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "json_schema: "),
        ({"json_schema": '{"type": "array", "items":' * 200 + "true" + "}" * 200}, "json_schema: .*recursion limit"),
        ({"regex": "a", "after": [10**6]}, "after: found token id 1000000, expected one below"),
    ],
)
def test_llguidance_names_what_is_wrong_before_anything_runs(grammars, options, words):
    with pytest.raises(ConfigError, match=f"^{words}") as raised:
        grammars.matcher(Constraint.of(**options))
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "a", "choices": ["a"]}, "found regex and choices, expected at most one of json_schema, regex"),
        ({"after": "a"}, "after: found 'a' and no constraint"),
        ({"regex": "a", "after": ""}, "after: found ''"),
        ({"regex": "a", "after": []}, r"after: found \[\]"),
        ({"regex": "a", "after": 5}, r"after: found 5 \(int\)"),
        ({"regex": "a", "after": [1, -1]}, "after: found -1"),
        ({"regex": "a", "after": [True]}, "after: found True"),
        ({"regex": 5}, r"regex: found 5 \(int\), expected a text"),
        ({"grammar": ["a"]}, "grammar: found"),
        ({"grammar": "a" * (2**19 + 1)}, "grammar: found 524289 characters, expected at most 524288"),
        ({"choices": "yes"}, "choices: found 'yes'"),
        ({"choices": []}, "choices: found 0"),
        ({"choices": ["a", ""]}, "choices: found ''"),
        ({"choices": ["a", 1]}, "choices: found 1"),
        ({"json_schema": False}, "json_schema: found False"),
        ({"json_schema": "[1]"}, r"json_schema: found '\[1\]'"),
        ({"json_schema": "{"}, "json_schema: Expecting property name"),
        ({"json_schema": {"const": float("nan")}}, "json_schema: Out of range float"),
        ({"json_schema": {"const": object()}}, "json_schema: Object of type object"),
        ({"json_schema": 5}, "json_schema: found 5"),
    ],
)
def test_options_are_checked_without_llguidance(options, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        Constraint.of(**options)


def test_no_option_is_no_constraint():
    assert Constraint.of() is None
    assert Constraint.of(choices=["b", "a", "b"]) == Constraint("choices", '["b", "a"]')


def test_a_missing_package_is_named(kinds, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install 'llguidance"):
        Grammars(kinds["byte_level"]._tokenizer, 10, [])


@pytest.mark.parametrize("kind", ["grammar", "json_schema"])
def test_long_chains_of_references_do_not_end_the_process(kinds, kind):
    count = 8_000  # overflow a stack of 8 MB
    if kind == "grammar":
        rules = "".join(f"a{i}: a{i + 1}\n" for i in range(count))
        options: dict[str, Any] = {"grammar": f'start: a0\n{rules}a{count}: "yes"'}
    else:
        chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
        options = {"json_schema": {"$defs": chain | {f"a{count}": {"const": "yes"}}, "$ref": "#/$defs/a0"}}
    grammars = kinds["byte_level"]
    before = threading.stack_size()
    ids, ended = generate(grammars, grammars.matcher(Constraint.of(**options)), random.Random(0))
    assert ended
    assert text_of(grammars, ids) == ("yes" if kind == "grammar" else '"yes"')
    assert threading.stack_size() == before


def test_only_the_latest_grammars_are_kept(kinds):
    grammars = kinds["byte_level"]
    for i in range(100):
        grammars.matcher(Constraint.of(regex=f"a{i}", after=f"b{i}"))
    assert len(grammars._compiled) <= 32
    assert len(grammars._openings) <= 32
    made = grammars._compiled["regex", "a99"]
    grammars.matcher(Constraint.of(regex="a99"))
    assert grammars._compiled["regex", "a99"] is made


def test_grammars_go_with_the_last_who_has_them():
    """llguidance's objects hold exl's, which the garbage collector does not see: a ring of both would stay for ever."""
    tokenizer = Tokenizer.from_folder(BUNDLED)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    matcher = grammars.matcher(Constraint.of(choices=["yes", "no"]))
    gone = weakref.ref(grammars)
    del grammars
    assert allowed(matcher, gone())  # a matcher has what it needs
    del matcher
    gc.collect()
    assert gone() is None
