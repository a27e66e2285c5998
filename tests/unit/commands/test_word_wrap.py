"""Words in a terminal: a small terminal is played, and what stands on its lines is read."""

from __future__ import annotations

import itertools
import random

import pytest
from wcwidth import iter_graphemes, wcswidth

from exl.commands.word_wrap import WordWrap


class Terminal:
    """As many columns as a real one has; it breaks lines by itself only in the last column."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.at, self.broken = width, [[]], 0, 0

    def write(self, text: str) -> None:
        for grapheme in iter_graphemes(text):
            line = self.lines[-1]
            if grapheme == "\n":
                self.lines.append([])
                self.at = 0
            elif grapheme == "\b":
                assert self.at > 0
                self.at -= 1
            else:
                size = wcswidth(grapheme)
                assert size >= 0, repr(grapheme)
                if self.at + size > self.width:
                    self.broken += 1
                    self.lines.append([])
                    line, self.at = self.lines[-1], 0
                if size == 0 and line:  # a combining mark that came alone
                    line[-1] += grapheme
                else:
                    line[self.at : self.at + size] = [grapheme, *[""] * (size - 1)]
                self.at += size

    @property
    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def shown(text: str, width: int, pieces: int | random.Random = 0) -> Terminal:
    """``pieces``: characters per piece; 0: the whole at once; a generator: of random lengths."""
    terminal = Terminal(width)
    wrap = WordWrap(terminal.write, lambda: width)
    at = 0
    while at < len(text):
        size = pieces.randint(1, 7) if isinstance(pieces, random.Random) else pieces or len(text)
        wrap.write(text[at : at + size])
        at += size
    return terminal


STORY = (
    "Once upon a time there was a little dog who lived in an extraordinarily big house. He liked bones, "
    "and balls, and walks."
)


@pytest.mark.parametrize("width", [21, 33, 40, 80, 200])
def test_lines_end_at_word_borders(width):
    terminal = shown(STORY, width, 3)
    assert terminal.broken == 0
    assert " ".join(terminal.text) == STORY
    for line, following in itertools.pairwise(terminal.text):
        assert len(line) <= width - 1
        assert len(line) + 1 + len(following.split()[0]) > width - 1, "the next word had room"


def test_pieces_make_no_difference():
    rng = random.Random(5)
    text = STORY + "\n\n" + "日本語の文章 and English, 😀😀 " * 9 + "\n" + STORY
    whole = shown(text, 37).text
    for pieces in (1, 2, 3, 5, rng, rng, rng):
        assert shown(text, 37, pieces).text == whole


def test_a_word_is_shown_before_it_is_whole():
    terminal = Terminal(40)
    wrap = WordWrap(terminal.write, lambda: 40)
    wrap.write("a walk in an extraord")
    assert terminal.text == ["a walk in an extraord"]
    wrap.write("inary, extraordi")
    assert terminal.text == ["a walk in an extraordinary, extraordi"]
    wrap.write("narily")
    assert terminal.text == ["a walk in an extraordinary,", "extraordinarily"]


def test_wide_characters_take_two_columns():
    terminal = shown("日本" * 40, 31, 1)
    assert terminal.broken == 0
    assert {wcswidth(line) for line in terminal.text[:-1]} == {30}
    emoji = shown("😀 " * 30, 31, 1)
    assert emoji.broken == 0
    assert all(line.count("😀") == 10 for line in emoji.text if line)
    families = shown("👩‍👩‍👧‍👦 " * 30, 31)
    assert all(line.count("👩‍👩‍👧‍👦") == 10 for line in families.text if line)
    accents = shown("e\u0301" * 12 + " " + "e\u0301" * 12, 26, 1)
    assert accents.text == ["e\u0301" * 12 + " " + "e\u0301" * 12]


def test_no_line_begins_with_what_closes():
    for width in range(22, 40):
        for line in shown("これは「本」です。" * 12, width, 1).text:
            assert not line.startswith(("。", "」"))
            assert not line.endswith("「")


@pytest.mark.parametrize("fence", ["```", "~~~", "  ```python"])
def test_code_is_left_alone(fence):
    code = "x = [value for value in some_quite_long_list_of_values if value is not None and value > 0]"
    text = f"Here is {STORY}\n{fence}\n{code}\n{fence.strip()[:3]}\nAnd {STORY}\n"
    sent = []
    wrap = WordWrap(sent.append, lambda: 40)
    for character in text:
        wrap.write(character)
    assert f"\n{fence}\n{code}\n" in "".join(sent)
    terminal = shown(text, 40, 4)
    start = next(i for i, line in enumerate(terminal.text) if line.startswith(fence))
    assert "".join(line.ljust(40) for line in terminal.text[start + 1 : start + 3]).startswith(code[:80])
    assert terminal.broken == 2  # of the code alone: the story after it is wrapped


@pytest.mark.parametrize("line", ["    " + STORY, "\t" + STORY, "| a | " + STORY])
def test_indented_code_and_tables_are_left_alone(line):
    sent = []
    wrap = WordWrap(sent.append, lambda: 40)
    for character in line:
        wrap.write(character)
    assert "".join(sent) == line


def test_a_code_span_of_three_backquotes_opens_no_block():
    sent = []
    wrap = WordWrap(sent.append, lambda: 40)
    wrap.write(f"```x = 1```\n{STORY}")
    assert "\n" in "".join(sent).partition("\n")[2]


def test_a_word_longer_than_a_line_is_left_to_the_terminal():
    url = "https://example.org/" + "x" * 70
    terminal = shown(f"See {url} for more", 40, 5)
    assert "".join(terminal.text).replace(" ", "") == f"See{url}formore"
    assert terminal.text[0] == "See"


def test_the_width_may_change():
    terminal, width = Terminal(200), [60]
    wrap = WordWrap(terminal.write, lambda: width[0])
    wrap.write(STORY)
    wrap.write("\n")
    width[0] = 30
    wrap.write(STORY)
    assert max(map(len, terminal.text)) <= 59
    assert max(map(len, terminal.text[-4:])) <= 29


def test_control_characters_do_not_reach_the_terminal():
    sent = []
    WordWrap(sent.append, lambda: 40).write("a\x1b[2Jb\x07\x9b1mc\r\nd\te")
    assert "".join(sent) == "a\ufffd[2Jb\ufffd\ufffd1mc\nd\te"


def test_random_texts_keep_every_word():
    rng = random.Random(11)
    letters = "abcdefgh日本😀é,.-(「」)"
    for _ in range(150):
        words = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 12))) for _ in range(40)]
        text = "".join(word + rng.choice([" ", " ", " ", "\n", "  "]) for word in words)
        width = rng.randint(30, 90)
        terminal = shown(text, width, rng)
        assert terminal.broken == 0
        assert all(wcswidth(line) < width for line in terminal.text)
        assert "".join("".join(terminal.text).split()) == "".join(text.split())
