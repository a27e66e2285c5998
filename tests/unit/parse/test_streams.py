"""Each answer of the corpus is read the same, however its tokens come and whatever its tags are in the vocabulary."""

from __future__ import annotations

import random

import pytest

from exl.parse.choose import AnswerFormat, parser_for
from exl.parse.formats import TOOL_FORMATS
from exl.text.tokenizer import Tokenizer
from tests.unit.parse.streams import STREAMS, TOOLS, Stream, joined, parts_of
from tests.unit.parse.vocabularies import ids_of, stories, vocabulary_of


def format_of(stream: Stream) -> AnswerFormat:
    return AnswerFormat(stream.tools, stream.reasoning)


def read(stream: Stream, vocabulary: Tokenizer, ids: list[int], cuts: list[int]):
    parser = parser_for(
        format_of(stream),
        vocabulary,
        tools=TOOLS if stream.with_tools else None,
        prompt_ids=ids_of(vocabulary, stream.prompt) if stream.prompt else (),
        stop=stream.stop,
    )
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        parts += parser.push(ids[start:stop])
    parts += parser.finish()
    assert parser.push(ids) == parser.finish() == []
    return joined(parts), parser.is_whole


CASES = [(stream, kind) for stream in STREAMS for kind in stream.kinds]


@pytest.mark.parametrize(("stream", "kind"), CASES, ids=lambda case: case if isinstance(case, str) else case.name)
def test_an_answer_is_read_the_same_wherever_it_is_cut(stream, kind):
    vocabulary = vocabulary_of(format_of(stream), kind)
    ids = ids_of(vocabulary, stream.answer)
    expected = parts_of(stream.parts), stream.whole
    assert read(stream, vocabulary, ids, []) == expected
    assert read(stream, vocabulary, ids, list(range(1, len(ids)))) == expected
    for cut in range(1, len(ids)):
        assert read(stream, vocabulary, ids, [cut]) == expected, f"cut at {cut}"
    seeded = random.Random(stream.name)
    for _ in range(10):
        cuts = sorted(seeded.sample(range(len(ids)), k=min(len(ids), seeded.randint(0, 9))))
        assert read(stream, vocabulary, ids, cuts) == expected, f"cut at {cuts}"


# DeepSeek's tags hold the character that stands for a space in SentencePiece's vocabularies, so no such model has them.
@pytest.mark.parametrize(
    "stream",
    [s for s in STREAMS if "bytes" in s.kinds and not s.prompt and s.tools != "deepseek"],
    ids=lambda s: s.name,
)
def test_of_a_sentencepiece_vocabulary_too(stream):
    vocabulary = stories()
    ids = ids_of(vocabulary, "".join(p if isinstance(p, str) else p.text for p in stream.answer))
    expected = parts_of(stream.parts), stream.whole
    assert read(stream, vocabulary, ids, []) == expected
    assert read(stream, vocabulary, ids, list(range(1, len(ids)))) == expected


def test_there_are_streams_of_all_formats():
    assert {stream.tools for stream in STREAMS} == {*TOOL_FORMATS, "harmony", "none"}
    assert len({(stream.tools, stream.name) for stream in STREAMS}) == len(STREAMS) > 100
