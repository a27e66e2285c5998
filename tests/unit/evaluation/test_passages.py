"""Which tokens of a text are predicted from which, counted by hand."""

from __future__ import annotations

import pytest

from exl.errors import ConfigError
from exl.evaluation.passages import Passage, as_passages, read_chunks, read_documents, read_passages
from exl.text.tokenizer import Tokenizer
from tests.unit.evaluation.letters import BOS, letters


@pytest.fixture
def write(tmp_path):
    def written(text: str):
        path = tmp_path / "text.txt"
        path.write_text(text)
        return path

    return written


@pytest.mark.parametrize("bos", [True, False])
def test_chunks(write, bos):
    """22 letters in windows of 8: with BOS the text is 23 tokens, and BOS stands for the first token of each chunk."""
    tokenizer = letters(bos=bos)
    found = read_chunks(write("abcdefghijklmnopqrstuv\n"), tokenizer, 8)
    texts = [tokenizer.decode(list(passage.ids)) for passage in found]
    if bos:
        assert texts == ["abcdefg", "ijklmno"]
        assert [passage.ids[0] for passage in found] == [BOS, BOS]
    else:
        assert texts == ["abcdefgh", "ijklmnop"]
    assert [(len(passage.ids), passage.first, passage.num_predicted) for passage in found] == [(8, 5, 3)] * 2


def test_chunks_of_an_odd_window(write):
    (found,) = read_chunks(write("abcdefghijk"), letters(), 9)
    assert (found.first, found.num_predicted) == (5, 4)


def test_the_default_predicts_255_of_512(write):
    found = read_chunks(write("abcdefgh" * 200), letters(), 512)
    assert [passage.num_predicted for passage in found] == [255] * 3
    assert [passage.first for passage in found] == [257] * 3


def test_strides(write):
    """Each token after the first window - stride is predicted once; BOS is where the text has it: at its start."""
    text = "abcdefghijklmnopqrstuvw"
    tokenizer = letters(bos=True)
    found = read_chunks(write(text), tokenizer, 10, 3)
    ids = tokenizer.encode(text)
    assert [list(passage.ids) for passage in found] == [ids[i : i + 10] for i in (0, 3, 6, 9, 12)]
    predicted = [i for k, passage in enumerate(found) for i in range(3 * k + passage.first, 3 * k + 10)]
    assert predicted == list(range(7, 22))
    assert [passage.ids[0] for passage in found] == [BOS, *(ids[i] for i in (3, 6, 9, 12))]


def test_a_stride_that_divides_the_rest_begins_no_window_at_the_end(write):
    """16 tokens, windows of 10 every 3: ceil(6 / 3) = 2, as the program counts."""
    assert len(read_chunks(write("abcdefghijklmnop"), letters(), 10, 3)) == 2
    assert len(read_chunks(write("abcdefghijklmnopq"), letters(), 10, 3)) == 3


@pytest.mark.parametrize(
    ("text", "window", "stride", "words"),
    [
        ("abcdefg", 8, None, "found 7 tokens, expected 8 or more"),
        ("abcdefgh", 8, 4, "found 8 tokens, expected 9 or more"),
        ("abcdefghij", 8, 8, "stride: found 8, expected 1 to 7"),
        ("abcdefghij", 8, 0, "stride: found 0, expected 1 to 7"),
        ("abcdefghij", 4, None, "window: found 4, expected 8"),
    ],
)
def test_bad_chunks(write, text, window, stride, words):
    with pytest.raises(ConfigError, match=words):
        read_chunks(write(text), letters(), window, stride)


def test_one_reader_for_all(write):
    path, tokenizer = write("abcdefghij\nabcdefghi\n"), letters()
    assert read_passages(path, tokenizer) == as_passages(read_documents(path, tokenizer))
    assert read_passages(path, tokenizer, limit=1) == [Passage(tuple(tokenizer.encode("abcdefghij")))]
    assert read_passages(path, tokenizer, "chunks", 8, stride=3, limit=2) == read_chunks(path, tokenizer, 8, 3)[:2]
    with pytest.raises(ConfigError, match="stride: found 3 with documents='lines', expected documents='chunks'"):
        read_passages(path, tokenizer, "lines", stride=3)
    with pytest.raises(ConfigError, match="limit: found 0"):
        read_passages(path, tokenizer, limit=0)
    with pytest.raises(ConfigError, match="found 'chunks', which read_chunks"):
        read_documents(path, tokenizer, "chunks")


def test_a_passage_has_a_token_before_its_first_prediction():
    assert Passage((1, 2, 3), 3).num_predicted == 0
    assert Passage((1,)).num_predicted == Passage(()).num_predicted == 0
    for first in (0, 4, -1):
        with pytest.raises(ConfigError, match=f"found {first} as the first predicted token, expected 1 to 3"):
            Passage((1, 2, 3), first)


def test_letters_are_a_tokenizer():
    assert isinstance(letters(), Tokenizer)
    assert letters(bos=True).encode("ab")[0] == BOS
