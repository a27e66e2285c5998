"""What a request asks of the engine so that tool calls are whole and their arguments follow the tools' schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exl.errors import ConfigError
from exl.json_schema import schema_of
from exl.parse.call_grammars import CallGrammar, Function, call_grammar
from exl.parse.calls import MAX_NAME, is_name
from exl.parse.choose import AnswerFormat
from exl.parse.formats import HARMONY, NONE, REASONING_FORMATS, TOOL_FORMATS, tags_of
from exl.parse.harmony import CHANNEL, CONSTRAIN, MESSAGE, START
from exl.parse.harmony import TAGS as HARMONY_TAGS
from exl.parse.lark import Lark
from exl.parse.reasoning import Thinking
from exl.text.tokenizer import Tokenizer

_CHOICES = ("auto", "none", "required")


def constrain(
    format: AnswerFormat,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    *,
    tool_choice: str | Mapping[str, Any] = "auto",
    parallel: bool = True,
    prompt_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Options of a request (``grammar``, see ``exl.request_options``); none if nothing is constrained.

    ``tools``: in OpenAI's shape. ``tool_choice``: "none"; "auto": the model decides; if a function is ``strict``, or
    calls may not be parallel, calls are of known functions, with arguments by their schemas where ``strict`` says so,
    and the answer ends behind them; "required": one call or more; ``{"type": "function", "function": {"name": NAME}}``:
    of that function. Arguments of required calls always follow the schemas. ``parallel``: more than one call may be
    made. ``prompt_ids``: the prompt, which may have opened the reasoning; what is constrained begins behind the
    reasoning.

    Raises ``ConfigError`` for a malformed choice or tool, for a function that is not among the tools, and for what the
    model's tool format has no grammar for.
    """
    functions, choice = _functions(tools), _named(tool_choice)
    if choice in ("auto", "none"):
        is_free = parallel and not any(function.strict for function in functions)
        if choice == "none" or format.tools == NONE or not functions or is_free:
            return {}
        functions = _with_loose_arguments(functions)
    elif choice != "required":
        functions = [function for function in functions if function.name == choice]
        if not functions:
            names = ", ".join(function.name for function in _functions(tools)) or "no tools"
            raise ConfigError(f"tool_choice: found the function {choice!r}, expected one of {names}")
    if not functions:
        raise ConfigError(f"tool_choice: found {tool_choice!r} without tools, expected at least one")
    if format.tools == NONE:
        raise ConfigError(
            f"tool_choice: found {tool_choice!r} with the tool format 'none', expected another: name it (--tool-format)"
        )
    try:
        return {"grammar": _grammar(format, tokenizer, functions, choice == "auto", parallel, prompt_ids)}
    except (ValueError, TypeError, RecursionError) as error:  # of json.dumps
        raise ConfigError(f"tools: parameters: {error}; expected schemas that are JSON") from None


def _grammar(
    format: AnswerFormat,
    tokenizer: Tokenizer,
    functions: Sequence[Function],
    is_free: bool,
    parallel: bool,
    prompt_ids: Sequence[int],
) -> str:
    """``is_free``: there may be text, and no call."""
    if format.tools == HARMONY:
        return _harmony(tokenizer, functions, is_free)
    syntax, thinking = TOOL_FORMATS[format.tools], REASONING_FORMATS.get(format.reasoning)
    lark = Lark(tokenizer, tags_of(syntax, thinking))
    calls = call_grammar(lark, format.tools, functions, parallel)
    answer = _auto(lark, calls, format.tools, thinking) if is_free else _required(lark, calls)
    return _behind_reasoning(lark, thinking, tokenizer, prompt_ids, answer)


