"""Text that a user or a model wrote -> Markdown that the chat shows: HTML stays text, and formulas are found.

The page's Markdown would take ``<b>`` for HTML, and with ``$`` as a delimiter it would take "$5 and $6" for a formula.
"""

from __future__ import annotations

import re

# What the page itself looks for; ``shown_answer`` rewrites $...$ as \\(...\\).
LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
# Invisible, of no width, and allows no line break: after it, Markdown sees neither a tag nor an entity.
_JOINER = "\u2060"
_CODE = re.compile(r"(?ms)^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)")
_FORMULA = re.compile(r"(?s)\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)")
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
# Pandoc's rule for a dollar that is no currency: no space inside the dollars, and no digit after them.
_DOLLARS = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]*?[^\s\\$])\$(?![\d$])")


def shown_message(text: str) -> str:
    """A user's message; ``typed`` turns it back."""
    return _outside(_CODE, text, _without_markup)


def shown_answer(text: str) -> str:
    """A model's answer, with $...$ as a formula, too."""

    def prose(part: str) -> str:
        return _outside(_FORMULA, _DOLLARS.sub(r"\\(\1\\)", part), _without_markup)

    return _outside(_CODE, text, prose)


def typed(shown: str) -> str:
    """The text that somebody made of a shown text in its edit field."""
    return shown.replace(_JOINER, "")


def _without_markup(text: str) -> str:
    return _MARKUP.sub(lambda found: found[0] + _JOINER, text)


def _outside(pattern: re.Pattern[str], text: str, change) -> str:
    """``text`` with ``change`` applied to what ``pattern`` does not match."""
    parts, end = [], 0
    for found in pattern.finditer(text):
        parts += [change(text[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(text[end:])])
