"""Chat templates: render messages into the prompt format that a model was trained on.

Templates are Jinja, in the dialect of transformers (``transformers/utils/chat_template_utils.py``): trimmed blocks,
loop controls, ``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape characters, and ``generation``
tags, which mark the assistant's text and render as nothing.

A template comes with a checkpoint and is not trusted: it runs in Jinja's immutable sandbox, on copies that hold plain
data only. Bounded: a ``range`` (Jinja: 100,000 items), the length of the output, the depth of recursion. Not bounded:
the time that nested loops take, and the size of a single value that an expression makes (``'a' * 10 ** 10``). So a
hostile template can use up processor time and memory, but it reaches no file, no module and no Python attribute. The
template of a model is rendered when the model is loaded, too: ``end_tokens.py`` asks it what ends an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from exl.errors import ConfigError
from exl.text.content_forms import ContentForms
from exl.text.control_tokens import ControlTokens, Placeholders, RenderedPrompt

_MAX_CHARS = 1 << 26
_MAX_DEPTH = 100
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = ("messages", "tools", "add_generation_prompt")


class ChatTemplate:
    """A model's chat template, or several by name. Each is compiled at its first use."""

    def __init__(
        self,
        templates: str | Mapping[str, str] | Sequence[Mapping[str, str]],
        special_tokens: Mapping[str, str] | None = None,
        source: str = "chat template",
    ) -> None:
        """``templates``: one template; named ones; or, as in tokenizer_config.json, a list of {name, template}.

        ``special_tokens`` become variables of the template: ``{"bos_token": "<s>", ...}``. ``source`` is the name that
        error messages use. Raises ``ConfigError`` if ``templates`` has none of these forms.
        """
        self.source = source
        self._templates = _named(templates, source)
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, jinja2.Template] = {}
        self._forms_by_name: dict[str, ContentForms] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._templates)

    def text(self, name: str | None = None) -> str:
        """The template itself; by default the one for messages without tools. Raises ``ConfigError`` for a name that
        there is not."""
        return self._templates[self._choose(name, None)]

    @property
    def source_text(self) -> str:
        """The templates themselves, joined by NUL."""
        return "\0".join(self._templates.values())

    @cached_property
    def literal_text(self) -> str:
        """All text that the templates themselves can write: their literal text and strings, joined by NUL."""
        parts = []
        for name in self._templates:
            parts += self._read(name, _literals)
        return "\0".join(parts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        """The prompt, as transformers renders it.

        ``messages``: objects with a ``role`` and the other keys that the template reads, usually ``content``: a string,
        a list of parts, or None; it is brought into a form that the template takes (``content_forms.py``). ``tools``:
        JSON schemas of functions. ``variables``: further variables for the template, such as ``enable_thinking``.
        ``name``: which template; by default ``tool_use`` if it exists and tools are given, else ``default``. Raises
        ``ConfigError`` for malformed input, and with the template's own message if the template itself raises.
        """
        values = _values(messages, tools, variables)
        return self._render(values, add_generation_prompt, name)

    def render_protected(
        self,
        messages: Sequence[Mapping[str, Any]],
        control: ControlTokens,
        special: ControlTokens,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> RenderedPrompt:
        """Like ``render``, but text in the input that only looks like a control token is replaced by placeholders.

        An assistant message may hold control tokens that are not special (such as ``<think>``), because the model
        itself wrote them. No other message may hold control tokens, and no message may hold special ones. Two cases
        remain the caller's responsibility. First, a role that holds a control token is an error, but a template that
        builds tokens from roles accepts any other role. Second, a template that splits strings may put parts of a token
        next to other text.
        """
        values = _values(messages, tools, variables)
        placeholders = Placeholders([values, list(self._templates.values())])
        for i, message in enumerate(values["messages"]):
            if control.found_in(message["role"]):
                raise ConfigError(f"messages[{i}]: role: found {message['role']!r}, which holds a control token")
        protected = {
            name: placeholders.protect(value, control) for name, value in values.items() if name != "messages"
        } | {
            "messages": [
                placeholders.protect(message, special if message["role"] == "assistant" else control)
                for message in values["messages"]
            ]
        }
        return placeholders.rendered(self._render(protected, add_generation_prompt, name))

    def _render(self, values: Mapping[str, Any], add_generation_prompt: bool, name: str | None) -> str:
        name = self._choose(name, values["tools"])
        forms = self._forms(name)
        messages = [forms.fit(message, f"messages[{i}]") for i, message in enumerate(values["messages"])]
        values = {**values, "messages": messages}
        pieces, length = [], 0
        try:
            template = self._compile(name)
            for piece in template.generate(
                {**self._special_tokens, "documents": None, **values, "add_generation_prompt": add_generation_prompt}
            ):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARS:
                    raise ConfigError(f"{self.source}: the prompt is longer than {_MAX_CHARS} characters")
        except ConfigError:
            raise
        except Exception as error:  # a template can run into any of Python's errors
            raise self._error(name, error) from None
        return "".join(pieces)

    def _choose(self, name: str | None, tools: Any) -> str:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ConfigError(f"{self.source}: found no template {name!r}, expected one of {sorted(self._templates)}")
        return name

    def _compile(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self._templates[name])
        return self._compiled[name]

    def _forms(self, name: str) -> ContentForms:
        if name not in self._forms_by_name:
            self._forms_by_name[name] = self._read(name, ContentForms.of)
        return self._forms_by_name[name]

    def _read(self, name: str, read: Callable[[nodes.Template], Any]) -> Any:
        """What ``read`` finds in a template's syntax tree, which a hostile template can nest deeply."""
        try:
            return read(_environment().parse(self._templates[name]))
        except (TemplateError, RecursionError) as error:
            raise self._error(name, error) from None

    def _error(self, name: str, error: Exception) -> ConfigError:
        said = " ".join(str(error).split())[:500] or "no message"
        if isinstance(error, TemplateSyntaxError):
            said = f"line {error.lineno}: {said}"
        elif not isinstance(error, TemplateError):
            said = f"{type(error).__name__}: {said}"
        which = "" if name == "default" else f" {name!r}"
        return ConfigError(f"{self.source}{which}: {said}")


def _literals(tree: nodes.Template) -> list[str]:
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    return texts + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def _named(templates: Any, source: str) -> dict[str, str]:
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, Mapping):
        named = dict(templates)
    else:
        try:
            named = {entry["name"]: entry["template"] for entry in templates}
        except (TypeError, KeyError, IndexError):
            raise ConfigError(f"{source}: expected a template or a list of objects with name and template") from None
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ConfigError(f"{source}: expected templates and their names to be strings")
    return named


# Input


def _values(messages: Any, tools: Any, variables: Any) -> dict[str, Any]:
    """Checked copies of the template's variables, by name."""
    if variables is not None and not isinstance(variables, Mapping):
        raise ConfigError(f"variables: found {type(variables).__name__}, expected an object")
    if taken := [name for name in variables or () if name in _RESERVED]:
        raise ConfigError(f"variables: found {taken[0]!r}, which has an argument of its own")
    if tools is not None and not _is_list_of_objects(tools):
        raise ConfigError(f"tools: found {_kind(tools)}, expected a list of objects")
    return {
        **_plain(variables or {}, "variables"),
        "messages": plain_messages(messages),
        "tools": None if tools is None else _plain(list(tools), "tools"),
    }


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies made only of JSON's types, each with a role, and with content, if it has any, that is a text, None or a
    list of objects. Raises ``ConfigError``."""
    if not _is_list_of_objects(messages) or not messages:
        raise ConfigError(f"messages: found {_kind(messages)}, expected a list of objects, at least one")
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        # Many templates write "None" for a key that is present with the value None. Some ask whether a content is None.
        message = _plain({key: value for key, value in message.items() if value is not None or key == "content"}, where)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ConfigError(f"{where}: role: found {role!r}, expected a string such as 'user'")
        if not isinstance(content, str | None) and not _is_list_of_objects(content):
            raise ConfigError(f"{where}: content: found {_kind(content)}, expected a string or a list of objects")
        plain.append(_with_reasoning(message))
    return plain


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Sets both keys under which templates read an assistant's reasoning."""
    reasoning = next((message[key] for key in _REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made only of JSON's types, so that a template never sees an object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where}: nested more than {_MAX_DEPTH} deep")
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value) if kind is not str else str.__str__(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: found the key {bad[0]!r}, expected strings")
        return {str.__str__(key): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    raise ConfigError(f"{where}: found {type(value).__name__}, expected what JSON can hold")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        others = [type(item).__name__ for item in value if not isinstance(item, Mapping)]
        return f"a list that holds {others[0]}" if others else "an empty list"
    return type(value).__name__


# The dialect


class _GenerationTag(Extension):
    """``{% generation %}``: transformers records the position of the assistant's text; exl renders the text only."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` without its methods: called through the class, they could change objects that the sandbox protects."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's ``namespace``, which refuses names that begin with an underscore: they may mean something to Python."""

    def __init__(*args: Any, **items: Any) -> None:  # self has no name, so that an item may be called "self"
        self, *args = args
        items = dict(*args, **items)
        for name in items:
            _refuse_private(name)
        Namespace.__init__(self, items)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no names that begin with an underscore, found {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's, this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