def constrain_text(
    format: AnswerFormat,
    tokenizer: Tokenizer,
    schema: Any,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    parallel: bool = True,
    prompt_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Options of a request whose answer's text is JSON of a schema, see ``RequestOptions.json_schema``.

    Reasoning comes before it as it likes. With ``tools``, the answer is either calls, of known functions and with
    arguments by the schemas of those that are ``strict``, or the text. Raises ``ConfigError`` as ``constrain`` does.
    """
    functions = _with_loose_arguments(_functions(tools))
    if format.reasoning == NONE and format.tools != HARMONY and not functions:
        return {"json_schema": schema}
    try:
        return {"grammar": _text_grammar(format, tokenizer, schema_of(schema), functions, parallel, prompt_ids)}
    except (ValueError, TypeError, RecursionError) as error:  # of json.dumps
        raise ConfigError(f"json_schema: {error}; expected schemas that are JSON") from None


def _text_grammar(
    format: AnswerFormat,
    tokenizer: Tokenizer,
    schema: Mapping[str, Any],
    functions: Sequence[Function],
    parallel: bool,
    prompt_ids: Sequence[int],
) -> str:
    if HARMONY in (format.tools, format.reasoning):
        return _harmony(tokenizer, functions if format.tools == HARMONY else [], True, schema)
    syntax = TOOL_FORMATS.get(format.tools) if functions else None
    thinking = REASONING_FORMATS.get(format.reasoning)
    lark = Lark(tokenizer, tags_of(syntax, thinking))
    choices = [lark.json(schema)]
    if syntax is not None:
        choices.append(_required(lark, call_grammar(lark, format.tools, functions, parallel)))
    return _behind_reasoning(lark, thinking, tokenizer, prompt_ids, lark.one_of(choices))


def _required(lark: Lark, calls: CallGrammar) -> str:
    return f"{lark.text(calls.open)} {calls.rest}".strip() if calls.open else calls.rest


def _auto(lark: Lark, calls: CallGrammar, name: str, thinking: Thinking | None) -> str:
    """Free text, then calls, and then the end; or free text alone, in which no tag begins a call."""
    syntax = TOOL_FORMATS[name]
    own_thinking = [] if thinking is None or not lark.is_own(thinking.open) else [thinking.open]
    tags = (*syntax.opens, *own_thinking)
    free = lark.free(tags, syntax.bare)
    if not calls.open:
        return f"({free} | {lark.rule(calls.rest)})?"
    others = [tag for tag in tags if tag != calls.open]
    return f"({free} | {lark.until(calls.open, others)} {lark.rule(calls.rest)})?"


def _behind_reasoning(
    lark: Lark, thinking: Thinking | None, tokenizer: Tokenizer, prompt_ids: Sequence[int], answer: str
) -> str:
    """The source of a grammar of this answer, and of the reasoning that may come before it; that must, if the prompt
    has opened it."""
    if thinking is None:
        return lark.source(answer.strip())
    some_space = lark.regex(r"[ \n]{1,4}")
    space = f"({some_space})?"
    reasoning = f"{lark.until(thinking.close)} {space}"
    if not thinking.begun_by(prompt_ids, tokenizer):
        reasoning = f"({space} {lark.text(thinking.open)} {reasoning})?"
    return lark.source(f"{reasoning} {answer}".strip())


def _harmony(
    tokenizer: Tokenizer, functions: Sequence[Function], free: bool, schema: Mapping[str, Any] | None = None
) -> str:
    """``schema``: of the final text.

    From the header on that the prompt ends in, ``<|start|>assistant``. The tokens that end an answer, ``<|call|>`` and
    ``<|return|>``, are the engine's."""
    lark = Lark(tokenizer, HARMONY_TAGS)
    end = f"{lark.until('<|end|>', [tag for tag in HARMONY_TAGS if tag != '<|end|>'])} {lark.text(START, 'assistant')}"
    thought = f"{lark.text(CHANNEL, 'analysis', MESSAGE)} {end}"
    calls = [
        f"{lark.text(CHANNEL, f'commentary to=functions.{function.name} ', CONSTRAIN, 'json', MESSAGE)} "
        f"{lark.json(function.schema)}"
        for function in functions
    ]
    if not free:
        return lark.source(f"({thought})* {lark.one_of(calls)}")
    text = f"({lark.free(HARMONY_TAGS)})?" if schema is None else lark.json(schema)
    preamble = f"{lark.text(CHANNEL, 'commentary', MESSAGE)} {end}"
    final = f"{lark.text(CHANNEL, 'final', MESSAGE)} {text}"
    before = f"({thought} | {preamble})*" if schema is None else f"({thought})*"  # a preamble is text, too
    return lark.source(f"{before} {lark.one_of([*calls, final])}")


# ---- what clients send


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[Function]:
    functions = []
    for i, tool in enumerate(tools):
        found = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = found.get("name") if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or not isinstance(name, str) or not name:
            raise ConfigError(f"tools[{i}]: found no function with a name, expected one")
        if not is_name(name):
            raise ConfigError(
                f"tools[{i}]: found the name {name!r}, expected at most {MAX_NAME} letters, digits, - or _"
            )
        schema = found.get("parameters")
        schema = {"type": "object", "properties": {}} if schema is None else schema
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise ConfigError(f"tools[{i}]: {name}: parameters: found {schema!r}, expected the schema of an object")
        functions.append(Function(name, {**schema, "type": "object"}, found.get("strict") is True))
    return functions


def _with_loose_arguments(functions: Sequence[Function]) -> list[Function]:
    """Functions of which those that are not ``strict`` take any object."""
    return [f if f.strict else Function(f.name, {"type": "object"}, False) for f in functions]


def _named(choice: Any) -> str:
    """``tool_choice`` as one of ``_CHOICES`` or a function's name."""
    if isinstance(choice, Mapping):
        found = choice.get("function", choice)
        name = found.get("name") if isinstance(found, Mapping) else None
        if choice.get("type", "function") == "function" and isinstance(name, str) and name not in _CHOICES:
            return name
    elif choice in _CHOICES:
        return str(choice)
    shape = '{"type": "function", "function": {"name": NAME}}'
    raise ConfigError(f"tool_choice: found {choice!r}, expected one of {', '.join(_CHOICES)}, or {shape}")
