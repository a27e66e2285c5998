"""Which format a model's answers have, and a parser for one answer."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exl.errors import ConfigError
from exl.parse.answer import harmony_parser, tagged_parser
from exl.parse.formats import HARMONY, NONE, REASONING_FORMATS, REASONING_RULES, TOOL_FORMATS, TOOL_RULES, Rule
from exl.parse.parts import AnswerParser
from exl.parse.tools import Tools
from exl.text.tokenizer import Tokenizer

AUTO = "auto"
TOOL_FORMAT_NAMES = (*TOOL_FORMATS, HARMONY, NONE)
REASONING_FORMAT_NAMES = (*REASONING_FORMATS, HARMONY, NONE)
_GENERIC = "json"  # of a template that shows tools in no known way


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes tool calls and reasoning: names of ``TOOL_FORMAT_NAMES`` and ``REASONING_FORMAT_NAMES``."""

    tools: str = NONE
    reasoning: str = NONE

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for names that are unknown or do not go together."""
        _check("tool format", self.tools, TOOL_FORMAT_NAMES)
        _check("reasoning format", self.reasoning, REASONING_FORMAT_NAMES)
        if not _go_together(self.tools, self.reasoning):
            raise ConfigError(
                f"tool and reasoning format: found {self.tools!r} and {self.reasoning!r}, expected {HARMONY!r} for "
                f"both, or {NONE!r} for one of them"
            )


def choose(
    template_text: str | None, tokenizer: Tokenizer, *, tool_format: str = AUTO, reasoning_format: str = AUTO
) -> AnswerFormat:
    """The format of a model's answers.

    ``template_text``: its chat templates, as source or as ``ChatTemplate.literal_text``; None without one. A format is
    known by the tags that the template writes; if it writes none, by the tags that the vocabulary has as added tokens.
    Without either, calls are looked for as JSON, and no reasoning is split off.

    ``tool_format``, ``reasoning_format``: a name that decides instead; "auto" leaves it to the model's files. Raises
    ``ConfigError`` that lists the names for an unknown one.
    """
    text, added = template_text or "", tokenizer.added_ids
    check_formats(tool_format, reasoning_format)
    tools = tool_format if tool_format != AUTO else _first(TOOL_RULES, text, added, _GENERIC)
    reasoning = reasoning_format if reasoning_format != AUTO else _first(REASONING_RULES, text, added, NONE)
    if not _go_together(tools, reasoning):
        # What was asked by name counts. If nothing was, the template has written the other format, and harmony is
        # only the vocabulary's: where it is the template's, it is the first of both rules.
        if tools == HARMONY and tool_format == AUTO:
            tools = _GENERIC
        elif tools == HARMONY and reasoning_format == AUTO:
            reasoning = HARMONY
        elif reasoning == HARMONY and reasoning_format == AUTO:
            reasoning = NONE
        elif reasoning == HARMONY and tool_format == AUTO:
            tools = HARMONY
    return AnswerFormat(tools, reasoning)


def check_formats(tool_format: str, reasoning_format: str) -> None:
    """Raises ``ConfigError`` that lists the names for one that ``choose`` does not know."""
    _check("tool format", tool_format, (AUTO, *TOOL_FORMAT_NAMES))
    _check("reasoning format", reasoning_format, (AUTO, *REASONING_FORMAT_NAMES))


def choose_for(tokenizer: Tokenizer, *, tool_format: str = AUTO, reasoning_format: str = AUTO) -> AnswerFormat:
    """``choose`` with the tokenizer's own chat template. One that cannot be read counts as none."""
    try:
        text = None if tokenizer.chat_template is None else tokenizer.chat_template.literal_text
    except ConfigError:
        text = None
    return choose(text, tokenizer, tool_format=tool_format, reasoning_format=reasoning_format)


def parser_for(
    format: AnswerFormat,
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    prompt_ids: Sequence[int] = (),
    stop: Sequence[str] | str = (),
) -> AnswerParser:
    """A parser of one answer.

    ``tools``: those of the request, in OpenAI's shape. Without any, tags of tool calls are text; reasoning is split off
    all the same. ``prompt_ids``: the prompt, whose end says whether it has opened the reasoning already. ``stop``: the
    request's stop strings; the answer is cut where the engine cuts its text. Raises ``ConfigError`` for stop strings
    that ``SamplingParams`` refuses.
    """
    known = Tools(tools)
    if HARMONY in (format.tools, format.reasoning):
        return harmony_parser(
            tokenizer,
            takes_calls=bool(known) and format.tools == HARMONY,
            splits_reasoning=format.reasoning == HARMONY,
            tools=known,
            prompt_ids=prompt_ids,
            stop=stop,
        )
    return tagged_parser(
        tokenizer,
        TOOL_FORMATS.get(format.tools) if known else None,
        REASONING_FORMATS.get(format.reasoning),
        tools=known,
        prompt_ids=prompt_ids,
        stop=stop,
    )


def _check(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ConfigError(f"{what}: found {name!r}, expected one of {', '.join(names)}")


def _go_together(tools: str, reasoning: str) -> bool:
    """Harmony is one format for both: nothing else goes with it."""
    return HARMONY not in (tools, reasoning) or {tools, reasoning} <= {HARMONY, NONE}


def _first(rules: Sequence[Rule], text: str, added: Container[str], otherwise: str) -> str:
    for known in (text, added):
        for rule in rules:
            if all(found in known for found in rule.texts):
                return rule.name
    return otherwise
